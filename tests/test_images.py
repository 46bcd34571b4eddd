"""Labels of image grids."""

import logging
from typing import Any

import pytest
from PIL import Image, ImageFont

from cond_diffusion import images
from cond_diffusion.images import LABEL_WIDTH, grid


def label_of(text: str) -> bytes:
    blank = Image.new("L", (8, 20))
    return grid([blank, blank], 1, [text, ""]).crop((0, 0, LABEL_WIDTH, 20)).tobytes()


@pytest.mark.parametrize("letters", ["äöüÄÖÜß", "éàçñø", "жшя", "αβω", "€…—"])
def test_labels_have_letters_outside_ascii(letters: str):
    """A font draws the same box for each letter that it does not have."""
    labels = [label_of(f"ein B{letter}r") for letter in letters]
    assert len(set(labels)) == len(letters)


def test_a_missing_font_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    truetype = ImageFont.truetype

    def default_font_only(font: Any, *arguments: Any, **options: Any) -> ImageFont.FreeTypeFont:
        if isinstance(font, str):
            raise OSError("no such font")
        return truetype(font, *arguments, **options)

    monkeypatch.setattr(ImageFont, "truetype", default_font_only)
    images.label_font.cache_clear()
    with caplog.at_level(logging.WARNING):
        blank = Image.new("L", (8, 20))
        grid([blank] * 3, 1, ["a bear", "ein Bär", "两只熊"])
    images.label_font.cache_clear()
    images._warn_without_font.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
