"""Loading of captioned images: sources, preprocessing, captions, and errors."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import SIDE, bar, write_empty_parquet
from PIL import Image

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.dataset import CaptionedImages, load_captioned_images
from cond_diffusion.errors import UserError
from cond_diffusion.images import normalize_image, to_bytes, to_model

LABELS = ["a bar that is upright", "a bar that is level"]
BARS = DataConfig(resolution=SIDE, caption_column="text")


def load(config: DataConfig, split: str = "train") -> CaptionedImages:
    return load_captioned_images(config, split)


@pytest.fixture
def bars_folder(tmp_path: Path) -> Path:
    """Six bars as PNG files, with captions in metadata.jsonl."""
    lines = []
    for i in range(6):
        Image.fromarray(bar(i % 2, i).numpy()).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": LABELS[i % 2]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def as_pairs(data: CaptionedImages) -> set[tuple[bytes, tuple[str, ...]]]:
    return {
        (image.numpy().tobytes(), data.caption_groups[group])
        for image, group in zip(data.images, data.group_of.tolist(), strict=True)
    }


def test_a_folder_and_a_parquet_file_give_the_same_data(bars_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    expected = {(bar(i % 2, i).numpy().tobytes(), (LABELS[i % 2],)) for i in range(6)}
    assert as_pairs(load(replace(BARS, source=str(bars_folder)))) == expected

    parquet = tmp_path_factory.mktemp("parquet") / "bars.parquet"
    columns = {"pixels": [bar(i % 2, i).numpy() for i in range(6)], "words": [LABELS[i % 2] for i in range(6)]}
    features = datasets.Features({"pixels": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(parquet)
    renamed = replace(BARS, image_column="pixels", caption_column="words")
    assert as_pairs(load(replace(renamed, source=str(parquet)))) == expected
    assert as_pairs(load(replace(renamed, source=str(parquet.parent)))) == expected


@pytest.mark.slow
def test_mnist_is_a_built_in_source():
    config = DataConfig(
        caption_column="label",
        caption_templates=("a digit {word}", "{label}"),
        label_names={"word": list("abcdefghij")},
    )
    test = load(config, "test")
    assert test.images.shape == (10_000, 1, 28, 28)
    counts = {test.caption_groups[i]: n for i, n in enumerate(test.group_of.bincount().tolist())}
    assert counts["a digit b", "1"] == 1135
    assert counts["a digit f", "5"] == 892
    assert len(counts) == 10


def test_a_list_of_captions_is_one_group_of_which_one_is_picked(tmp_path: Path):
    captions = [["seven", "a seven"], ["two"]]
    columns = {"image": [bar(0, i).numpy() for i in range(2)], "text": captions}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
    data = load(replace(BARS, source=str(tmp_path / "x.parquet")))
    assert data.caption_groups == (("seven", "a seven"), ("two",))
    picked = data.captions_of(torch.tensor([0, 1] * 50), torch.rand(100, generator=torch.Generator().manual_seed(0)))
    assert set(picked[::2]) == {"seven", "a seven"}
    assert set(picked[1::2]) == {"two"}


def test_images_are_transposed_by_exif_resized_and_cropped_at_the_center(tmp_path: Path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (200, 100, 50)  # the center square
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    Image.fromarray(wide).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in ("turned.png", "wide.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    images = load(replace(BARS, source=str(tmp_path), resolution=10, channels=3)).images
    assert images.shape == (2, 3, 10, 10)
    # Without the edges, which are blended with the adjacent black; atol for the rounding of resampling.
    color = torch.tensor([200.0, 100.0, 50.0])[None, :, None, None].expand(2, 3, 10, 6)
    torch.testing.assert_close(images[:, :, :, 2:-2].float(), color, rtol=0, atol=1)


def test_unusual_image_modes_are_converted_to_8_bit_grayscale_or_rgb():
    clear = Image.new("RGBA", (2, 2), (255, 255, 255, 0))
    clear.putpixel((0, 0), (200, 100, 50, 255))
    assert [normalize_image(clear).getpixel(place) for place in ((0, 0), (1, 1))] == [(200, 100, 50), (0, 0, 0)]
    palette = Image.new("P", (2, 2))
    palette.putpalette([9, 8, 7])
    assert normalize_image(palette).getpixel((1, 1)) == (9, 8, 7)
    assert normalize_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == 255
    rotated = Image.new("RGB", (2, 3))
    rotated.getexif()[0x0112] = 6
    assert normalize_image(rotated).size == (3, 2)


def test_transparent_images_are_composited_on_the_background(tmp_path: Path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing", encoding="utf-8")
    for background, expected in (("black", 0), ("#ff0000", 76), ("white", 255)):
        assert load(replace(BARS, source=str(tmp_path), background=background)).images.unique().tolist() == [expected]
    with pytest.raises(UserError, match=r"^data\.background: 'rouge'"):
        replace(BARS, background="rouge")


def test_captions_are_read_from_text_files_beside_the_images(
    tmp_path: Path, bars_folder: Path, caplog: pytest.LogCaptureFixture
):
    expected = load(replace(BARS, source=str(bars_folder)))
    tmp_path = tmp_path / "beside"
    tmp_path.mkdir()
    for line in (bars_folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        (tmp_path / row["file_name"]).write_bytes((bars_folder / row["file_name"]).read_bytes())
        (tmp_path / row["file_name"]).with_suffix(".txt").write_text(f"{row['text']}\n", encoding="utf-8")
    assert as_pairs(load(replace(BARS, source=str(tmp_path)))) == as_pairs(expected)
    with pytest.raises(UserError, match=r"^data\.source: .*/beside .*'test'"):
        load(replace(BARS, source=str(tmp_path)), "test")
    victim = next(tmp_path.glob("*.txt"))
    victim.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=rf"^data\.source: .*/beside/{victim.name} .*utf-8"):
        load(replace(BARS, source=str(tmp_path)))
    victim.unlink()
    with caplog.at_level(logging.WARNING):
        assert len(as_pairs(load(replace(BARS, source=str(tmp_path))))) == len(as_pairs(expected)) - 1
    assert f"{victim.stem}.png" in caplog.text


def test_unreadable_images_are_logged_and_skipped_up_to_max_bad_fraction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for i in range(8):
        Image.fromarray(bar(0, i).numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}", encoding="utf-8")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:50])
    (tmp_path / "5.png").write_text("not an image", encoding="utf-8")
    data = load_captioned_images(replace(BARS, source=str(tmp_path), max_bad_fraction=0.25))
    assert [data.caption_groups[i][0] for i in data.group_of.tolist()] == [f"number {i}" for i in (0, 1, 2, 4, 6, 7)]
    assert torch.equal(data.images[3, 0], bar(0, 4))
    warnings = [message for message in caplog.messages if message.startswith("data.image_column: 'image' of ")]
    assert [row for row in range(8) if any(f"row {row} of 8" in warning for warning in warnings)] == [3, 5]
    with pytest.raises(UserError, match=r"^data\.image_column: 'image' .*: 2 of 8 .*data\.max_bad_fraction \(0\.24\)"):
        load(replace(BARS, source=str(tmp_path), max_bad_fraction=0.24))


def test_images_that_are_upscaled_are_counted(bars_folder: Path, caplog: pytest.LogCaptureFixture):
    data = load_captioned_images(replace(BARS, source=str(bars_folder), resolution=16))
    assert data.images.shape[2:] == (16, 16)
    (message,) = (message for message in caplog.messages if message.startswith("data.resolution: "))
    assert f"{len(data)} of {len(data)} " in message
    assert " 16 " in message


def test_conversion_of_bytes_to_the_model_range_is_invertible():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert to_model(every).min() == -1
    assert to_model(every).max() == 1
    assert torch.equal(to_bytes(to_model(every)), every)
    assert to_bytes(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_column": "txt"}, r"^data\.caption_column: .*'txt' .* \(did you mean 'text'\?\); .*'image', 'text'"),
        ({"image_column": "picture"}, r"^data\.image_column: .*'picture' .*'image', 'text'"),
        ({"caption_column": "image"}, r"^data\.caption_column: 'image' "),
        ({"image_column": "text"}, r"^data\.image_column: 'text' of .*: 2 of 2 .*data\.max_bad_fraction.* row 0 of 2"),
        (
            {"caption_templates": ("a {color} bar",)},
            r"^data\.caption_templates: 'a {color} bar' .*'color'.*data\.label_names",
        ),
        ({"caption_templates": ("a {bar:d}",)}, r"^data\.caption_templates: 'a {bar:d}': "),
        ({"caption_templates": ("a {bar",)}, r"^data\.caption_templates: 'a {bar' "),
        ({"source": "mnits"}, r"^data\.source: .*mnits \(did you mean 'mnist'\?\)"),
        ({"source": "no/such/folder"}, r"^data\.source: .*no/such/folder"),
        ({"source": __file__}, rf"^data\.source: {__file__}"),
    ],
)
def test_invalid_data_is_refused_in_one_line(bars_folder: Path, change: dict[str, object], message: str):
    with pytest.raises(UserError, match=message) as caught:
        load(replace(BARS, **{"source": str(bars_folder), **change}))
    assert "\n" not in str(caught.value)


def test_labels_require_templates_and_names(bars_parquet: Path):
    labelled = replace(BARS, source=str(bars_parquet), caption_column="label")
    with pytest.raises(UserError, match=r"^data\.caption_column: 'label' .*data\.caption_templates="):
        load(labelled)
    short = replace(labelled, caption_templates=("a {word}",), label_names={"word": ["one"]})
    with pytest.raises(UserError, match=r"^data\.label_names: .*label 1 .*'label'"):
        load(short)


def test_training_data_is_not_used_as_a_test_split(bars_parquet: Path):
    for source in (bars_parquet, bars_parquet.parent):
        with pytest.raises(UserError, match=rf"^data\.source: {source} .*'test'"):
            load(replace(BARS, source=str(source)), "test")


def test_an_empty_dataset_and_a_damaged_file_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=rf"^data\.source: {tmp_path} "):
        load(replace(BARS, source=str(tmp_path)))
    write_empty_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"^data\.source: .*/x\.parquet \(train\)"):
        load(replace(BARS, source=str(tmp_path / "x.parquet")))
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"^data\.source: .*/y\.parquet"):
        load(replace(BARS, source=str(tmp_path / "y.parquet")))


def test_an_unreachable_hub_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^data\.source: someone/images: ") as caught:
        load(replace(BARS, source="someone/images"))
    assert "\n" not in str(caught.value)
