"""The same pictures from every kind of source are the same data, whole or streamed."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import colours
import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SIDE, bar, weights, write_empty_parquet
from hub import hub
from PIL import Image

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.dataset import CaptionedBatch, RandomDraws, load_captioned_images, open_captioned_files
from cond_diffusion.data.loader import ShuffledDataset, open_training_data, prefetch
from cond_diffusion.data.sources import open_source
from cond_diffusion.data.stream import CaptionedStream
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError
from cond_diffusion.models.latents import PixelPatchify
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.pipeline.run_folder import checkpoints
from cond_diffusion.training.batches import Batches
from cond_diffusion.training.trainer import train

COUNT = 90
TINY = [
    *("text.max_length=16", "latent.patch_size=2", "unet.channels=[32,32]", "unet.num_groups=8", "sample.steps=3"),
    *("train.batch_size=8", "train.max_steps=3", "train.warmup_steps=1", "train.sample_every=0"),
    *("data.shuffle_buffer=20", "unet.attention=[false,true]", "unet.num_heads=4", "unet.blocks_per_level=1"),
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


def middle(count: int) -> RandomDraws:
    return RandomDraws(caption=torch.zeros(count), crop=torch.full((count,), 0.5))


def as_set(batches: list[CaptionedBatch]) -> set[tuple[bytes, str]]:
    return {
        (image.numpy().tobytes(), caption)
        for batch in batches
        for image, caption in zip(batch.images, batch.captions, strict=True)
    }


# The library leaves the CSV file for the garbage collector to close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
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


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_training_is_the_same_from_a_hub(colour_sets: dict[str, list[str]], tmp_path: Path, streaming: bool):
    """From a stand-in on this machine. In a process of its own: the libraries read the hub's address at once."""
    source, *columns = (word for word in colour_sets["parquet"])
    words = [*TINY, *columns, f"data.streaming={streaming}"]
    config = load_config(Config, ROOT / "configs" / "folder.yaml", [*words, source, f"run_dir={tmp_path / 'here'}"])
    expected = weights(train(config))
    with hub(Path(source.removeprefix("data.source="))) as address:
        words += ["data.source=someone/pictures", f"run_dir={tmp_path / 'hub'}"]
        result = subprocess.run(
            [sys.executable, "train.py", "--config", "configs/folder.yaml", *words],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    found = weights(checkpoints(tmp_path / "hub")[-1])
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", [*colours.KINDS, "one Parquet file"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")  # CSV
def test_a_stream_shows_every_picture_once_an_epoch_but_those_held_out(colour_sets: dict[str, list[str]], kind: str):
    config = data_config(colour_sets[kind])
    stream = open_training_data(replace(config, streaming=True), seed=0)
    all_of_them = ShuffledDataset(load_captioned_images(config), 0, 0)
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
    for kind in ("parquet", "tar"):
        config = data_config(colour_sets[kind], streaming=True)
        straight = CaptionedStream(config, seed=3)
        expected = [straight.read(i, middle(1)).captions[0] for i in range(130)]
        for stop in (0, 1, 20, 29, 30, 85, 86, 87, 115):
            first = CaptionedStream(config, seed=3)
            if stop:
                first.read(stop - 1, middle(1))
                first.last_consumed_state = first.state
            second = CaptionedStream(config, seed=3)
            second.resume(first.progress(), stop, same=True)
            assert [second.read(i, middle(1)).captions[0] for i in range(stop, 130)] == expected[stop:], (kind, stop)


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
    for split in ("train", "test"):  # each in a folder of its own, under names that say nothing
        colours.write(tmp_path / "folders" / split, "parquet", {"train": 6, "test": 3}[split])
        for number, file in enumerate(sorted((tmp_path / "folders" / split).iterdir())):
            file.rename(file.with_name(f"{number}.parquet"))
    found = [open_source(str(tmp_path / "folders"), split) for split in ("train", "test")]
    assert [len(of_split) for of_split in found] == [6, 3]  # type: ignore[arg-type]


def test_samples_are_held_out_of_a_set_and_never_trained_on(colour_sets: dict[str, list[str]]):
    data = load_captioned_images(data_config(colour_sets["jsonl"]))
    training_data = ShuffledDataset(data, seed=1, held_out=512)
    assert training_data.num_held_out == COUNT // 20
    trained_on = set(training_data.indices(0, 3 * training_data.num_trained_on).tolist())
    assert len(trained_on) == training_data.num_trained_on
    batch = training_data.held_out(middle(9))
    assert batch is not None
    assert as_set([batch]).isdisjoint(
        as_set([data.read(lambda _: torch.tensor(sorted(trained_on)), middle(len(trained_on)))])
    )
    assert ShuffledDataset(data, seed=1, held_out=0).held_out(middle(9)) is None


def test_a_random_crop_shows_every_part_and_a_centre_crop_the_centre(tmp_path: Path):
    wide = Image.new("L", (60, 20))
    wide.paste(128, (20, 0, 40, 20))
    wide.paste(255, (40, 0, 60, 20))
    wide.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("stripes")
    config = DataConfig(str(tmp_path), resolution=20, crop="random")
    files = open_captioned_files(config)
    assert not files.fits_into_memory()
    batch = files.read(
        lambda _: torch.zeros(3, dtype=torch.int64), RandomDraws(torch.zeros(3), torch.tensor([0.0, 0.5, 1.0]))
    )
    assert [image.float().mean().item() for image in batch.images] == [0, 128, 255]
    assert load_captioned_images(replace(config, crop="center")).images.unique().tolist() == [128]


@pytest.fixture
def one_bad(tmp_path: Path) -> DataConfig:
    """Forty pictures, one of which is none."""
    for i in range(40):
        Image.fromarray(bar(0, i).numpy()).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"number {i}")
    (tmp_path / "03.png").write_text("no picture at all")
    return DataConfig(str(tmp_path), resolution=SIDE, max_bad_fraction=1 / 40, held_out=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_picture_that_cannot_be_read_is_replaced_by_the_next_however_a_step_is_shared_out(
    one_bad: DataConfig, caplog: pytest.LogCaptureFixture, streaming: bool
):
    config = replace(one_bad, streaming=streaming)

    def training_data() -> Any:
        return CaptionedStream(config, 0) if streaming else ShuffledDataset(open_captioned_files(config), 0, 0)

    whole = training_data().read(0, middle(80)).captions
    one_by_one = training_data()
    assert [one_by_one.read(i, middle(1)).captions[0] for i in range(80)] == whole
    assert "number 3" not in whole
    for epoch in (whole[:40], whole[40:]):
        assert len(set(epoch)) == 39
    warnings = [line for line in caplog.messages if "03.png (cannot identify image file" in line]
    assert len(warnings) >= 2


def test_too_many_pictures_that_cannot_be_read_end_the_run_but_one_counts_once(one_bad: DataConfig):
    files = open_captioned_files(one_bad)
    for _ in range(5):
        files.read(lambda attempt: torch.tensor([3 + attempt, 4]), middle(2))
    assert len(files.decoder.bad) == 1
    none_allowed = open_captioned_files(replace(one_bad, max_bad_fraction=0.02))
    with pytest.raises(UserError, match=r"1 of 40 pictures cannot be read, more than data.max_bad_fraction \(0.02\)"):
        none_allowed.read(lambda attempt: torch.tensor([3 + attempt]), middle(1))
    for file in Path(one_bad.source).glob("*.png"):
        file.write_text("no picture at all")
    all_allowed = replace(one_bad, max_bad_fraction=1.0)
    with pytest.raises(UserError, match="none of the 40 pictures can be read"):
        ShuffledDataset(open_captioned_files(all_allowed), 0, 0).read(0, middle(3))
    with pytest.raises(UserError, match="none of the 40 pictures can be read"):
        load_captioned_images(all_allowed)
    with pytest.raises(UserError, match="cannot be read"):
        CaptionedStream(replace(all_allowed, streaming=True, max_bad_fraction=0.0), 0).read(0, middle(3))


def test_names_of_files_mean_nothing(tmp_path: Path):
    """`datasets` would take some words in them for splits."""
    names = ["car", "red_train", "test_b", "val_c", "x[1]"]
    lines = []
    (tmp_path / "set [a]").mkdir()
    for i, name in enumerate(names):
        Image.fromarray(bar(0, i).numpy()).save(tmp_path / "set [a]" / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": name}))
    (tmp_path / "set [a]" / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "set [a]" / "backup.tar").write_bytes(b"in the way")
    data = load_captioned_images(DataConfig(str(tmp_path / "set [a]"), resolution=SIDE))
    assert sorted(caption for (caption,) in data.caption_groups) == sorted(names)
    with pytest.raises(UserError, match="has no split 'test': no folder test"):
        open_source(str(tmp_path / "set [a]"), "test")


def test_half_of_the_pictures_are_mirrored_others_each_time(tmp_path: Path):
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, :4] = 255
    for i in range(30):
        Image.fromarray(half).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("half")
    overrides = [*TINY, f"data.source={tmp_path}", "data.resolution=8", "data.held_out=0", "train.batch_size=30"]
    mirrored = []
    for flip in (False, True):
        config = load_config(Config, overrides=[*overrides, "latent.patch_size=1", f"data.flip={flip}"])
        training_data, encoder = open_training_data(config.data, 0), TextEncoder.from_pretrained("builtin", 16)
        objective = Objective(config.objective, NoiseSchedule(config.schedule))
        batches = Batches(config, training_data, encoder, objective, Accelerator(cpu=True), 0, PixelPatchify(1))
        steps = [next(batches.next_step()).x_0 for _ in range(20)]
        mirrored.append(torch.stack([x_0[:, 0, 0, 0] == -1 for x_0 in steps]))
    assert not mirrored[0].any()
    assert mirrored[1].float().mean().item() == pytest.approx(0.5, abs=4 * (0.25 / 600) ** 0.5)
    assert not torch.equal(mirrored[1][0], mirrored[1][1])


def test_reading_ahead_changes_nothing_and_hands_on_errors():
    begun = [threading.Event() for _ in range(9)]

    def job(i: int) -> int:
        begun[i].set()
        if i == 5:
            raise UserError("five")
        return i * i

    jobs = [partial(job, i) for i in range(9)]
    assert list(prefetch(jobs[:5], 3)) == list(prefetch(jobs[:5], 0)) == [0, 1, 4, 9, 16]
    for event in begun:
        event.clear()
    results = prefetch(jobs, 2)
    assert next(results) == 0
    assert all(event.wait(10) for event in begun[:3])  # while the first result is in use, the next two are made
    with pytest.raises(UserError, match="five"):
        list(results)


def test_a_stream_whose_files_have_changed_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    colours.write(tmp_path / "set", "tar", 60)
    words = [f"data.source={tmp_path / 'set'}", "data.streaming=true", *colours.TAR_COLUMNS, "data.shuffle_buffer=10"]
    config = load_config(Config, overrides=[*TINY, *words, f"run_dir={tmp_path / 'run'}"])
    train(replace(config, train=replace(config.train, max_steps=2)))
    (tmp_path / "set" / "00002.tar").unlink()
    train(replace(config, resume=True))
    assert "resume: the data changed: " in caplog.text


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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_numbers_holds_no_pictures_and_a_first_tar_that_is_none_is_one_line(
    tmp_path: Path, streaming: bool
):
    numbers = {"image": [1, 2], "text": ["one", "two"]}
    datasets.Dataset.from_dict(numbers).to_parquet(tmp_path / "x.parquet")
    config = DataConfig(str(tmp_path / "x.parquet"), streaming=streaming)
    with pytest.raises(UserError, match="'image' of .* holds no pictures .it holds values of type int64"):
        open_training_data(config, 0)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"no tar at all")
    with pytest.raises(UserError, match="data.source: cannot read .*tars"):
        open_training_data(replace(config, source=str(tmp_path / "tars")), 0)


def test_a_broken_or_an_empty_stream_is_one_line(tmp_path: Path):
    colours.write(tmp_path / "set", "tar", 9)
    victim = tmp_path / "set" / "00001.tar"
    victim.write_bytes(victim.read_bytes()[:700])
    config = DataConfig(str(tmp_path / "set"), True, image_column="png", caption_column="txt", resolution=8, channels=3)
    with pytest.raises(UserError, match="data.source: cannot read .*set: "):
        CaptionedStream(config, seed=0).read(0, middle(9))
    write_empty_parquet(tmp_path / "x.parquet")
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
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot open someone/pictures-v1.5: .*as a hub id it cannot be fetched"):
        open_source("someone/pictures-v1.5", "train")


def test_pictures_without_captions_and_one_picture_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    config = DataConfig(str(tmp_path), resolution=8)
    with pytest.raises(
        UserError, match=r"it has 'image'; captions go into a metadata.jsonl, or into a.txt beside a.png"
    ):
        load_captioned_images(config)
    (tmp_path / "a.txt").write_text("black")
    open_training_data(config, seed=0)
    assert "holds one picture; it will be learned by heart" in caplog.text
