"""What a picture is called: from a cell of the caption column to a *caption group*, a tuple of captions that mean the
same ("a digit seven", "7").
"""

from collections.abc import Callable, Iterable
from string import Formatter
from typing import Any

import datasets

from cond_diffusion.config.data import DataConfig
from cond_diffusion.errors import UserError

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
        return lambda cell: _texts(cell, config.caption_column)

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

    def fill_in(cell: Any) -> CaptionGroup:
        if not isinstance(cell, int) or not all(0 <= cell < len(values) for values in names.values()):
            raise UserError(
                f"data.label_names: no name for the label {cell!r} of column {config.caption_column!r}; "
                f"labels run from 0 to {min(map(len, names.values()), default=0) - 1}"
            )
        return tuple(
            t.format(**{word: values[cell] for word, values in names.items()}) for t in config.caption_templates
        )

    return fill_in


def chosen(groups: Iterable[CaptionGroup], places: Iterable[float]) -> list[str]:
    """Return of each group the caption that stands at its place, from 0 to 1."""
    return [group[int(place * len(group))] for group, place in zip(groups, places, strict=True)]


def _words_in_braces(template: str) -> list[str]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"data.caption_templates: {template!r}: {error}") from error
    if any(form or conversion for _, _, form, conversion in parts):
        raise UserError(f"data.caption_templates: {template!r}: expected only a word in braces, such as {{word}}")
    return [word for _, word, _, _ in parts if word is not None]


def _texts(cell: Any, column: str) -> CaptionGroup:
    texts = (cell,) if isinstance(cell, str) else tuple(cell) if isinstance(cell, list) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        labels = "; for labels give data.caption_templates and data.label_names" if isinstance(cell, int) else ""
        raise UserError(
            f"data.caption_column: {column!r} holds {repr(cell)[:60]}; expected a text or a list of texts{labels}"
        )
    return texts
