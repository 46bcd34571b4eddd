"""Folders of images: which files belong to a split, and their captions."""

import logging
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from PIL import Image

from cond_diffusion.config.schema import decode_text
from cond_diffusion.errors import UserError, check_text, user_errors
from cond_diffusion.images import image_formats

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
# Folders and files that are not for training: the words that `datasets` knows, and "valid".
OTHER_SPLITS = ("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev")
CAPTION_SUFFIXES = (".txt", ".caption")  # of a file beside an image; the first that exists

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """What `datasets.load_dataset` receives: a builder or a Hub id, and files of a split, or patterns of many files."""

    builder: str
    split: str = ""
    files: Sequence[Path] = ()
    globs: Sequence[str] = ()
    is_mixed: bool = False  # whether `datasets` also finds images that are not among the files

    def patterns(self) -> dict[str, list[str]] | None:
        if not self.files:
            return None
        return {self.split: [*(self.globs or (escape(str(file)) for file in self.files))]}


def open_folder(source: str, folder: Path, split: str) -> datasets.Dataset | Files:
    """Return the table of images with text files, or the files of another kind of folder."""
    all_files, has_links = _list_files(folder)
    parents = {file.parent for file in all_files}
    folders = {above for parent in parents for above in (parent, *parent.parents) if folder in above.parents}
    tops = {top for top in folders if top.parent == folder}
    named = [top for top in tops if top.name.lower() == split]
    split_folder = min(named, key=lambda top: (top.name != split, top), default=folder)
    left_out = set()  # the folders of other splits, at any depth
    if split_folder == folder:
        left_out = {other for other in folders if other.name.lower() in OTHER_SPLITS}
    is_used = {
        parent: parent.is_relative_to(split_folder) and left_out.isdisjoint((parent, *parent.parents))
        for parent in parents
    }
    files = [file for file in all_files if is_used[file.parent]]
    root_metadata = [file for file in all_files if file.parent == folder and file.name in METADATA_NAMES]
    metadata = [file for file in files if file.name in METADATA_NAMES] or root_metadata
    archives = {} if metadata else _archives(all_files)
    pairs = {} if metadata else _images_with_text(files)
    if len(archives) + bool(pairs) > 1:
        found = [f"{len(kind)} {suffix} file(s) ({kind[0].name})" for suffix, kind in archives.items()]
        found += [f"{len(pairs)} image(s) with text files"] * bool(pairs)
        hint = "expected one kind; set data.source to a subfolder or a file"
        raise UserError(f"data.source: {source} contains {' and '.join(found)}; {hint}")
    if archives:
        ((suffix, kind),) = archives.items()
        return Files(BUILDERS[suffix], split, _files_of_split(source, folder, kind, split))
    if split != "train" and split_folder == folder:
        raise UserError(f"data.source: {source} has no split {split!r}: no folder {split}")
    if left_out:
        logger.info("data.source: %s: not used for training: %s", source, ", ".join(map(str, sorted(left_out))))
    if split == "train" and split_folder != folder:
        splits = {top for top in tops if top.name.lower() in (split, *OTHER_SPLITS)}
        if outside := sum(_is_image(file) and splits.isdisjoint(file.parents) for file in all_files):
            logger.warning("data.source: %s: skipping %d image(s) outside the folder train", source, outside)
    if pairs:
        _warn_unpaired(source, files, pairs)
        texts = [_read_caption(caption) for caption in pairs.values()]
        table = datasets.Dataset.from_dict({"image": [str(image) for image in pairs], "text": texts})
        return table.cast_column("image", datasets.Image())
    zips = [file for file in files if file.suffix.lower() == ".zip"]
    if not (zips or metadata or any(map(_is_image, files))):
        if elsewhere := [file.parent for file in all_files if _is_image(file)]:
            where = f"only in folders of other splits, such as {elsewhere[0]}"
            raise UserError(f"data.source: {source} has images {where}; to train on them, set it to that folder")
        suffixes = ", ".join(sorted({file.suffix for file in all_files} - {""}))
        suffixes = suffixes or ("files without a suffix" if all_files else "no files")
        raise UserError(f"data.source: {source} contains no images, Parquet files or tar files, but {suffixes}")
    # With metadata, `rows_of_split` leaves the images of other splits out.
    for file in zips if split_folder == folder and not metadata else ():
        _check_zip(file)
    # Folders, since `datasets` infers splits from words in file names; each by itself where it would find others, too:
    # those of other splits, or a folder and a link to it.
    globs = [f"{escape(str(split_folder))}/**"]
    if left_out or has_links:
        globs = [f"{escape(str(parent))}/*" for parent in sorted({file.parent for file in files})]
    outside = sorted(set(metadata) - set(files))
    globs += [escape(str(file)) for file in outside]
    has_other_splits = bool(left_out) or split_folder != folder
    is_mixed = bool(zips) or (bool(metadata) and has_other_splits)
    return Files("imagefolder", split, [*files, *outside], globs, is_mixed)


def _list_files(folder: Path) -> tuple[list[Path], bool]:
    """Return the files of a folder, sorted, and whether it has links to folders, which are followed once.

    Hidden names are skipped.
    """

    def skip(error: OSError) -> None:
        if not isinstance(error, PermissionError) or Path(error.filename) == folder:
            raise UserError(f"data.source: {error.filename} cannot be read ({error.strerror})") from error
        logger.warning("data.source: skipping %s, which cannot be read (%s)", error.filename, error.strerror)

    files, has_links, visited = [], False, set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=skip):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        has_links |= Path(root).is_symlink() and Path(root) != folder
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        paths = (Path(root, name) for name in names if not _is_hidden(name))
        # A pipe or a device can be endless. A broken link is reported where it is read.
        files += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]  # noqa: PTH110, PTH113
    for path in files:
        check_text(str(path), "data.source: a file name")
    return sorted(files), has_links


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _archives(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the Parquet and tar files, without the metadata that img2dataset writes beside each tar file."""
    tars = {file for file in files if file.suffix == ".tar"}
    parquets = [file for file in files if file.suffix == ".parquet" and file.with_suffix(".tar") not in tars]
    return {suffix: kind for suffix, kind in ((".parquet", parquets), (".tar", sorted(tars))) if kind}


def _check_zip(file: Path) -> None:
    """Raise UserError for a .zip file with a folder of another split, whose images `datasets` would add."""
    with (
        user_errors(f"data.source: {file} cannot be read", OSError, zipfile.BadZipFile),
        zipfile.ZipFile(file) as content,
    ):
        for name in content.namelist():
            if any(part.lower() in OTHER_SPLITS for part in PurePosixPath(name).parts[:-1]):
                raise UserError(f"data.source: {file} contains {name}, which is not for training; unpack the file")


def _images_with_text(files: Sequence[Path]) -> dict[Path, Path]:
    """Return each image that has a text file of the same name, and that file."""
    texts: dict[Path, Path] = {}
    for suffix in CAPTION_SUFFIXES:
        for file in files:
            if file.suffix.lower() == suffix:
                texts.setdefault(file.with_suffix(""), file)
    return {file: texts[name] for file in files if _is_image(file) and (name := file.with_suffix("")) in texts}


@cache
def _image_suffixes() -> set[str]:
    formats = {*image_formats()}
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats and name in Image.OPEN}


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _image_suffixes()


def _warn_unpaired(source: str, files: Sequence[Path], pairs: dict[Path, Path]) -> None:
    stems = {image.with_suffix("") for image in pairs}
    images = [file for file in files if _is_image(file) and file not in pairs]
    texts = [file for file in files if file.suffix.lower() in CAPTION_SUFFIXES]
    captions = [file for file in texts if file.with_suffix("") not in stems]
    for kind, left_out in (("image(s) without a caption", images), ("caption(s) without an image", captions)):
        if left_out:
            names = ", ".join(file.name for file in left_out[:3])
            logger.warning("data.source: %s: skipping %d %s: %s", source, len(left_out), kind, names)


def rows_of_split(source: str, table: Any, found: Files, columns: Sequence[str]) -> Any:
    """Return the rows of a table or stream whose images are among the files of the split, or do not exist.

    `datasets` also reads images of other splits that metadata of the whole folder lists, and those in .zip files. A
    missing image is reported where it is read.
    """
    resolve = cache(os.path.realpath)  # folders; far fewer than files

    def place(path: str | Path) -> tuple[str, str]:
        folder, name = os.path.split(path)
        return resolve(folder), os.path.normcase(name)

    files = found.files
    images = [name for name, kind in (table.features or {}).items() if isinstance(kind, datasets.Image)]
    has_zips, has_images = any(file.suffix.lower() == ".zip" for file in files), any(map(_is_image, files))
    if not images or not any(file.name in METADATA_NAMES for file in files) or (has_zips and not has_images):
        return table  # none of the images is listed, or all are in .zip files
    column = next((name for name in columns if name in images), images[0])
    place_of = {file: place(file) for file in files}
    places = {*place_of.values()}

    def belongs(path: str | None) -> bool:
        return path is None or ("://" not in path and (place(path) in places or not Path(path).exists()))

    if isinstance(table, datasets.IterableDataset):
        if not found.is_mixed:
            return table
        return table.decode(False).filter(lambda image: belongs(image and image["path"]), input_columns=[column])
    paths = [path for chunk in table.data.column(column).chunks for path in chunk.field("path").to_pylist()]
    listed = {place(path) for path in paths if path}
    if left_out := sum(_is_image(file) and own not in listed for file, own in place_of.items()):
        logger.warning("data.source: %s: skipping %d image(s) that are not in the metadata", source, left_out)
    rows = [row for row, path in enumerate(paths) if belongs(path)] if found.is_mixed else range(len(table))
    if len(rows) == len(table):
        return table
    message = "data.source: %s: skipping %d row(s) of the metadata whose images are not in the split"
    logger.info(message, source, len(table) - len(rows))
    return table.select(rows)


def _read_caption(file: Path) -> str:
    """Return the text of a caption file."""
    with user_errors(f"data.source: {file} cannot be read", OSError):
        content = file.read_bytes()
    return decode_text(content, f"data.source: {file}").strip()


def _files_of_split(source: str, folder: Path, files: list[Path], split: str) -> list[Path]:
    """Return the files with a part of the path that begins with the word `split` or, if none does, that contains it.

    For training, a file with the word of another split does not count; if no name has the word, the others are used.
    """

    def of(*splits: str, inside: bool) -> list[Path]:
        words = "|".join(map(re.escape, splits))
        name = re.compile(rf"{'.*(?<![a-z])' if inside else ''}({words})(?![a-z])")  # not "trains" for "train"
        return [file for file in files if any(name.match(part.lower()) for part in file.relative_to(folder).parts)]

    split_files = of(split, inside=False)
    if not split_files and split != "train":
        split_files = of(split, inside=True)
    elif not split_files:
        others = {*of(*OTHER_SPLITS, inside=True)}
        named = [file for file in of(split, inside=True) if file not in others] if others else []
        split_files = named or [file for file in files if file not in others]
    if not split_files:
        what = f"no file *{split}*{files[0].suffix}; rename the files, or set data.source to one, such as {files[0]}"
        raise UserError(f"data.source: {source} has no split {split!r}: {what}")
    if split == "train" and len(split_files) < len(files):
        used = {*split_files}
        left_out = ", ".join(file.name for file in files if file not in used)
        logger.info("data.source: %s: not used for training: %.200s", source, left_out)
    return split_files
