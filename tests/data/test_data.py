import json
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
    """Six bars as PNG files, their captions in metadata.jsonl."""
    lines = []
    for i in range(6):
        Image.fromarray(bar(i % 2, i).numpy()).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": LABELS[i % 2]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def as_pairs(data: CaptionedImages) -> set[tuple[bytes, tuple[str, ...]]]:
    return {
        (image.numpy().tobytes(), data.caption_groups[group])
        for image, group in zip(data.images, data.group_of.tolist(), strict=True)
    }


def test_a_folder_and_a_parquet_file_go_through_the_same_path(
    bars_folder: Path, tmp_path_factory: pytest.TempPathFactory
):
    expected = {(bar(i % 2, i).numpy().tobytes(), (LABELS[i % 2],)) for i in range(6)}
    assert as_pairs(load(replace(BARS, source=str(bars_folder)))) == expected

    parquet = tmp_path_factory.mktemp("parquet") / "bars.parquet"
    columns = {"pixels": [bar(i % 2, i).numpy() for i in range(6)], "words": [LABELS[i % 2] for i in range(6)]}
    features = datasets.Features({"pixels": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(parquet)
    renamed = replace(BARS, image_column="pixels", caption_column="words")
    assert as_pairs(load(replace(renamed, source=str(parquet)))) == expected
    assert as_pairs(load(replace(renamed, source=str(parquet.parent)))) == expected


def test_mnist_is_built_in():
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


def test_a_list_of_captions_is_one_group_and_one_is_drawn(tmp_path: Path):
    captions = [["seven", "a seven"], ["two"]]
    columns = {"image": [bar(0, i).numpy() for i in range(2)], "text": captions}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
    data = load(replace(BARS, source=str(tmp_path / "x.parquet")))
    assert data.caption_groups == (("seven", "a seven"), ("two",))
    drawn = data.captions_of(torch.tensor([0, 1] * 50), torch.rand(100, generator=torch.Generator().manual_seed(0)))
    assert set(drawn[::2]) == {"seven", "a seven"}
    assert set(drawn[1::2]) == {"two"}


def test_pictures_are_turned_upright_resized_and_cropped_at_the_centre(tmp_path: Path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (200, 100, 50)  # the centre square
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(wide).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in ("turned.png", "wide.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    images = load(replace(BARS, source=str(tmp_path), resolution=10, channels=3)).images
    assert images.shape == (2, 3, 10, 10)
    # Beside the edges, which blend with the black next to them, and but for the rounding of the resampling.
    colour = torch.tensor([200.0, 100.0, 50.0])[None, :, None, None].expand(2, 3, 10, 6)
    torch.testing.assert_close(images[:, :, :, 2:-2].float(), colour, rtol=0, atol=1)


def test_unusual_pictures_become_grey_or_rgb_of_8_bits():
    deep = Image.fromarray(np.full((2, 2), 128 * 257, dtype=np.uint16))
    assert (normalize_image(deep).mode, normalize_image(deep).getpixel((0, 0))) == ("L", 128)
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


def test_transparent_pictures_lie_on_the_background(tmp_path: Path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing")
    for background, expected in (("black", 0), ("#ff0000", 76), ("white", 255)):
        assert load(replace(BARS, source=str(tmp_path), background=background)).images.unique().tolist() == [expected]
    with pytest.raises(UserError, match="data.background: 'rouge' is not a color"):
        replace(BARS, background="rouge")


def test_captions_can_lie_beside_their_pictures(tmp_path: Path, bars_folder: Path):
    expected = load(replace(BARS, source=str(bars_folder)))
    tmp_path = tmp_path / "beside"
    tmp_path.mkdir()
    for line in (bars_folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        (tmp_path / row["file_name"]).write_bytes((bars_folder / row["file_name"]).read_bytes())
        (tmp_path / row["file_name"]).with_suffix(".txt").write_text(f"{row['text']}\n")
    assert as_pairs(load(replace(BARS, source=str(tmp_path)))) == as_pairs(expected)
    with pytest.raises(UserError, match="has no split 'test': no folder test"):
        load(replace(BARS, source=str(tmp_path)), "test")
    victim = next(tmp_path.glob("*.txt"))
    victim.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not valid text .*; expected UTF-8"):
        load(replace(BARS, source=str(tmp_path)))
    victim.unlink()
    with pytest.raises(UserError, match=f"has no caption: there is no {victim.name} beside it"):
        load(replace(BARS, source=str(tmp_path)))


def test_pictures_that_cannot_be_read_are_named_and_left_out_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for i in range(8):
        Image.fromarray(bar(0, i).numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:50])
    (tmp_path / "5.png").write_text("no picture at all")
    data = load_captioned_images(replace(BARS, source=str(tmp_path), max_bad_fraction=0.25))
    assert [data.caption_groups[i][0] for i in data.group_of.tolist()] == [f"number {i}" for i in (0, 1, 2, 4, 6, 7)]
    assert torch.equal(data.images[3, 0], bar(0, 4))
    assert "skipping row 3 of 8" in caplog.text
    assert "no picture that can be read in row 5 of 8" in caplog.text
    with pytest.raises(UserError, match=r"2 of 8 pictures cannot be read, more than data.max_bad_fraction \(0.24\)"):
        load(replace(BARS, source=str(tmp_path), max_bad_fraction=0.24))


def test_pictures_that_are_too_small_are_counted(bars_folder: Path, caplog: pytest.LogCaptureFixture):
    data = load_captioned_images(replace(BARS, source=str(bars_folder), resolution=16))
    assert data.images.shape[2:] == (16, 16)
    assert f"{len(data)} of {len(data)} pictures are smaller than data.resolution (16)" in caplog.text


def test_bytes_survive_the_way_to_the_model_and_back():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert to_model(every).min() == -1
    assert to_model(every).max() == 1
    assert torch.equal(to_bytes(to_model(every)), every)
    assert to_bytes(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"caption_column": "txt"},
            r"data.caption_column: no column 'txt' in .* \(did you mean 'text'\?\); it has 'image', 'text'",
        ),
        ({"image_column": "picture"}, r"data.image_column: no column 'picture' in .*; it has 'image', 'text'"),
        ({"caption_column": "image"}, "data.caption_column: 'image' holds"),
        (
            {"image_column": "text"},
            "data.image_column: 'text' of .*: 6 of 6 pictures cannot be read, .* the first are row 0 of 6",
        ),
        ({"caption_templates": ("a {colour} bar",)}, "asks for 'colour', which data.label_names does not list"),
        ({"caption_templates": ("a {bar:d}",)}, "'a {bar:d}': expected only a word in braces, such as {word}"),
        ({"caption_templates": ("a {bar",)}, "data.caption_templates: 'a {bar'"),
        ({"source": "mnits"}, r"no file or folder mnits \(did you mean 'mnist'\?\)"),
        ({"source": "no/such/folder"}, "data.source: no file or folder no/such/folder"),
        ({"source": __file__}, "is no Parquet file and no tar"),
    ],
)
def test_data_that_does_not_fit_is_one_line(bars_folder: Path, change: dict[str, object], message: str):
    with pytest.raises(UserError, match=message) as caught:
        load(replace(BARS, **{"source": str(bars_folder), **change}))
    assert "\n" not in str(caught.value)


def test_labels_want_templates_and_names(bars_parquet: Path):
    labelled = replace(BARS, source=str(bars_parquet), caption_column="label")
    with pytest.raises(UserError, match=r"holds labels, not text; .*data\.caption_templates="):
        load(labelled)
    short = replace(labelled, caption_templates=("a {word}",), label_names={"word": ["one"]})
    with pytest.raises(UserError, match="no name for the label 1 of column 'label'"):
        load(short)


def test_training_data_is_never_taken_for_a_test_set(bars_parquet: Path):
    for source in (bars_parquet, bars_parquet.parent):
        with pytest.raises(UserError, match="has no split 'test'"):
            load(replace(BARS, source=str(source)), "test")


def test_an_empty_set_and_a_broken_file_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no (examples|pictures)"):
        load(replace(BARS, source=str(tmp_path)))
    write_empty_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="holds no examples"):
        load(replace(BARS, source=str(tmp_path / "x.parquet")))
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="cannot read .*y.parquet"):
        load(replace(BARS, source=str(tmp_path / "y.parquet")))


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="data.source: cannot open someone/pictures: .*network") as caught:
        load(replace(BARS, source="someone/pictures"))
    assert "\n" not in str(caught.value)
