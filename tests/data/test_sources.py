"""All kinds of sources give the same data, with random access or streamed."""

import io
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
from hub import DatasetHub, serve
from PIL import Image

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.dataset import CaptionedBatch, RandomDraws, load_captioned_images, open_captioned_files
from cond_diffusion.data.loader import CaptionedStream, ShuffledDataset, open_training_data, prefetch
from cond_diffusion.data.sources import open_source
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
    *("text.encoder=builtin", "text.max_length=16", "latent.patch_size=2", "unet.channels=[32,32]"),
    *("unet.num_groups=8", "sample.steps=3", "train.mixed_precision=no"),
    *("train.batch_size=8", "train.max_steps=3", "train.warmup_steps=1", "train.sample_every=0"),
    *("data.shuffle_buffer=20", "unet.attention=[false,true]", "unet.num_heads=4", "unet.blocks_per_level=1"),
]


@pytest.fixture(scope="session")
def color_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Config overrides that load the color dataset from each kind of source."""
    root = tmp_path_factory.mktemp("colors")
    sets = {kind: colours.write(root / kind, kind, COUNT) for kind in colours.KINDS}
    (root / "one_file").mkdir()
    shards = [str(file) for file in sorted((root / "parquet").glob("*.parquet"))]
    joined = datasets.concatenate_datasets([datasets.Dataset.from_parquet(shard) for shard in shards])
    joined.to_parquet(root / "one_file" / "x.parquet")
    sets["one Parquet file"] = [f"data.source={root / 'one_file' / 'x.parquet'}", *sets["parquet"][1:]]
    return sets


def data_config(overrides: list[str], **changes: Any) -> DataConfig:
    return replace(load_config(Config, overrides=[*TINY, *overrides]).data, **changes)


def as_set(batches: list[CaptionedBatch]) -> set[tuple[bytes, str]]:
    return {
        (image.numpy().tobytes(), caption)
        for batch in batches
        for image, caption in zip(batch.images, batch.captions, strict=True)
    }


# `datasets` does not close the CSV file.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_training_gives_the_same_weights_from_every_kind_of_source(color_sets: dict[str, list[str]], tmp_path: Path):
    """With images in memory, and with images that are decoded on each access."""
    read, trained = {}, {}
    for kind, source in color_sets.items():
        for memory in (4, 0):
            config = load_config(
                Config, overrides=[*TINY, *source, f"data.memory_gb={memory}", f"run_dir={tmp_path / kind}{memory}"]
            )
            data = open_training_data(config.data, config.seed)
            batches = [data.read(0, RandomDraws.fixed(24)), data.held_out(4)]
            read[kind, memory] = [(batch.images.tolist(), batch.captions) for batch in batches if batch is not None]
            if kind in ("jsonl", "tar"):  # the weights are a function of these batches
                trained[kind, memory] = weights(train(config))
    assert len(read) == 14
    for run, found in read.items():
        assert len(found) == 2
        assert found == read["jsonl", 4], run
    expected = trained["jsonl", 4]
    for run, found in trained.items():
        assert all(torch.equal(expected[name], found[name]) for name in expected), run


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_training_gives_the_same_weights_from_the_hub(
    color_sets: dict[str, list[str]], tmp_path: Path, streaming: bool
):
    """Uses a local server, and a separate process because the libraries read the address of the Hub on import."""
    source, *columns = color_sets["parquet"]
    overrides = [*TINY, *columns, f"data.streaming={streaming}"]
    config = load_config(
        Config, ROOT / "configs" / "folder.yaml", [*overrides, source, f"run_dir={tmp_path / 'local'}"]
    )
    expected = weights(train(config))
    with serve(partial(DatasetHub, Path(source.removeprefix("data.source=")))) as address:
        overrides += ["data.source=someone/pictures", f"run_dir={tmp_path / 'hub'}"]
        result = subprocess.run(
            [sys.executable, "train.py", "--config", "configs/folder.yaml", *overrides],
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
def test_an_epoch_of_a_stream_has_every_image_once_except_held_out_ones(color_sets: dict[str, list[str]], kind: str):
    config = data_config(color_sets[kind])
    stream = open_training_data(replace(config, streaming=True), seed=0)
    dataset = ShuffledDataset(load_captioned_images(config), 0, 0)
    all_samples = as_set([dataset.read(0, RandomDraws.fixed(COUNT))])
    held_out_batch = stream.held_out(10)
    assert held_out_batch is not None
    held_out = as_set([held_out_batch])
    count = COUNT - len(held_out)
    epochs = [[stream.read(epoch * count + i, RandomDraws.fixed(1)) for i in range(count)] for epoch in range(2)]
    for epoch in epochs:
        assert as_set(epoch) == all_samples - held_out
    assert [b.captions for b in epochs[0]] != [b.captions for b in epochs[1]]


@pytest.mark.slow
def test_a_stream_resumes_at_any_position(color_sets: dict[str, list[str]]):
    """Also inside a block, at the end of a shard, and in a later epoch."""
    for kind in ("parquet", "tar"):
        config = data_config(color_sets[kind], streaming=True)
        uninterrupted = CaptionedStream(config, seed=3)
        expected = [uninterrupted.read(i, RandomDraws.fixed(1)).captions[0] for i in range(130)]
        for stop in (0, 1, 20, 29, 30, 85, 86, 87, 115) if kind == "parquet" else (1, 30, 86, 115):
            first = CaptionedStream(config, seed=3)
            if stop:
                first.read(stop - 1, RandomDraws.fixed(1))
                first.last_consumed_state = first.state
            second = CaptionedStream(config, seed=3)
            second.resume(first.progress(), stop, same=True)
            assert [second.read(i, RandomDraws.fixed(1)).captions[0] for i in range(stop, 130)] == expected[stop:], (
                kind,
                stop,
            )


def test_two_processes_read_disjoint_parts_of_a_stream(color_sets: dict[str, list[str]]):
    config = data_config(color_sets["tar"], streaming=True)
    whole = CaptionedStream(config, seed=0).read(0, RandomDraws.fixed(32)).captions
    streams = [CaptionedStream(config, seed=0) for _ in range(2)]
    shared = [streams[i % 2].read(8 * i, RandomDraws.fixed(8)).captions for i in range(4)]
    assert [caption for part in shared for caption in part] == whole


def test_splits_are_found_by_the_names_of_files_and_folders(color_sets: dict[str, list[str]], tmp_path: Path):
    colours.write(tmp_path / "set", "tar", 9)
    (tmp_path / "set" / "00002.tar").rename(tmp_path / "set" / "test-00000.tar")
    source = str(tmp_path / "set")
    assert (len(open_source(source, "train")), len(open_source(source, "test"))) == (6, 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^data\.source: .*/set .*'validation'.*validation\*\.tar"):
        open_source(source, "validation")
    for split in ("train", "test"):  # in separate folders, with file names that do not contain the split
        colours.write(tmp_path / "folders" / split, "parquet", {"train": 6, "test": 3}[split])
        for number, file in enumerate(sorted((tmp_path / "folders" / split).iterdir())):
            file.rename(file.with_name(f"{number}.parquet"))
    splits = [open_source(str(tmp_path / "folders"), split) for split in ("train", "test")]
    assert [len(split) for split in splits] == [6, 3]  # type: ignore[arg-type]


def test_held_out_samples_of_a_dataset_are_never_trained_on(color_sets: dict[str, list[str]]):
    data = load_captioned_images(data_config(color_sets["jsonl"]))
    training_data = ShuffledDataset(data, seed=1, held_out=512)
    assert training_data.num_held_out == COUNT // 20
    trained_on = set(training_data.indices(0, 3 * training_data.num_trained_on).tolist())
    assert len(trained_on) == training_data.num_trained_on
    batch = training_data.held_out(9)
    assert batch is not None
    assert as_set([batch]).isdisjoint(
        as_set([data.read(lambda _: torch.tensor(sorted(trained_on)), RandomDraws.fixed(len(trained_on)))])
    )
    assert ShuffledDataset(data, seed=1, held_out=0).held_out(9) is None


def test_crops_are_taken_at_the_drawn_position_or_the_center(tmp_path: Path):
    wide = Image.new("L", (60, 20))
    wide.paste(128, (20, 0, 40, 20))
    wide.paste(255, (40, 0, 60, 20))
    wide.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("stripes", encoding="utf-8")
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
    """Forty images, one of which is unreadable."""
    for i in range(40):
        Image.fromarray(bar(0, i).numpy()).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"number {i}", encoding="utf-8")
    (tmp_path / "03.png").write_text("not an image", encoding="utf-8")
    return DataConfig(str(tmp_path), resolution=SIDE, max_bad_fraction=1 / 40, held_out=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreadable_image_is_replaced_by_the_same_one_for_any_number_of_processes(
    one_bad: DataConfig, caplog: pytest.LogCaptureFixture, streaming: bool
):
    config = replace(one_bad, streaming=streaming)

    def training_data() -> Any:
        return CaptionedStream(config, 0) if streaming else ShuffledDataset(open_captioned_files(config), 0, 0)

    whole = training_data().read(0, RandomDraws.fixed(80)).captions
    one_by_one = training_data()
    assert [one_by_one.read(i, RandomDraws.fixed(1)).captions[0] for i in range(80)] == whole
    assert "number 3" not in whole
    for epoch in (whole[:40], whole[40:]):
        assert len(set(epoch)) == 39
    warnings = [line for line in caplog.messages if "03.png (cannot identify image file" in line]
    assert len(warnings) >= 2


def test_too_many_unreadable_images_are_an_error_and_each_image_counts_once(one_bad: DataConfig):
    files = open_captioned_files(one_bad)
    for _ in range(5):
        files.read(lambda attempt: torch.tensor([3 + attempt, 4]), RandomDraws.fixed(2))
    assert len(files.decoder.bad) == 1
    none_allowed = open_captioned_files(replace(one_bad, max_bad_fraction=0.02))
    with pytest.raises(UserError, match=r"^data\.image_column: 'image' .*: 1 of 40 .*max_bad_fraction \(0\.02\)"):
        none_allowed.read(lambda attempt: torch.tensor([3 + attempt]), RandomDraws.fixed(1))
    for file in Path(one_bad.source).glob("*.png"):
        file.write_text("not an image", encoding="utf-8")
    all_allowed = replace(one_bad, max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"^data\.image_column: 'image' of .*: none of the 40 "):
        ShuffledDataset(open_captioned_files(all_allowed), 0, 0).read(0, RandomDraws.fixed(3))
    with pytest.raises(UserError, match=r"^data\.image_column: 'image' of .*: none of the 40 "):
        load_captioned_images(all_allowed)
    with pytest.raises(UserError, match=r"^data\.image_column: 'image' of .*data\.max_bad_fraction \(0\.0\)"):
        CaptionedStream(replace(all_allowed, streaming=True, max_bad_fraction=0.0), 0).read(0, RandomDraws.fixed(3))


def test_held_out_images_of_which_none_can_be_read_are_an_error(one_bad: DataConfig):
    files = open_captioned_files(replace(one_bad, max_bad_fraction=0.1))
    data = ShuffledDataset(files, 0, held_out=2)
    for row in data.held_out_indices().tolist():
        Path(files.files[row]["image"]["path"]).write_text("not an image", encoding="utf-8")
    with pytest.raises(UserError, match=r"none of the 40 images, or none held out, can be read"):
        data.held_out(4)


def test_file_names_do_not_select_splits_of_image_folders(tmp_path: Path):
    """`datasets` infers splits from some words in file names."""
    names = ["car", "red_train", "test_b", "val_c", "x[1]"]
    lines = []
    (tmp_path / "set [a]").mkdir()
    for i, name in enumerate(names):
        Image.fromarray(bar(0, i).numpy()).save(tmp_path / "set [a]" / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": name}))
    (tmp_path / "set [a]" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "set [a]" / "backup.tar").write_bytes(b"unrelated")
    data = load_captioned_images(DataConfig(str(tmp_path / "set [a]"), resolution=SIDE))
    assert sorted(caption for (caption,) in data.caption_groups) == sorted(names)
    with pytest.raises(UserError, match=r"^data\.source: .*'test'"):
        open_source(str(tmp_path / "set [a]"), "test")


def test_flip_mirrors_half_of_the_images_at_random(tmp_path: Path):
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, :4] = 255
    for i in range(30):
        Image.fromarray(half).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("half", encoding="utf-8")
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


def test_prefetch_preserves_results_and_propagates_errors():
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
    assert all(event.wait(10) for event in begun[:3])  # the next two are computed while the first result is in use
    with pytest.raises(UserError, match="five"):
        list(results)


def test_a_stream_of_other_data_begins_at_its_first_row_whatever_the_position(color_sets: dict[str, list[str]]):
    config, rows = data_config(color_sets["tar"], streaming=True), RandomDraws.fixed(30)
    stream = CaptionedStream(config, seed=3)
    expected = stream.read(0, rows).captions
    assert stream.read(30, rows).captions != expected
    again = CaptionedStream(config, seed=3)
    again.resume(stream.progress(), 48, same=False)
    assert again.read(48, rows).captions == expected


@pytest.mark.slow
def test_a_stream_restarts_if_its_files_have_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    colours.write(tmp_path / "set", "tar", 60)
    source = [f"data.source={tmp_path / 'set'}", "data.streaming=true", *colours.TAR_COLUMNS, "data.shuffle_buffer=10"]
    config = load_config(Config, overrides=[*TINY, *source, f"run_dir={tmp_path / 'run'}"])
    train(replace(config, train=replace(config.train, max_steps=2)))
    (tmp_path / "set" / "00002.tar").unlink()
    train(replace(config, resume=True))
    assert any(message.startswith("resume: ") and "'shards': " in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_column": "text"}, r"^data\.caption_column: .*'text' .* \(did you mean 'txt'\?\); .*'png'"),
        (
            {"caption_column": "__key__", "caption_templates": ("a {x}",), "label_names": {"x": ["y"]}},
            r"^data\..*label_names: ",
        ),
        ({"image_column": "__key__"}, r"^data\.image_column: '__key__' of "),
    ],
)
def test_an_invalid_stream_is_refused_in_one_line(
    color_sets: dict[str, list[str]], change: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message) as caught:
        CaptionedStream(data_config(color_sets["tar"], streaming=True, **change), seed=0).read(0, RandomDraws.fixed(4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_numbers_and_an_invalid_tar_are_refused(tmp_path: Path, streaming: bool):
    numbers = {"image": [1, 2], "text": ["one", "two"]}
    datasets.Dataset.from_dict(numbers).to_parquet(tmp_path / "x.parquet")
    config = DataConfig(str(tmp_path / "x.parquet"), streaming=streaming)
    with pytest.raises(UserError, match=r"^data\.image_column: 'image' of .*int64"):
        open_training_data(config, 0)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"not a tar file")
    with pytest.raises(UserError, match=r"^data\.source: .*/tars "):
        open_training_data(replace(config, source=str(tmp_path / "tars")), 0)


def test_a_damaged_and_an_empty_stream_are_refused(tmp_path: Path):
    colours.write(tmp_path / "set", "tar", 9)
    victim = tmp_path / "set" / "00001.tar"
    victim.write_bytes(victim.read_bytes()[:700])
    config = DataConfig(str(tmp_path / "set"), True, image_column="png", caption_column="txt", resolution=8, channels=3)
    with pytest.raises(UserError, match=r"^data\.source: .*/set\b"):
        CaptionedStream(config, seed=0).read(0, RandomDraws.fixed(9))
    write_empty_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"^data\.source: .*/x\.parquet "):
        CaptionedStream(DataConfig(str(tmp_path / "x.parquet"), streaming=True), seed=0).read(0, RandomDraws.fixed(1))


def test_ambiguous_sources_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    colours.write(tmp_path / "some" / "pictures", "jsonl", 3)
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    open_source("some/pictures", "train")
    assert [message[:27] for message in caplog.messages] == ["data.source: some/pictures "]
    caplog.clear()
    open_source("./some/pictures", "train")
    assert not caplog.text
    open_source("mnist", "test")
    assert [message.startswith("data.source: ") and "./mnist" in message for message in caplog.messages] == [True]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^data\.source: someone/pictures-v1\.5: "):
        open_source("someone/pictures-v1.5", "train")


def test_images_without_captions_are_refused_and_a_single_image_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    config = DataConfig(str(tmp_path), resolution=8)
    with pytest.raises(UserError, match=r"^data\.caption_column: .*'text' .*'image'.*metadata\.jsonl.*a\.txt"):
        load_captioned_images(config)
    (tmp_path / "a.txt").write_text("black", encoding="utf-8")
    open_training_data(config, seed=0)
    assert [message.startswith(f"data.source: {tmp_path} ") for message in caplog.messages] == [True]


def test_a_dataset_from_python_gives_its_images_and_captions():
    arrays = [np.full((8, 8), value, dtype=np.uint8) for value in (10, 200)]
    images = [Image.fromarray(arrays[0]), arrays[1]]
    config = DataConfig(source="x", resolution=8, image_column="image", caption_column="text")
    for captions, groups in ((["a", "b"], (("a",), ("b",))), ([["a"], ["b", "c"]], (("a",), ("b", "c")))):
        table = datasets.Dataset.from_dict({"image": images, "text": captions}).cast_column("image", datasets.Image())
        for dataset in (list(zip(images, captions, strict=True)), table):
            data = open_captioned_files(config, dataset=dataset).in_memory()
            assert np.array_equal(data.images[:, 0].numpy(), arrays)
            assert [data.caption_groups[group] for group in data.group_of.tolist()] == [*groups]


def test_pillow_images_are_trained_on_as_they_are_in_memory(tmp_path: Path):
    """Those that were changed after they were opened, have an orientation but no file, or a transparent palette."""
    Image.new("L", (8, 8), 10).save(tmp_path / "a.png")
    untouched, changed = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "a.png")
    changed.paste(200, (0, 0, 8, 8))
    frames = [Image.new("L", (8, 8), value) for value in (30, 220)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    second = Image.open(tmp_path / "film.gif")
    second.seek(1)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    halves = Image.new("L", (8, 8))
    halves.paste(255, (0, 0, 8, 4))
    halves.save(file, "JPEG", exif=exif, quality=100)
    clear = Image.new("P", (4, 4))
    clear.info["transparency"] = 0
    images = [untouched, changed, second, Image.open(file), clear.resize((8, 8))]
    config = DataConfig(source="x", resolution=8, image_column="image", caption_column="text", background="white")
    data = open_captioned_files(config, dataset=[(image, "a") for image in images]).in_memory()
    assert [image.float().mean().item() for image in data.images[[0, 1, 2, 4]]] == [10, 200, 220, 255]
    assert data.images[3, 0, :4].max() < 20
    assert data.images[3, 0, 4:].min() > 235


def test_unreadable_images_do_not_change_what_the_others_are_used_for(one_bad: DataConfig):
    """In memory, where they are left out, and on disk."""
    files = open_captioned_files(replace(one_bad, max_bad_fraction=1.0))
    for row in (5, 20, 33):
        Path(files.files[row]["image"]["path"]).write_text("not an image", encoding="utf-8")
    on_disk, in_memory = ShuffledDataset(files, 0, 512), ShuffledDataset(files.in_memory(), 0, 512)
    assert (len(files.in_memory()), on_disk.num_held_out) == (36, 2)

    def captions(data: ShuffledDataset, indices: torch.Tensor) -> set[str]:
        return {data.data.caption_groups[group][0] for group in data.data.group_of[indices].tolist()}

    unreadable = {f"number {i}" for i in (3, 5, 20, 33)}
    disk, memory = (
        [captions(data, data.held_out_indices()), captions(data, data.indices(0, data.num_trained_on))]
        for data in (on_disk, in_memory)
    )
    assert [kind - unreadable for kind in disk] == memory
    assert len(memory[0] | memory[1]) == 36


def test_rows_of_a_dataset_that_were_selected_shuffled_or_formatted_keep_their_captions():
    values = range(0, 240, 10)
    images = [Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in values]
    table = datasets.Dataset.from_dict({"image": images, "text": [*map(str, values)]})
    table = table.cast_column("image", datasets.Image())
    config = DataConfig(source="x", resolution=8, image_column="image", caption_column="text")
    for dataset, count in (
        (table.select([5, 1, 3]), 3),
        (table.shuffle(seed=0), 24),
        (table.train_test_split(test_size=6, seed=0)["test"], 6),
        (table.sort("text"), 24),
        (table.with_format("torch"), 24),
        (table.with_transform(lambda rows: {"image": rows["image"][::-1], "text": rows["text"]}), 24),
    ):
        data = open_captioned_files(config, dataset=dataset).in_memory()
        captions = [data.caption_groups[group][0] for group in data.group_of.tolist()]
        assert captions == [str(image.max().item()) for image in data.images]
        assert len({*captions}) == count


IMAGE = np.zeros((8, 8), dtype=np.uint8)


@pytest.mark.parametrize("item", [7, "a", (IMAGE, "a", "b"), (7, "a"), (IMAGE, ["a", 3]), (IMAGE, "\ud800")])
def test_an_item_that_is_not_a_pair_is_refused(item: object):
    with pytest.raises(UserError, match=r"^dataset: item 1 "):
        open_captioned_files(DataConfig(source="x"), dataset=[(IMAGE, "a"), item])


def test_captions_of_several_types_are_refused():
    with pytest.raises(UserError, match=r"^dataset: the captions have several types .*; expected text"):
        open_captioned_files(DataConfig(source="x"), dataset=[(IMAGE, "a"), (IMAGE, 5)])
