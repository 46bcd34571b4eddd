"""Sources of captioned images, all opened with `datasets`, and the captions that their columns give."""

import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
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
from cond_diffusion.data.folders import BUILDERS, METADATA_NAMES, Files, open_folder, rows_of_split
from cond_diffusion.errors import UserError, check_cache, check_text, did_you_mean, first_line, user_errors
from cond_diffusion.images import encode, normalize_image

BUILT_IN_SOURCES = {name: Path(__file__).parent.parent / "assets" / name for name in ("mnist", "emoji")}
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
    """Open a split of a built-in dataset, a folder, a .parquet or .tar file, or a Hub id. Parquet files may differ in
    columns other than `columns`."""
    path = BUILT_IN_SOURCES.get(source, Path(source))
    _warn_if_ambiguous(source, path)
    found = Files(source)
    if path.is_dir():
        found = open_folder(source, path, split)
        if isinstance(found, datasets.Dataset):
            return found.to_iterable_dataset(max(1, len(found) // 1000)) if streaming else found
    elif path.is_file():
        if path.suffix not in BUILDERS:
            raise UserError(f"data.source: {source}: expected a .parquet or .tar file, a folder or a Hub id")
        found = Files(BUILDERS[path.suffix], "train", [path])
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
    return rows_of_split(source, splits[split], found, columns) if found.builder == "imagefolder" else splits[split]


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
