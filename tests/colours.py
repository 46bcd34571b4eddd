"""A captioned set that is made here: two shapes in colours, one above or left of the other, some combinations held out;
and the ways in which such a set lies on a disk.

`python tests/colours.py FOLDER [COUNT]` writes it as tars, for configs/colours.yaml.
"""

import csv
import io
import json
import random
import sys
import tarfile
from itertools import permutations, product
from pathlib import Path

import datasets
from PIL import Image, ImageDraw

SIDE = 24
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 240), "yellow": (240, 220, 50)}
SHAPES = ("circle", "square", "triangle")
PLACES = ("above", "left of")
THINGS = tuple(product(COLOURS, SHAPES))
COMBINATIONS = tuple(product(permutations(THINGS, 2), PLACES))
HELD_OUT = COMBINATIONS[::11]
TRAINED_ON = tuple(combination for combination in COMBINATIONS if combination not in HELD_OUT)

Combination = tuple[tuple[tuple[str, str], tuple[str, str]], str]


def caption(combination: Combination) -> str:
    """For example "a red circle above a blue square"."""
    (first, second), place = combination
    return f"a {' '.join(first)} {place} a {' '.join(second)}"


def picture(combination: Combination, seed: int) -> Image.Image:
    """Draw the two shapes, each in its half, at places and in sizes that `seed` chooses."""
    chance = random.Random(seed)
    (first, second), place = combination
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE))
    draw = ImageDraw.Draw(image)
    for number, (colour, shape) in enumerate((first, second)):
        along, across = SIDE + 2 * SIDE * number + chance.randint(-10, 10), 2 * SIDE + chance.randint(-24, 24)
        x, y = (across, along) if place == "above" else (along, across)
        r = chance.randint(14, 20)
        box = (x - r, y - r, x + r, y + r)
        match shape:
            case "circle":
                draw.ellipse(box, COLOURS[colour])
            case "square":
                draw.rectangle(box, COLOURS[colour])
            case "triangle":
                draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], COLOURS[colour])
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def examples(count: int) -> list[tuple[str, bytes, str]]:
    """Return (name, PNG, caption) of `count` pictures of the combinations that are trained on."""
    found = []
    for i in range(count):
        combination = TRAINED_ON[(i * 37) % len(TRAINED_ON)]
        file = io.BytesIO()
        picture(combination, i).save(file, "png")
        found.append((f"{i:05d}", file.getvalue(), caption(combination)))
    return found


def write(folder: Path, kind: str, count: int) -> list[str]:
    """Write the set into `folder` as one of `KINDS`; return the `key=value` words that read it."""
    folder.mkdir(parents=True)
    rows = examples(count)
    words = [f"data.source={folder}", f"data.resolution={SIDE}", "data.channels=3"]
    if kind in ("parquet", "tar"):
        for shard in range(3):
            part = rows[shard * len(rows) // 3 : (shard + 1) * len(rows) // 3]
            _write_parquet(folder, shard, part) if kind == "parquet" else _write_tar(folder, shard, part)
        return [*words, *{"parquet": ["data.image_column=picture"], "tar": TAR_COLUMNS}[kind]]
    for name, png, text in rows:
        (folder / f"{name}.png").write_bytes(png)
        if kind == "beside":
            (folder / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    names, texts = [f"{name}.png" for name, _, _ in rows], [text for _, _, text in rows]
    match kind:
        case "jsonl":
            lines = [json.dumps({"file_name": n, "text": t}) for n, t in zip(names, texts, strict=True)]
            (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
        case "csv":
            with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("file_name", "text"), *zip(names, texts, strict=True)])
        case "metadata.parquet":
            datasets.Dataset.from_dict({"file_name": names, "text": texts}).to_parquet(folder / "metadata.parquet")
    return words


KINDS = ("jsonl", "csv", "metadata.parquet", "beside", "parquet", "tar")
TAR_COLUMNS = ["data.image_column=png", "data.caption_column=txt"]


def _write_parquet(folder: Path, shard: int, rows: list[tuple[str, bytes, str]]) -> None:
    columns = {"picture": [{"path": None, "bytes": png} for _, png, _ in rows], "text": [text for _, _, text in rows]}
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"train-{shard:05d}.parquet")


def _write_tar(folder: Path, shard: int, rows: list[tuple[str, bytes, str]]) -> None:
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
        for name, png, text in rows:
            for ending, content in (("png", png), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    if len(sys.argv) < 2 or Path(sys.argv[1]).exists():
        sys.exit("expected a folder that does not exist, for example: python tests/colours.py my_colours")
    write(Path(sys.argv[1]), "tar", int(sys.argv[2]) if len(sys.argv) > 2 else 6000)
