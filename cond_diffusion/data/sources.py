"""Sources of captioned images, all opened with `datasets`, and the captions that their columns give."""

import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from glob import escape
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

import datasets
import datasets.config
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image
from PIL.ImageFile import ImageFile
from pyarrow import parquet

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.schema import decode_text
from cond_diffusion.errors import UserError, check_cache, check_text, did_you_mean, first_line, user_errors
from cond_diffusion.images import encode, image_formats, normalize_image

BUILT_IN_SOURCES = {name: Path(__file__).parent.parent / "assets" / name for name in ("mnist", "emoji")}
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
# Folders and files that are not for training: the words that `datasets` knows, and "valid".
OTHER_SPLITS = ("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev")
CAPTION_SUFFIXES = (".txt", ".caption")  # of a file beside an image; the first that exists
FILE_SUFFIXES = {*BUILDERS, ".csv", ".gz", ".json", ".jsonl", ".txt", ".zip"}  # unlikely at the end of a Hub id

# Members of a tar that are decoded; others stay bytes. `datasets` would load .pth with torch, and .cbor with packages
# that may be missing.
TAR_DECODERS = ("txt", "text", "transcript", "cls", "cls2", "index", "inx", "id", "json", "jsn")

logger = logging.getLogger(__name__)


class _Tars(WebDataset):
    DECODERS = {name: decode for name, decode in WebDataset.DECODERS.items() if name in TAR_DECODERS}  # noqa: RUF012 - as in the base


class _Images(ImageFolder):
    def _split_generators(self, dl_manager: Any) -> Any:
        """Sort the metadata files, which are a set in the base: each process would read them in another order."""
        generators = super()._split_generators(dl_manager)
        for generator in generators:
            metadata_files = generator.gen_kwargs["metadata_files"]
            generator.gen_kwargs["metadata_files"] = tuple(sorted(metadata_files, key=str))  # as a list, it is sharded
        return generators


def open_source(
    source: str, split: str, *, streaming: bool = False, columns: Sequence[str] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a split of a source.

    Args:
        source: Name of a built-in dataset, a folder, a .parquet or .tar file, or a Hub id.
        columns: Columns that are needed. Parquet files may differ in the others.
    """
    path = BUILT_IN_SOURCES.get(source, Path(source))
    _warn_if_ambiguous(source, path)
    found = _Files(source)
    if path.is_dir():
        found = _open_folder(source, path, split)
        if isinstance(found, datasets.Dataset):
            return found.to_iterable_dataset(max(1, len(found) // 1000)) if streaming else found
    elif path.is_file():
        if path.suffix not in BUILDERS:
            raise UserError(f"data.source: {source}: expected a .parquet or .tar file, a folder or a Hub id")
        found = _Files(BUILDERS[path.suffix], "train", [path])
    elif path.is_absolute() or source.startswith(".") or path.suffix in FILE_SUFFIXES or source.count("/") != 1:
        raise UserError(
            f"data.source: no file or folder {source}{did_you_mean(source, BUILT_IN_SOURCES)}; "
            "expected mnist, emoji, a folder, a .parquet or .tar file or a Hub id such as ylecun/mnist"
        )
    if found.builder == "webdataset":
        for file in found.files:
            _check_tar(file)
    options = _common_columns(found.files, columns) if found.builder == "parquet" else {}
    try:
        builder: Any = datasets.load_dataset_builder(found.builder, data_files=found.patterns(), **options)
        if isinstance(builder, WebDataset):  # of a Hub id, too
            builder.__class__ = _Tars
        elif isinstance(builder, ImageFolder):
            builder.__class__ = _Images
        splits: Any
        if streaming:
            splits = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            splits = builder.as_dataset()
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise UserError(f"data.source: {source} contains no images, Parquet files or tar files") from error
    except (OSError, DatasetNotFoundError) as error:
        check_cache(error, datasets.config.HF_DATASETS_CACHE, "HF_DATASETS_CACHE")
        if path.exists():
            raise UserError(f"data.source: cannot read {source} ({first_line(error)})") from error
        raise UserError(
            f"data.source: {source}: not a local file or folder, and could not be downloaded from the Hub "
            f"({first_line(error)}); check the name and the network, or pass a downloaded folder"
        ) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):  # the message of `datasets` for a split without rows
            raise UserError(f"data.source: {source} ({split}) is empty; expected at least one image") from error
        _check_encodings(found.files)
        raise UserError(f"data.source: cannot read {source} ({' '.join(str(error).split())[:300]})") from error
    except Exception as error:  # the reader of each format raises its own types for a damaged file
        _check_encodings(found.files)
        raise UserError(f"data.source: cannot read {source} ({first_line(error.__cause__ or error)})") from error
    if split not in splits:
        raise UserError(f"data.source: {source} has no split {split!r}; it has {', '.join(map(repr, splits))}")
    return _of_split(source, splits[split], found, columns) if found.builder == "imagefolder" else splits[split]


@dataclass(frozen=True)
class _Files:
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


def _open_folder(source: str, folder: Path, split: str) -> datasets.Dataset | _Files:
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
        return _Files(BUILDERS[suffix], split, _files_of_split(source, folder, kind, split))
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
        if left_out and any(map(_is_image, all_files)):
            first = min(left_out)
            raise UserError(
                f"data.source: {source} has images only in {first}; to train on them, set it to that folder"
            )
        suffixes = ", ".join(sorted({file.suffix for file in all_files} - {""})) or "no files"
        raise UserError(f"data.source: {source} contains no images, Parquet files or tar files, but {suffixes}")
    for file in zips if split_folder == folder and not metadata else ():  # with metadata, `_of_split` leaves them out
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
    return _Files("imagefolder", split, [*files, *outside], globs, is_mixed)


def _list_files(folder: Path) -> tuple[list[Path], bool]:
    """Return the files of a folder, sorted, and whether it has links to folders, which are followed once.

    Hidden names are skipped.
    """

    def warn(error: OSError) -> None:
        logger.warning("data.source: skipping %s, which cannot be read (%s)", error.filename, error.strerror)

    files, has_links, visited = [], False, set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=warn):
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


def _of_split(source: str, table: Any, found: _Files, columns: Sequence[str]) -> Any:
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
    if not (images and any(map(_is_image, files)) and any(file.name in METADATA_NAMES for file in files)):
        return table  # all images are in .zip files, or none of them is listed
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


def _check_encodings(files: Sequence[Path]) -> None:
    """Raise UserError for metadata, or text in a tar file, that is not UTF-8; `datasets` does not name the file."""
    for file in files:
        if file.name in METADATA_NAMES and file.suffix != ".parquet":
            decode_text(file.read_bytes(), f"data.source: {file}")
        elif file.suffix == ".tar":
            with suppress(tarfile.TarError), tarfile.open(file) as tar:
                for member in tar:
                    if member.name.endswith((".txt", ".json")) and (content := tar.extractfile(member)):
                        decode_text(content.read(), f"data.source: {file}: {member.name}")


def _check_tar(file: Path) -> None:
    """Raise UserError for a tar file that was truncated between two members, which `tarfile` does not notice."""
    with user_errors(f"data.source: {file} cannot be read", OSError), file.open("rb") as content:
        content.seek(257)
        if content.read(5) != b"ustar":
            return  # compressed, or of an old format
        content.seek(0, os.SEEK_END)
        size = content.tell()
        content.seek(max(0, size - 1024))
        if size % 512 or content.read().strip(b"\0"):
            raise UserError(f"data.source: {file} is truncated: its end-of-archive marker is missing; copy it again")


def _common_columns(files: Sequence[Path], columns: Sequence[str]) -> dict[str, Any]:
    """Return the option that reads only `columns` if the Parquet files differ in others."""
    if len(files) < 2:
        return {}
    names = []
    for file in files:
        with user_errors(f"data.source: {file} cannot be read", OSError, ValueError):
            names.append({*parquet.read_schema(file).names})
    differ = any(other != names[0] for other in names)
    return {"columns": [*dict.fromkeys(columns)]} if differ and all(set(columns) <= each for each in names) else {}


Examples = datasets.Dataset | Sequence[Any]
"""A dataset, or pairs (image, caption); see `as_table`."""


def as_table(dataset: Examples, config: DataConfig) -> datasets.Dataset:
    """Convert a dataset that was passed from Python to a table with the columns of the config.

    Args:
        dataset: A `datasets.Dataset`, or pairs (image, caption). An image is a PIL image, an array, bytes or a path; a
            caption is a string or a list of strings.
        config: Names the columns.
    """
    if isinstance(dataset, datasets.Dataset):
        return dataset.with_format(None)
    images, captions = [], []
    for i, pair in enumerate(dataset):
        try:
            image, caption = pair
            if isinstance(image, Image.Image) and not _is_as_on_disk(image):
                image = encode(normalize_image(image, config.background))
            images.append(datasets.Image().encode_example(image))
            caption = [caption] if isinstance(caption, str) else caption
            for text in caption if isinstance(caption, list | tuple) else ():
                check_text(text, "caption")
        except Exception as error:  # of a dozen kinds, depending on what was passed
            problem = f"dataset: item {i} is {pair!r:.60}; expected a pair (image, caption)"
            raise UserError(f"{problem} ({first_line(error)})") from error
        captions.append(caption)
    with user_errors("dataset: the captions have several types", ValueError, TypeError, hint="; expected text"):
        table = datasets.Dataset.from_dict({config.image_column: images, config.caption_column: captions})
    return table.cast_column(config.image_column, datasets.Image())


def _is_as_on_disk(image: Image.Image) -> bool:
    """Return whether an image was opened from a path, and has not been loaded, and maybe changed, since then."""
    return isinstance(image, ImageFile) and bool(image.filename and image.tile) and image.tell() == 0


def _warn_if_ambiguous(source: str, path: Path) -> None:
    if source in BUILT_IN_SOURCES and Path(source).exists():
        logger.warning("data.source: using the built-in %s; for the local path pass ./%s", source, source)
    elif path.is_dir() and source.count("/") == 1 and not source.startswith((".", "/")) and not source.endswith("/"):
        logger.warning("data.source: %s is a local folder and is not used as a Hub id", source)


def _files_of_split(source: str, folder: Path, files: list[Path], split: str) -> list[Path]:
    """Return the files whose path has a part that begins with `split`, or that contains this word if others contain
    that of another split; for training otherwise those of no split."""

    def of(*splits: str, inside: bool) -> list[Path]:
        words = "|".join(map(re.escape, splits))
        name = re.compile(rf"{'.*(?<![a-z])' if inside else ''}({words})(?![a-z])")  # not "trains" for "train"
        return [file for file in files if any(name.match(part.lower()) for part in file.relative_to(folder).parts)]

    others = [name for name in (*OTHER_SPLITS, "train") if name != split]
    split_files = of(split, inside=False)
    if not split_files and of(*others, inside=True):
        split_files = [file for file in of(split, inside=True) if file not in of(*others, inside=True)]
    if not split_files and split == "train":
        split_files = [file for file in files if file not in of(*others, inside=True)]
        if not split_files:  # such as "my-test-set-0.tar" alone
            split_files = [file for file in files if file not in of(*others, inside=False)]
    if not split_files:
        what = f"no file {split}*{files[0].suffix}; to use {files[0].name}, set data.source to that file"
        raise UserError(f"data.source: {source} has no split {split!r}: {what}")
    if split == "train" and len(split_files) < len(files):
        left_out = ", ".join(file.name for file in files if file not in {*split_files})
        logger.info("data.source: %s: not used for training: %.200s", source, left_out)
    return split_files


CaptionGroup = tuple[str, ...]
"""All captions of an image."""


def caption_reader(config: DataConfig, feature: Any) -> Callable[[Any], CaptionGroup]:
    """Return the function that maps a cell of the caption column to its caption group."""
    if not config.caption_templates:
        if isinstance(feature, datasets.ClassLabel):
            raise UserError(
                f"data.caption_column: {config.caption_column!r} contains labels, not text; "
                "expected caption templates, for example 'data.caption_templates=[\"an image of {label}\"]'"
            )
        return lambda value: _captions_of_cell(value, config.caption_column)

    names = dict(config.label_names)
    if isinstance(feature, datasets.ClassLabel):
        names.setdefault("label", feature.names)
    for template in config.caption_templates:
        for field in _template_fields(template):
            if field not in names:
                raise UserError(
                    f"data.caption_templates: {template!r} uses {field!r}, which is not in data.label_names "
                    f"({', '.join(map(repr, names)) or 'empty'})"
                )

    def fill_in(value: Any) -> CaptionGroup:
        if not isinstance(value, int) or not all(0 <= value < len(values) for values in names.values()):
            raise UserError(
                f"data.label_names: no name for label {value!r} of column {config.caption_column!r}; "
                f"expected 0 to {min(map(len, names.values()), default=0) - 1}"
            )
        fields = {field: values[value] for field, values in names.items()}
        return tuple(template.format(**fields) for template in config.caption_templates)

    return fill_in


def pick_captions(groups: Iterable[CaptionGroup], draws: Iterable[float]) -> list[str]:
    """Return one caption of each group, chosen by a random number in [0, 1)."""
    return [group[int(draw * len(group))] for group, draw in zip(groups, draws, strict=True)]


def _template_fields(template: str) -> list[str]:
    with user_errors(f"data.caption_templates: {template!r} is malformed", ValueError):
        parts = list(Formatter().parse(template))
    if any(form or conversion for _, _, form, conversion in parts):
        raise UserError(f"data.caption_templates: {template!r}: expected plain fields such as {{word}}")
    return [field for _, field, _, _ in parts if field is not None]


def _captions_of_cell(value: Any, column: str) -> CaptionGroup:
    captions = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not captions or not all(isinstance(caption, str) for caption in captions):
        hint = "; for labels set data.caption_templates and data.label_names" if isinstance(value, int) else ""
        if value is None:
            hint = "; in a CSV file, quote captions with commas, and the words NA, None and null"
        raise UserError(
            f"data.caption_column: {column!r} contains {repr(value)[:60]}; expected a string or a list of strings{hint}"
        )
    if any("\0" in caption for caption in captions):
        raise UserError(f"data.caption_column: {column!r} contains {captions!r:.60}, which is not UTF-8; convert it")
    return tuple(caption.removeprefix("\ufeff") for caption in captions)
