"""Where captioned images come from, and how their captions read: whatever a source is, `datasets` opens it."""

import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from glob import escape
from pathlib import Path
from string import Formatter
from typing import Any

import datasets
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
from PIL import Image

from cond_diffusion.config.data import DataConfig
from cond_diffusion.errors import UserError, did_you_mean, first_line, user_errors

BUILT_IN_SOURCES = {"mnist": Path(__file__).parent.parent / "assets" / "mnist"}
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
FILES = {*BUILDERS, ".csv", ".gz", ".json", ".jsonl", ".txt", ".zip"}  # endings that no hub id has by chance

logger = logging.getLogger(__name__)


def open_source(source: str, split: str, *, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """Find out what `source` is, and open its `split`; raise UserError, naming `data.source`, where that cannot be.

    streaming: leave it where it is, and read it from front to back.
    """
    path = BUILT_IN_SOURCES.get(source, Path(source))
    _tell_what_is_taken(source, path)
    files: dict[str, list[str]] | None = None
    if path.is_dir():
        there = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        of_split = path / split if (path / split).is_dir() else path
        here = [file for file in there if file.is_relative_to(of_split)]
        described = any(file.name.startswith("metadata.") for file in here)
        endings = [] if described else [ending for ending in BUILDERS if any(file.suffix == ending for file in there)]
        if endings:
            archives = [file for file in there if file.suffix == endings[0]]
            builder, files = BUILDERS[endings[0]], {split: _files_of_split(source, path, archives, split)}
        elif split != "train" and of_split == path:
            raise UserError(f"data.source: {source} has no split {split!r}: no folder {split}")
        elif not described and (beside := _captions_beside(of_split, here)):
            return beside.to_iterable_dataset(max(1, len(beside) // 1000)) if streaming else beside
        else:
            # All that lies there: `datasets` would guess at splits from words in the names of files.
            builder, files = "imagefolder", {split: [f"{escape(str(of_split))}/**"]}
    elif path.is_file():
        if path.suffix not in BUILDERS:
            raise UserError(
                f"data.source: {source} is no Parquet file and no tar; "
                "expected a .parquet or .tar file, a folder or a hub id"
            )
        builder, files = BUILDERS[path.suffix], {"train": [escape(str(path))]}
    elif path.is_absolute() or source.startswith(".") or path.suffix in FILES or source.count("/") != 1:
        raise UserError(
            f"data.source: no file or folder {source}{did_you_mean(source, BUILT_IN_SOURCES)}; "
            "expected mnist, a folder, a .parquet or .tar file or a hub id such as ylecun/mnist"
        )
    else:
        builder = source
    try:
        found = datasets.load_dataset(builder, data_files=files, streaming=streaming)
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise UserError(f"data.source: {source} holds no pictures, no Parquet files and no tars") from error
    except (OSError, DatasetNotFoundError) as error:
        if path.exists():
            raise UserError(f"data.source: cannot read {source}: {first_line(error)}") from error
        raise UserError(
            f"data.source: cannot open {source}: there is no such file or folder, and as a hub id it cannot be fetched "
            f"({first_line(error)}); check the name and the network, or download it and give the folder"
        ) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):  # what `datasets` says of a split without rows
            raise UserError(
                f"data.source: {source} ({split}) holds no examples; expected at least one picture"
            ) from error
        raise UserError(f"data.source: cannot read {source}: {' '.join(str(error).split())[:300]}") from error
    except (DatasetsError, tarfile.TarError, RuntimeError) as error:
        raise UserError(f"data.source: cannot read {source}: {first_line(error.__cause__ or error)}") from error
    if split not in found:
        raise UserError(f"data.source: {source} has no split {split!r}; it has {', '.join(map(repr, found))}")
    return found[split]


def as_table(dataset: datasets.Dataset | Sequence[Any], config: DataConfig) -> datasets.Dataset:
    """Return a data set that a caller gave as a table with the columns of the config.

    Args:
        dataset: A `datasets.Dataset`, or pairs (image, caption): the image as PIL's, an array, bytes or a path; the
            caption as a text or a list of texts.
        config: Names the columns.

    Raises:
        UserError: If an item is no such pair.
    """
    if isinstance(dataset, datasets.Dataset):
        return dataset
    images, captions = [], []
    for i, pair in enumerate(dataset):
        with user_errors(f"dataset: item {i} is {pair!r:.60}; expected a pair (image, caption)", Exception):
            image, caption = pair
            images.append(datasets.Image().encode_example(image))
            captions.append(caption)
    table = datasets.Dataset.from_dict({config.image_column: images, config.caption_column: captions})
    return table.cast_column(config.image_column, datasets.Image())


def _tell_what_is_taken(source: str, path: Path) -> None:
    """Say which is read where a name could mean two things."""
    if source in BUILT_IN_SOURCES and Path(source).exists():
        logger.warning("data.source: %s is the built-in set; what lies here by that name is ./%s", source, source)
    elif path.is_dir() and source.count("/") == 1 and not source.startswith((".", "/")) and not source.endswith("/"):
        logger.warning("data.source: %s is a folder here and is taken as such, not as a hub id", source)


def _files_of_split(source: str, folder: Path, files: list[Path], split: str) -> list[str]:
    """Return those of the files whose names, or folders' names, begin with the split; for training those that are named
    after none.
    """

    def named(file: Path, *splits: str) -> bool:
        return any(part.startswith(splits) for part in file.relative_to(folder).parts)

    of_split = [file for file in files if named(file, split)]
    if not of_split and split == "train":
        of_split = [file for file in files if not named(file, "test", "val")]
    if not of_split:
        raise UserError(f"data.source: {source} has no split {split!r}: no file {split}*{files[0].suffix}")
    return [escape(str(file)) for file in of_split]


def _captions_beside(folder: Path, files: list[Path]) -> datasets.Dataset | None:
    """Open a folder whose files are name.txt, a caption, beside name.png; None if there is no such pair.

    Raises UserError for a picture without one.
    """
    endings, there = Image.registered_extensions(), set(files)
    captions = {file: file.with_suffix(".txt") for file in files if file.suffix.lower() in endings}
    if there.isdisjoint(captions.values()):
        return None
    for picture, caption in captions.items():
        if caption not in there:
            raise UserError(f"data.source: {picture} has no caption: there is no {caption.name} beside it")
    try:
        texts = [caption.read_text(encoding="utf-8").strip() for caption in captions.values()]
    except UnicodeDecodeError as error:
        raise UserError(f"data.source: a caption in {folder} is not valid text ({error}); expected UTF-8") from error
    columns = {"image": [str(picture) for picture in captions], "text": texts}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


CaptionGroup = tuple[str, ...]


def caption_reader(config: DataConfig, feature: Any) -> Callable[[Any], CaptionGroup]:
    """Return the function from a cell of the caption column, whose type is `feature`, to its caption group.

    Raises UserError, as does that function, where labels, templates and names do not go together.
    """
    if not config.caption_templates:
        if isinstance(feature, datasets.ClassLabel):
            raise UserError(
                f"data.caption_column: {config.caption_column!r} holds labels, not text; "
                'say how they read, for example data.caption_templates=["a picture of {label}"]'
            )
        return lambda value: _texts(value, config.caption_column)

    names = dict(config.label_names)
    if isinstance(feature, datasets.ClassLabel):
        names.setdefault("label", feature.names)
    for template in config.caption_templates:
        for word in _words_in_braces(template):
            if word not in names:
                raise UserError(
                    f"data.caption_templates: {template!r} asks for {word!r}, which data.label_names does not list; "
                    f"it lists {', '.join(map(repr, names)) or 'nothing'}"
                )

    def fill_in(value: Any) -> CaptionGroup:
        if not isinstance(value, int) or not all(0 <= value < len(values) for values in names.values()):
            raise UserError(
                f"data.label_names: no name for the label {value!r} of column {config.caption_column!r}; "
                f"labels run from 0 to {min(map(len, names.values()), default=0) - 1}"
            )
        return tuple(
            t.format(**{word: values[value] for word, values in names.items()}) for t in config.caption_templates
        )

    return fill_in


def pick_captions(groups: Iterable[CaptionGroup], draws: Iterable[float]) -> list[str]:
    """Return of each group the caption that stands at its place, from 0 to 1."""
    return [group[int(place * len(group))] for group, place in zip(groups, draws, strict=True)]


def _words_in_braces(template: str) -> list[str]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"data.caption_templates: {template!r}: {error}") from error
    if any(form or conversion for _, _, form, conversion in parts):
        raise UserError(f"data.caption_templates: {template!r}: expected only a word in braces, such as {{word}}")
    return [word for _, word, _, _ in parts if word is not None]


def _texts(value: Any, column: str) -> CaptionGroup:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        labels = "; for labels give data.caption_templates and data.label_names" if isinstance(value, int) else ""
        raise UserError(
            f"data.caption_column: {column!r} holds {repr(value)[:60]}; expected a text or a list of texts{labels}"
        )
    return texts
