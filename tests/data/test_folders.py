"""Folders, tars and Parquet files as users have them: read correctly, or refused by name."""

import io
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import Config
from cond_diffusion.data.cache import cached_shards
from cond_diffusion.data.dataset import load_captioned_images, open_captioned_files
from cond_diffusion.data.loader import CaptionedStream, RandomDraws, open_training_data
from cond_diffusion.data.sources import open_source
from cond_diffusion.errors import UserError
from cond_diffusion.hub import download


def write_image(file: Path, value: int = 200) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value,) * 3).save(file)


def write_pairs(folder: Path, count: int = 3) -> Path:
    for i in range(count):
        write_image(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"caption {i}", encoding="utf-8")
    return folder


def write_metadata(folder: Path, count: int = 3) -> Path:
    for i in range(count):
        write_image(folder / f"{i:03}.png")
    lines = [json.dumps({"file_name": f"{i:03}.png", "text": f"caption {i}"}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_tar(file: Path, count: int, caption: Callable[[int], bytes] = lambda i: b"caption %d" % i) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for i in range(count):
            image = io.BytesIO()
            Image.new("RGB", (16, 16), (i,) * 3).save(image, "PNG")
            for suffix, content in (("png", image.getvalue()), ("txt", caption(i))):
                member = tarfile.TarInfo(f"{i:05}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def captions_of(folder: Path, **options: object) -> list[str]:
    config = DataConfig(source=str(folder), resolution=8, channels=3, **options)  # type: ignore[arg-type]
    data = load_captioned_images(config)
    return sorted(data.caption_groups[group][0] for group in data.group_of.tolist())


PAIRS = ["caption 0", "caption 1", "caption 2"]
TAR = {"image_column": "png", "caption_column": "txt"}


@pytest.mark.parametrize(
    "hidden", ["._000.png", "._000.txt", "__MACOSX/._000.png", ".ipynb_checkpoints/000-checkpoint.png", ".DS_Store"]
)
def test_hidden_files_are_skipped(tmp_path: Path, hidden: str):
    file = write_pairs(tmp_path) / hidden
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"\x00\x05\x16\x07\xff")
    assert captions_of(tmp_path) == PAIRS


@pytest.mark.parametrize("metadata", [False, True])
def test_links_to_folders_are_followed_and_cycles_are_not(tmp_path: Path, metadata: bool):
    target, folder = tmp_path / "target", tmp_path / "folder"
    if metadata:
        for i in range(3):
            write_image(target / f"{i}.png")
        lines = [f'{{"file_name": "{i}.png", "text": "caption {i}"}}\n' for i in range(3)]
        (target / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    else:
        write_pairs(target)
    folder.mkdir()
    (folder / "link").symlink_to(target)
    (folder / "cycle").symlink_to(folder)
    assert captions_of(folder) == PAIRS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_and_a_link_to_it_are_read_once(tmp_path: Path, streaming: bool):
    write_metadata(tmp_path / "set" / "images", 3)
    (tmp_path / "set" / "a link").symlink_to(tmp_path / "set" / "images")
    rows = [*open_source(str(tmp_path / "set"), "train", streaming=streaming)]
    assert len(rows) == 3


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    write_pairs(tmp_path / "a")
    write_pairs(tmp_path / "b")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert captions_of(tmp_path) == PAIRS
    assert re.search(r"skipping .*/b, which cannot be read \(Permission denied\)", caplog.text)


def test_rows_of_the_same_image_are_joined(tmp_path: Path):
    lines = []
    for i in range(30):
        write_image(tmp_path / f"{i}.png", i)
        lines += [json.dumps({"file_name": f"{i}.png", "text": f"caption {k} of {i}"}) for k in (0, 1, 0)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = DataConfig(source=str(tmp_path), resolution=16, channels=1)
    data = load_captioned_images(config)
    groups = {image.max().item(): data.caption_groups[data.group_of[i]] for i, image in enumerate(data.images)}
    assert len(data) == 30
    assert groups == {i: (f"caption 0 of {i}", f"caption 1 of {i}") for i in range(30)}
    training = open_training_data(replace(config, held_out=1), 0)
    assert training.num_images == 30
    (held_out,) = training.held_out(1).images
    trained_on = training.read(0, RandomDraws.fixed(100)).images
    assert held_out.max() not in trained_on.amax((1, 2, 3))


def test_embedded_images_with_the_same_name_are_different(tmp_path: Path):
    write_image(tmp_path / "0.png", 1)
    content = {"bytes": (tmp_path / "0.png").read_bytes(), "path": "0.png"}
    path = {"bytes": None, "path": str(tmp_path / "0.png")}
    table = datasets.Dataset.from_dict({"image": [path, content, content, path], "text": ["a", "b", "c", "d"]})
    files = open_captioned_files(DataConfig(source="x"), dataset=table.cast_column("image", datasets.Image()))
    assert [files.caption_groups[group] for group in files.group_of.tolist()] == [("a", "d"), ("b",), ("c",)]


def test_captions_have_suffixes_in_any_case(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name, suffix in (("a", ".TXT"), ("b", ".caption"), ("c", ".txt"), ("c", ".caption")):
        write_image(tmp_path / f"{name}.PNG")
        (tmp_path / f"{name}{suffix}").write_text(f"{name}{suffix}", encoding="utf-8")
    assert captions_of(tmp_path) == ["a.TXT", "b.caption", "c.txt"]
    assert "skipping" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize("names", ["Train Test", "set/train set/test", "a dev", ". Val", "photos eval/photos"])
def test_other_splits_are_found_in_any_case_and_depth(tmp_path: Path, names: str, metadata: bool, streaming: bool):
    train, other = (tmp_path / name for name in names.split())
    write = write_metadata if metadata else write_pairs
    write(train, 3)
    write(other, 2)
    if metadata and streaming and names == "a dev":
        write_image(other / "unlisted.png")
    rows = [*open_source(str(tmp_path), "train", streaming=streaming)]
    assert len(rows) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_above_nested_splits_lists_training_images_alone(tmp_path: Path, streaming: bool):
    lines = []
    for i, split in enumerate(("train", "train", "test")):
        write_image(tmp_path / "set" / split / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{split}/{i}.png", "text": f"caption {i}"}))
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = [*open_source(str(tmp_path), "train", streaming=streaming)]
    assert [row["text"] for row in rows] == ["caption 0", "caption 1"]


def test_images_that_metadata_list_need_no_suffix(tmp_path: Path):
    (tmp_path / "test").mkdir()
    names = ["0000", "0001", "test/0002"]
    for name in names:
        write_image(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / name)
    lines = [json.dumps({"file_name": name, "text": f"caption {i}"}) for i, name in enumerate(names)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert captions_of(tmp_path) == PAIRS[:2]


def test_images_of_other_splits_alone_are_named(tmp_path: Path):
    write_pairs(tmp_path / "x" / "test")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "notes.md").touch()
    with pytest.raises(UserError, match=r"only in folders of other splits, such as .*/x/test; to train on them, set"):
        captions_of(tmp_path)


def test_large_embedded_images_are_not_copied(tmp_path: Path):
    """They are more than 2 GiB in a block of rows."""
    content = [{"bytes": bytes(3_000_000), "path": None}] * 800
    table = datasets.Dataset.from_dict({"image": content[:1], "text": ["a"]})
    table = datasets.concatenate_datasets([table] * 800).cast_column("image", datasets.Image())
    files = open_captioned_files(DataConfig(source="x"), dataset=table)
    assert len(files) == 800


def test_an_archive_with_other_splits_is_refused(tmp_path: Path):
    write_metadata(tmp_path / "unpacked", 2)
    with zipfile.ZipFile(tmp_path / "more.ZIP", "w") as file:
        for path in (tmp_path / "unpacked").iterdir():
            file.write(path, f"more/train/{path.name}")
            file.write(path, f"more/Test/{path.name}")
            path.unlink()
    with pytest.raises(UserError, match=r"^data\.source: .*more\.ZIP contains more/Test/.*; unpack"):
        captions_of(tmp_path)


def test_what_is_found_instead_of_images_is_named(tmp_path: Path):
    for name in ("a.heic", "a.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"contains no images, Parquet files or tar files, but \.heic, \.txt$"):
        captions_of(tmp_path)
    for folder in ("cat", "dog"):  # whose names `datasets` makes labels of
        write_image(tmp_path / folder / "0.png")
    with pytest.raises(UserError, match=r"^data\.caption_column: .*; captions belong in metadata\.jsonl"):
        captions_of(tmp_path)
    (tmp_path / "cat" / "metadata.csv").write_text("file_name,text\n0.png,\n", encoding="utf-8")
    with pytest.raises(UserError, match="quote captions with commas"):
        captions_of(tmp_path / "cat")


def test_a_byte_order_mark_is_removed(tmp_path: Path):
    write_pairs(tmp_path / "folder")
    (tmp_path / "folder" / "000.txt").write_bytes(b"\xef\xbb\xbfcaption 0")
    assert captions_of(tmp_path / "folder") == PAIRS
    write_tar(tmp_path / "tars" / "a.tar", 3, lambda i: b"\xef\xbb\xbfcaption %d" % i)
    assert captions_of(tmp_path / "tars", **TAR) == PAIRS


@pytest.mark.parametrize("content", ["Bär".encode("latin1"), "Bär".encode("utf-16"), "bear".encode("utf-16-le")])
def test_a_caption_in_another_encoding_is_refused_by_name(tmp_path: Path, content: bytes):
    (write_pairs(tmp_path) / "001.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.source: .*001\.txt"):
        captions_of(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "a.tar"])
@pytest.mark.parametrize("encoding", ["latin1", "utf-16", "utf-16-le"])
def test_metadata_and_tars_in_another_encoding_are_refused_by_name(tmp_path: Path, name: str, encoding: str):
    options: dict[str, object] = {}
    if name == "a.tar":
        write_tar(tmp_path / name, 3, lambda i: "Bär".encode(encoding) if i == 1 else b"x")
        options, name = TAR, r"a\.tar: 00001\.txt"
    else:
        write_image(tmp_path / "0.png")
        text = "file_name,text\n0.png,Bär\n" if name.endswith("csv") else '{"file_name": "0.png", "text": "Bär"}\n'
        (tmp_path / name).write_text(text, encoding=encoding)
    with pytest.raises(UserError, match=rf"^data\.source: .*{name} is not UTF-8"):
        captions_of(tmp_path, **options)


def test_a_stream_names_the_place_of_a_caption_in_another_encoding(tmp_path: Path):
    write_tar(tmp_path / "a.tar", 40, lambda i: "Bär".encode("latin1") if i == 30 else b"x")
    config = DataConfig(source=str(tmp_path), channels=3, streaming=True, held_out=0, **TAR)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^data\.source: .*a\.tar: 00029"):
        CaptionedStream(config, 0).read(0, RandomDraws.fixed(40))


def test_a_cell_with_nul_characters_is_refused_by_row(tmp_path: Path):
    write_tar(tmp_path / "a.tar", 3, lambda i: "bear".encode("utf-16-le") if i == 1 else b"x")
    with pytest.raises(UserError, match=r"^data\.caption_column: .*row 1 of 3"):
        captions_of(tmp_path, **TAR)


@pytest.mark.parametrize("kind", ["data set", "hub", "embeddings"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    cache = tmp_path / "file" / "cache"
    if kind == "data set":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        write_tar(tmp_path / "set" / "a.tar", 3)
        with pytest.raises(UserError, match=rf"{cache} .*HF_DATASETS_CACHE"):
            captions_of(tmp_path / "set", **TAR)
    elif kind == "hub":
        hub = request.getfixturevalue("model_hub")
        hub.repositories["someone/model"] = {"model_index.json": b"{}"}
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        with pytest.raises(UserError, match=rf"{cache} .*HF_HUB_CACHE"):
            download("someone/model", cache_dir=str(cache))
    else:
        with pytest.raises(UserError, match=rf"{cache}.*XDG_CACHE_HOME"):
            cached_shards(cache, 1, 1, lambda rows: {"x": torch.zeros(len(rows))}, Accelerator(cpu=True), kind)


def test_a_caption_that_cannot_be_read_is_refused_by_name(tmp_path: Path):
    (write_pairs(tmp_path) / "001.txt").unlink()
    (tmp_path / "001.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^data\.source: .*001\.txt"):
        captions_of(tmp_path)


def test_what_has_no_partner_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_pairs(tmp_path)
    write_image(tmp_path / "alone.png")
    (tmp_path / "lost.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "photo.heic").write_bytes(b"heic")
    (tmp_path / "photo.txt").write_text("unsupported", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert captions_of(tmp_path) == PAIRS
    assert re.search(r"data\.source: .* 1 image.*: alone\.png", caplog.text)
    assert re.search(r"data\.source: .* 2 caption.*: lost\.txt, photo\.txt", caplog.text)


def test_what_the_metadata_lacks_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for i in range(3):
        write_image(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert captions_of(tmp_path) == ["a", "b"]
    assert re.search(r"data\.source: .* 1 image", caplog.text)


@pytest.mark.parametrize("name", ["metadata.txt", "metadata.png"])
def test_other_files_named_metadata_do_not_decide_the_kind(tmp_path: Path, name: str):
    write_pairs(tmp_path)
    if name.endswith("png"):
        write_image(tmp_path / name)
    else:
        (tmp_path / name).write_text("notes", encoding="utf-8")
    assert captions_of(tmp_path) == PAIRS


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_a_folder_of_two_kinds_is_refused(tmp_path: Path, suffix: str):
    write_pairs(tmp_path)
    if suffix == ".tar":
        write_tar(tmp_path / "stray.tar", 1)
    else:
        datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "stray.parquet")
    with pytest.raises(UserError, match=rf"^data\.source: .*1 {suffix}.*\(stray{suffix}\).* 3 image"):
        captions_of(tmp_path)


def test_the_output_of_img2dataset_is_read(tmp_path: Path):
    write_tar(tmp_path / "00000.tar", 3)
    datasets.Dataset.from_dict({"key": ["00000"]}).to_parquet(tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}", encoding="utf-8")
    assert captions_of(tmp_path, **TAR) == PAIRS


@pytest.mark.parametrize("folder", ["train", "images"])
def test_metadata_in_the_root_names_images_in_folders(tmp_path: Path, folder: str):
    for i in range(3):
        write_image(tmp_path / folder / f"{i}.png")
    rows = "".join(f"{folder}/{i}.png,caption {i}\n" for i in range(3))
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}", encoding="utf-8")
    assert captions_of(tmp_path) == PAIRS


@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_in_the_root_gives_each_split_its_own_images(tmp_path: Path, streaming: bool):
    for folder, i in (("train", 0), ("train", 1), ("train", 2), ("test", 3)):
        write_image(tmp_path / folder / f"{i}.png")
    names = ["train/0.png", "train/1.png", "train/2.png", "test/3.png"]
    rows = "".join(f"{name},caption {i}\n" for i, name in enumerate(names))
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}", encoding="utf-8")
    for split, expected in (("train", PAIRS), ("test", ["caption 3"])):
        assert sorted(row["text"] for row in open_source(str(tmp_path), split, streaming=streaming)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_a_test_folder_or_an_archive_are_not_trained_on_by_metadata_beside_them(
    tmp_path: Path, streaming: bool
):
    names = ["0.png", "1.png", "2.png", "test/3.png"]
    for name in names:
        write_image(tmp_path / name)
    rows = "".join(f'{{"file_name": "{name}", "text": "caption {i}"}}\n' for i, name in enumerate(names))
    (tmp_path / "metadata.jsonl").write_text(rows, encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "download.zip", "w") as archive:
        for name in ("0.png", "1.png", "test/3.png"):
            archive.write(tmp_path / name, name)
        archive.writestr("metadata.jsonl", rows.replace("caption", "archived"))
    assert sorted(row["text"] for row in open_source(str(tmp_path), "train", streaming=streaming)) == PAIRS


def test_a_stream_with_several_image_columns_reads_the_configured_one(tmp_path: Path):
    """A condition that cannot be decoded is not read; conditions lie outside the folder of the split."""
    for i in range(3):
        write_image(tmp_path / "train" / f"{i}.png")
    (tmp_path / "cond").mkdir()
    (tmp_path / "cond" / "0.png").write_bytes(b"not an image")
    rows = "".join(f"train/{i}.png,cond/0.png,caption {i}\n" for i in range(3))
    (tmp_path / "metadata.csv").write_text(f"file_name,cond_file_name,text\n{rows}", encoding="utf-8")
    config = DataConfig(source=str(tmp_path), resolution=8, channels=3, held_out=0, streaming=True)
    assert sorted(CaptionedStream(config, 0).read(0, RandomDraws.fixed(3)).captions) == PAIRS
    assert captions_of(tmp_path) == PAIRS


def test_a_folder_of_archives_is_read_beside_other_images(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for i in range(3):
            write_image(tmp_path.with_name("outside") / f"{i}.png")
            archive.write(tmp_path.with_name("outside") / f"{i}.png", f"{i}.png")
        archive.writestr(
            "metadata.jsonl", "".join(f'{{"file_name": "{i}.png", "text": "caption {i}"}}\n' for i in range(3))
        )
    write_image(tmp_path / "preview.png")
    assert captions_of(tmp_path) == PAIRS


def test_metadata_files_of_folders_are_read_in_the_order_of_their_names(tmp_path: Path):
    """In every process; `datasets` holds them in a set."""
    names = [f"n{i:02}" for i in range(20)]
    for name in names:
        write_image(tmp_path / name / "a.png")
        (tmp_path / name / "metadata.csv").write_text(f"file_name,text\na.png,{name}\n", encoding="utf-8")
    for streaming in (False, True):
        assert [row["text"] for row in open_source(str(tmp_path), "train", streaming=streaming)] == names


def test_images_outside_the_folder_train_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for folder in ("train", "bus", "test"):
        write_pairs(tmp_path / folder)
    assert captions_of(tmp_path) == PAIRS
    assert caplog.messages == [f"data.source: {tmp_path}: skipping 3 image(s) outside the folder train"]


def test_a_file_name_that_is_not_utf_8_is_refused(tmp_path: Path):
    write_pairs(tmp_path)
    try:
        (tmp_path / os.fsdecode(b"x\xe9.png")).write_bytes(b"")
    except OSError:
        pytest.skip("the file system allows UTF-8 only")
    with pytest.raises(UserError, match=r"^data\.source: a file name: .* is not valid text; expected UTF-8"):
        captions_of(tmp_path)


@pytest.mark.parametrize("metadata", [False, True])
def test_images_of_a_folder_of_another_split_are_not_trained_on(
    tmp_path: Path, metadata: bool, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="cond_diffusion")
    for folder in ("", "more", "test", "validation/deep"):
        write_pairs(tmp_path / folder, 3)
        if metadata:
            rows = [f"00{i}.png,caption {i}" for i in range(3)]
            (tmp_path / folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]), encoding="utf-8")
    assert captions_of(tmp_path) == sorted(2 * PAIRS)
    (tmp_path / "more" / "linked").symlink_to(write_pairs(tmp_path.with_name("elsewhere"), 1))
    if metadata:
        rows = "file_name,text\n000.png,caption 0"
        (tmp_path / "more" / "linked" / "metadata.csv").write_text(rows, encoding="utf-8")
    assert captions_of(tmp_path) == sorted([*PAIRS, *PAIRS, "caption 0"])
    assert caplog.messages[-1].endswith(f"not used for training: {tmp_path / 'test'}, {tmp_path / 'validation'}")


def test_a_file_is_of_a_split_only_if_its_name_contains_the_whole_word(tmp_path: Path):
    for i, name in enumerate(("trains", "cars", "valleys", "test-0", "validation", "cars_Test.2")):
        write_tar(tmp_path / f"{name}.tar", 1, lambda _, i=i: b"caption %d" % i)
    assert captions_of(tmp_path, **TAR) == PAIRS
    write_tar(tmp_path / "cars_train.tar", 1)
    assert captions_of(tmp_path, **TAR) == ["caption 0"]
    for name in ("bus", "freight-train", "plane"):  # no file of another split, so "train" is a thing
        write_tar(tmp_path / "vehicles" / f"{name}.tar", 1)
    assert len(captions_of(tmp_path / "vehicles", **TAR)) == 3
    for name in ("set-test", "set"):
        write_tar(tmp_path / "set" / f"{name}.tar", 1 + len(name))
    assert len(captions_of(tmp_path / "set", **TAR)) == 4
    assert len([*open_source(str(tmp_path / "set"), "test")]) == 9
    write_tar(tmp_path / "alone" / "my-test-set.tar", 1)
    with pytest.raises(UserError, match=r"no file \*train\*\.tar; rename the files, or set data\.source to one"):
        captions_of(tmp_path / "alone", **TAR)


def test_a_stream_decodes_images_of_its_column_alone(tmp_path: Path):
    write_pairs(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for text in sorted(tmp_path.glob("*.txt")):
            for file in (text, text.with_suffix(".png")):
                tar.add(file, file.name)
            tar.addfile(tarfile.TarInfo(f"{text.stem}.depth.png"))  # empty, so no image
            text.unlink()
    config = DataConfig(source=str(tmp_path), resolution=8, channels=3, held_out=0, streaming=True, **TAR)  # type: ignore[arg-type]
    assert sorted(CaptionedStream(config, 0).read(0, RandomDraws.fixed(3)).captions) == PAIRS


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_that_was_cut_between_members_is_refused_by_name(tmp_path: Path, members: int, streaming: bool):
    write_tar(tmp_path / "cut.tar", 4)
    with tarfile.open(tmp_path / "cut.tar") as tar:
        end = tar.getmembers()[2 * members].offset
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:end])
    config = DataConfig(source=str(tmp_path), channels=3, streaming=streaming, **TAR)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^data\.source: .*cut\.tar"):
        open_training_data(config, 0)


def test_parquet_files_may_differ_in_columns_that_are_not_read(tmp_path: Path):
    write_image(tmp_path / "image.png")
    image = {"bytes": (tmp_path / "image.png").read_bytes(), "path": None}
    for i, column in enumerate(("x", "y", "z")):
        table = datasets.Dataset.from_dict({"image": [image], "text": [f"caption {i}"], column: [i]})
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "set" / f"{i}.parquet")
    assert captions_of(tmp_path / "set") == PAIRS


@pytest.mark.parametrize("array", [np.full((16, 16), 0.5, np.float32), np.full((16, 16), 128, np.int32)])
def test_32_bit_values_are_refused(tmp_path: Path, array: np.ndarray):
    write_pairs(tmp_path)
    Image.fromarray(array).save(tmp_path / "deep.tif")
    (tmp_path / "deep.txt").write_text("deep", encoding="utf-8")
    with pytest.raises(UserError, match=r"^data\.image_column: .*deep\.tif \(32-bit"):
        captions_of(tmp_path)


def test_16_bit_values_are_read(tmp_path: Path):
    Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("grey", encoding="utf-8")
    data = load_captioned_images(DataConfig(source=str(tmp_path), resolution=8))
    assert data.images.unique().tolist() == [128]


def test_null_captions_of_a_stream_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    images = [{"bytes": image.getvalue(), "path": None}] * 40
    captions = [None if i == 17 else f"caption {i}" for i in range(40)]
    table = datasets.Dataset.from_dict({"image": images, "text": captions}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "set" / "a.parquet")
    config = DataConfig(source=str(tmp_path / "set"), resolution=8, channels=3, streaming=True, held_out=0)
    with caplog.at_level(logging.WARNING):
        batch = CaptionedStream(config, 0).read(0, RandomDraws(torch.zeros(40), torch.zeros(40)))
    assert len(batch.captions) == 40
    assert set(batch.captions) <= {caption for caption in captions if caption}
    assert re.search(r"data\.caption_column: 'text' .*None", caplog.text)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_pairs(tmp_path / "images")
    assert captions_of(Path("~/images")) == PAIRS
    assert Config(run_dir="~/runs/x").run_dir == str(tmp_path / "runs" / "x")
