"""The built-in emoji data set, and the captions of its builder."""

import emoji_dataset
import pytest

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.data.sources import open_source

COLUMNS = ("concept", "style", "captions")
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def train() -> Rows:
    return open_source("emoji", "train").select_columns([*COLUMNS]).to_list()


@pytest.fixture(scope="module")
def test() -> Rows:
    return open_source("emoji", "test").select_columns([*COLUMNS]).to_list()


def pairs(rows: Rows) -> set[tuple[str, str]]:
    return {(row["concept"], row["style"]) for row in rows}


def test_counts_are_those_of_the_card(train: Rows, test: Rows):
    assert (len(train), len(test)) == (7989, 254)
    assert len({row["concept"] for row in [*train, *test]}) == 1443
    assert {row["style"] for row in train} == {row["style"] for row in test} == {*emoji_dataset.FAMILIES}
    assert len(pairs([*train, *test])) == len(train) + len(test)


def test_training_never_sees_what_is_held_out(train: Rows, test: Rows):
    trained, families = pairs(train), emoji_dataset.FAMILIES
    colors = {concept for concept, _ in pairs(test)} & {*emoji_dataset.HELD_OUT_COLORS}
    assert colors == {*emoji_dataset.HELD_OUT_COLORS}
    assert not colors & {concept for concept, _ in trained}
    for concept, style in pairs(test):
        in_family = {(concept, other) for other in families if families[other] == families[style]}
        assert not trained & in_family
        # What is held out is a combination: the concept in another style, or another color of the object, is trained.
        assert concept in colors or concept in {other for other, _ in trained}


def test_captions_name_the_style_and_the_concept(train: Rows):
    for row in train:
        with_style = [caption for caption in row["captions"] if f"{row['style']} style" in caption]
        assert len(with_style) == 4
        assert row["concept"] in row["captions"]
    assert emoji_dataset.captions_of("old woman’s hat", ["clothes"], "3d") == [
        "an old woman’s hat, 3d style",
        "an old woman's hat, 3d style",
        "old woman’s hat, 3d style",
        "old woman’s hat, 3d style, clothes",
        "old woman’s hat",
        "old woman’s hat, clothes",
    ]


def test_images_are_laid_on_white_unless_another_background_is_set():
    white = load_captioned_images(DataConfig(source="emoji"), "test").images
    black = load_captioned_images(DataConfig(source="emoji", background="black"), "test").images
    assert white.shape == black.shape == (254, 3, 64, 64)
    corners = white[:, :, 0, 0].float().mean(), black[:, :, 0, 0].float().mean()
    assert corners[0] > 200 > 50 > corners[1]
    assert DataConfig().background == "black"
