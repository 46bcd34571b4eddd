"""The same pictures from every kind of source are the same data, whole or streamed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import colours
import datasets
import pytest
import torch
from conftest import SIDE, bar, weights
from PIL import Image

from cond_diffusion.config import Config, load_config
from cond_diffusion.data import CaptionedBatch, Places, load_captioned_images, open_captioned_files
from cond_diffusion.data_config import DataConfig
from cond_diffusion.errors import UserError
from cond_diffusion.feed import ShuffledSet, ahead, open_feed
from cond_diffusion.sources import open_source
from cond_diffusion.stream import CaptionedStream
from cond_diffusion.training import train

COUNT = 90
TINY = [
    *("text.max_length=16", "latent.patch_size=2", "unet.channels=[32,32]", "unet.num_groups=8", "sample.steps=3"),
    *("train.batch_size=8", "train.max_steps=3", "train.warmup_steps=1", "train.sample_every=0"),
    "data.shuffle_buffer=20",
]


@pytest.fixture(scope="session")
def colour_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The words that read the colour set from each kind of source."""
    root = tmp_path_factory.mktemp("colours")
    sets = {kind: colours.write(root / kind, kind, COUNT) for kind in colours.KINDS}
    (root / "one_file").mkdir()
    parts = [str(file) for file in sorted((root / "parquet").glob("*.parquet"))]
    joined = datasets.concatenate_datasets([datasets.Dataset.from_parquet(part) for part in parts])
    joined.to_parquet(root / "one_file" / "x.parquet")
    sets["one Parquet file"] = [f"data.source={root / 'one_file' / 'x.parquet'}", *sets["parquet"][1:]]
    return sets


def data_config(words: list[str], **changes: Any) -> DataConfig:
    return replace(load_config(Config, overrides=[*TINY, *words]).data, **changes)


def middle(count: int) -> Places:
    return Places(caption=torch.zeros(count), crop=torch.full((count,), 0.5))


def as_set(batches: list[CaptionedBatch]) -> set[tuple[bytes, str]]:
    return {
        (image.numpy().tobytes(), caption)
        for batch in batches
        for image, caption in zip(batch.images, batch.captions, strict=True)
    }


def test_training_is_the_same_from_every_kind_of_source(colour_sets: dict[str, list[str]], tmp_path: Path):
    """With nothing but config keys changed, and whether the pictures are held in memory or decoded each time."""
    runs = {}
    for kind, words in colour_sets.items():
        for memory in (4, 0):
            run_dir = tmp_path / kind / str(memory)
            overrides = [*TINY, *words, f"data.memory_gb={memory}", f"run_dir={run_dir}"]
            runs[kind, memory] = weights(train(load_config(Config, overrides=overrides)))
    expected = runs.pop(("jsonl", 4))
    assert len(runs) == 13
    for of, found in runs.items():
        assert all(torch.equal(expected[name], found[name]) for name in expected), of


@pytest.mark.parametrize("kind", [*colours.KINDS, "one Parquet file"])
def test_a_stream_shows_every_picture_once_an_epoch_but_those_held_out(colour_sets: dict[str, list[str]], kind: str):
    config = data_config(colour_sets[kind])
    stream = open_feed(replace(config, streaming=True), seed=0, aloud=False)
    all_of_them = ShuffledSet(load_captioned_images(config, progress=False), 0, 0)
    whole = as_set([all_of_them.read(0, middle(COUNT))])
    held_out = stream.held_out(middle(10))
    assert held_out is not None
    apart = as_set([held_out])
    count = COUNT - len(apart)
    epochs = [[stream.read(epoch * count + i, middle(1)) for i in range(count)] for epoch in range(2)]
    for epoch in epochs:
        assert as_set(epoch) == whole - apart
    assert [b.captions for b in epochs[0]] != [b.captions for b in epochs[1]]


def test_a_stream_goes_on_where_it_was_from_any_position(colour_sets: dict[str, list[str]]):
    """Also when it was stopped inside a block, at the end of a shard, or in a later epoch."""
    for kind in ("parquet", "tar", "jsonl", "beside"):
        config = data_config(colour_sets[kind], streaming=True)
        straight = CaptionedStream(config, seed=3)
        expected = [straight.read(i, middle(1)).captions[0] for i in range(250)]
        for stop in (0, 1, 19, 20, 29, 30, 85, 86, 87, 140, 200):
            first = CaptionedStream(config, seed=3)
            if stop:
                first.read(stop - 1, middle(1))
                first.behind = first.state
            second = CaptionedStream(config, seed=3)
            second.resume(first.progress(), stop, same=True)
            assert [second.read(i, middle(1)).captions[0] for i in range(stop, 250)] == expected[stop:], (kind, stop)


def test_two_processes_share_a_stream_without_overlap(colour_sets: dict[str, list[str]]):
    config = data_config(colour_sets["tar"], streaming=True)
    whole = CaptionedStream(config, seed=0).read(0, middle(32)).captions
    streams = [CaptionedStream(config, seed=0) for _ in range(2)]
    shared = [streams[i % 2].read(8 * i, middle(8)).captions for i in range(4)]
    assert [caption for part in shared for caption in part] == whole


def test_a_test_split_of_tars_is_found_by_its_name(colour_sets: dict[str, list[str]], tmp_path: Path):
    colours.write(tmp_path / "set", "tar", 9)
    (tmp_path / "set" / "00002.tar").rename(tmp_path / "set" / "test-00000.tar")
    source = str(tmp_path / "set")
    assert (len(open_source(source, "train")), len(open_source(source, "test"))) == (6, 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"has no split 'validation': no file validation\*\.tar"):
        open_source(source, "validation")


def test_samples_are_held_out_of_a_set_and_never_trained_on(colour_sets: dict[str, list[str]]):
    data = load_captioned_images(data_config(colour_sets["jsonl"]), progress=False)
    feed = ShuffledSet(data, seed=1, held_out=512)
    assert feed.num_held_out == COUNT // 20
    trained_on = set(feed.indices(0, 3 * feed.num_trained_on).tolist())
    assert len(trained_on) == feed.num_trained_on
    batch = feed.held_out(middle(9))
    assert batch is not None
    assert as_set([batch]).isdisjoint(as_set([data.read(torch.tensor(sorted(trained_on)), middle(len(trained_on)))]))
    assert ShuffledSet(data, seed=1, held_out=0).held_out(middle(9)) is None


def test_a_random_crop_shows_every_part_and_a_centre_crop_the_centre(tmp_path: Path):
    wide = Image.new("L", (60, 20))
    wide.paste(128, (20, 0, 40, 20))
    wide.paste(255, (40, 0, 60, 20))
    wide.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("stripes")
    config = DataConfig(str(tmp_path), resolution=20, crop="random")
    files = open_captioned_files(config)
    assert not files.fits_into_memory()
    batch = files.read(torch.zeros(3, dtype=torch.int64), Places(torch.zeros(3), torch.tensor([0.0, 0.5, 1.0])))
    assert [image.float().mean().item() for image in batch.images] == [0, 128, 255]
    assert load_captioned_images(replace(config, crop="center"), progress=False).images.unique().tolist() == [128]


def test_pictures_that_cannot_be_read_are_replaced_while_training_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for i in range(8):
        Image.fromarray(bar(0, i).numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    (tmp_path / "3.png").write_text("no picture at all")
    config = DataConfig(str(tmp_path), resolution=SIDE, max_bad_fraction=0.2)
    everything = torch.arange(8)
    batch = open_captioned_files(config).read(everything, middle(8))
    assert batch.captions == [f"number {i}" for i in (0, 1, 2, 4, 4, 5, 6, 7)]
    assert torch.equal(batch.images[3, 0], bar(0, 4))
    assert "row 3 of 8, counted from 0, " in caplog.text
    with pytest.raises(UserError, match=r"1 of 8 pictures cannot be read, more than data.max_bad_fraction \(0.1\)"):
        open_captioned_files(replace(config, max_bad_fraction=0.1)).read(everything, middle(8))
    stream = CaptionedStream(replace(config, streaming=True), seed=0)
    assert sorted(stream.read(0, middle(8)).captions).count("number 3") == 0


def test_reading_ahead_changes_nothing_and_hands_on_errors():
    def job(i: int) -> int:
        if i == 5:
            raise UserError("five")
        return i * i

    jobs = [lambda i=i: job(i) for i in range(5)]
    assert list(ahead(jobs, 3)) == list(ahead(jobs, 0)) == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match="five"):
        list(ahead([lambda i=i: job(i) for i in range(9)], 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_column": "text"}, r"no column 'text' in .* \(did you mean 'txt'\?\); it has 'png', 'txt'"),
        ({"caption_column": "__key__", "caption_templates": ("a {x}",), "label_names": {"x": ["y"]}}, "no name for"),
        ({"image_column": "__key__"}, "data.image_column: '__key__' of .* pictures .*cannot be read"),
    ],
)
def test_a_stream_that_does_not_fit_is_one_line(
    colour_sets: dict[str, list[str]], change: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message) as caught:
        CaptionedStream(data_config(colour_sets["tar"], streaming=True, **change), seed=0).read(0, middle(4))
    assert "\n" not in str(caught.value)


def test_a_broken_or_an_empty_stream_is_one_line(tmp_path: Path):
    colours.write(tmp_path / "set", "tar", 9)
    victim = tmp_path / "set" / "00001.tar"
    victim.write_bytes(victim.read_bytes()[:700])
    config = DataConfig(str(tmp_path / "set"), True, image_column="png", caption_column="txt", resolution=8, channels=3)
    with pytest.raises(UserError, match="data.source: cannot read .*set: "):
        CaptionedStream(config, seed=0).read(0, middle(9))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [], "text": []}, features=features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="holds no examples"):
        CaptionedStream(DataConfig(str(tmp_path / "x.parquet"), streaming=True), seed=0).read(0, middle(1))


def test_what_a_name_is_taken_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    colours.write(tmp_path / "some" / "pictures", "jsonl", 3)
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    open_source("some/pictures", "train")
    assert "data.source: some/pictures is a folder here and is taken as such, not as a hub id" in caplog.text
    caplog.clear()
    open_source("./some/pictures", "train")
    assert not caplog.text
    open_source("mnist", "test")
    assert "mnist is the built-in set; what lies here by that name is ./mnist" in caplog.text


def test_pictures_without_captions_and_one_picture_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    config = DataConfig(str(tmp_path), resolution=8)
    with pytest.raises(
        UserError, match=r"it has 'image'; captions go into a metadata.jsonl, or into a.txt beside a.png"
    ):
        load_captioned_images(config)
    (tmp_path / "a.txt").write_text("black")
    open_feed(config, seed=0, aloud=True)
    assert "holds one picture; it will be learned by heart" in caplog.text
