"""Build the emoji data set anew from npm packages. The same packages give the same files.

    npm install --no-save --ignore-scripts @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 \
        @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji@1.2.7 @iconify-json/fluent-emoji-flat@1.2.6 \
        @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python tests/emoji_dataset.py node_modules FOLDER

`HELD_OUT_PAIRS` and `HELD_OUT_COLORS` define the test split: pairs of a concept and a family of styles, and concepts
that are a color of an object.
"""

import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import resvg_py
from PIL import Image

from cond_diffusion.images import encode

RESOLUTION = 64
FAMILIES = {"noto": "noto", "blob": "blob", "twemoji": "twemoji", "3d": "fluent", "glossy": "fluent", "flat": "fluent"}
SVG_PACKAGES = {
    "noto": "noto",
    "blob": "noto-v1",
    "twemoji": "twemoji",
    "glossy": "fluent-emoji",
    "flat": "fluent-emoji-flat",
}
# noto-v1 and fluent-emoji do not list the characters of their icons; they use the names of these packages.
NAMES_OF = {"noto-v1": "noto", "fluent-emoji": "fluent-emoji-flat"}
HELD_OUT_COLORS = (
    *("purple heart", "orange heart", "blue heart", "green circle", "brown circle", "blue circle"),
    *("yellow square", "purple square", "red square", "green book", "green apple"),
)
HELD_OUT_PAIRS = {
    "noto": """
        yarn; mirror ball; pine decoration; reminder ribbon; cricket game; microbe; potted plant; hedgehog;
        mouse; wolf; dodo; mosquito; donkey; cupcake; honey pot; popcorn; moon cake; curry rice; kiwi fruit;
        video camera; scroll; shopping bags; woman’s clothes; paperclip; woman’s hat; microphone; ballot box
        with ballot; crayon; envelope with arrow; coffin; megaphone; six o’clock; Tokyo tower; bullet train;
        roller skate; five-thirty; globe showing Americas
    """,
    "twemoji": """
        sled; skis; red envelope; water pistol; pool 8 ball; trophy; tennis; kite; curling stone; 3rd place
        medal; seedling; pig nose; penguin; polar bear; hatching chick; seal; cat; dog face; bread; melon;
        mate; fortune cookie; pancakes; takeout box; birthday cake; beverage box; cucumber; petri dish; euro
        banknote; high-heeled shoe; chains; credit card; stethoscope; x-ray; globe showing Asia-Australia;
        water wave; crescent moon; hospital; rock; train; carousel horse; building construction; motor
        scooter
    """,
    "fluent": """
        2nd place medal; Christmas tree; firecracker; goal net; rugby football; thread; military medal;
        nesting dolls; party popper; leaf fluttering in wind; bug; black bird; goat; cow; spouting whale;
        whale; strawberry; sushi; grapes; salt; bell pepper; kitchen knife; jar; roasted sweet potato; rice
        cracker; black nib; wastebasket; bikini; kimono; circus tent; trolleybus; construction; beach with
        umbrella; eight o’clock; suspension railway; pickup truck; kick scooter; cloud
    """,
}
GENDERED = re.compile(r"(man|men|woman|women)\b.")
LEFT_OUT_SUBGROUPS = ("country-flag", "subdivision-flag", "family")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def character(code: str) -> str:
    """Return a code sequence without the selectors of the emoji presentation, which packages include or omit."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_concepts(emojibase: Path) -> list[dict[str, Any]]:
    """Return the emoji of CLDR without flags of countries, families, gendered twins and mirrored emoji.

    Skin tones are not among the entries of `data.json`.
    """
    meta = read_json(emojibase / "meta" / "groups.json")
    concepts = []
    for entry in read_json(emojibase / "en" / "data.json"):
        name, group = entry["label"], meta["groups"].get(str(entry.get("group")), "component")
        left_out = (
            group == "component"
            or meta["subgroups"][str(entry["subgroup"])] in LEFT_OUT_SUBGROUPS
            or re.match("family", name)
            or (group == "people-body" and GENDERED.match(name))
            or "facing right" in name
        )
        if not left_out:
            keywords = [tag for tag in entry.get("tags", []) if tag not in name.lower()]
            concepts.append({"name": name, "group": group, "code": character(entry["hexcode"]), "keywords": keywords})
    return concepts


def svg_style(packages: Path, package: str) -> dict[str, Callable[[], Image.Image]]:
    """Return a function for each character that draws its SVG."""
    icons = read_json(packages / package / "icons.json")
    names = read_json(packages / NAMES_OF.get(package, package) / "chars.json")

    def draw(icon: dict[str, Any]) -> Image.Image:
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=RESOLUTION, height=RESOLUTION)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    drawn = {}
    for code, name in names.items():
        icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
        if icon:
            drawn[character(code)] = partial(draw, icon)
    return drawn


def webp_style(folder: Path) -> dict[str, Callable[[], Image.Image]]:
    """Return a function for each character that reads its WebP file."""

    def draw(file: Path) -> Image.Image:
        return Image.open(file).convert("RGBA").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)

    return {character(file.stem): partial(draw, file) for file in sorted(folder.glob("*.webp"))}


def captions_of(name: str, keywords: list[str], style: str) -> list[str]:
    """Return the captions of an image, four of six with the style; one is plain ASCII, as it is typed."""
    article = "" if name.endswith("s") and not name.endswith("ss") else "an " if name[0] in "aeiouAEIO" else "a "
    typed = unicodedata.normalize("NFKD", name.replace("’", "'")).encode("ascii", "ignore").decode()
    return [
        f"{article}{name}, {style} style",
        f"{article}{typed}, {style} style",
        f"{name}, {style} style",
        ", ".join([name, f"{style} style", *keywords]),
        name,
        ", ".join([name, *keywords]),
    ]


def build(node_modules: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the splits `train` and `test`."""
    styles = {style: svg_style(node_modules / "@iconify-json", name) for style, name in SVG_PACKAGES.items()}
    styles["3d"] = webp_style(node_modules / "@lobehub" / "fluent-emoji-3d" / "assets")
    held_out_pairs = {
        family: {" ".join(name.split()) for name in names.split(";")} for family, names in HELD_OUT_PAIRS.items()
    }
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for concept in read_concepts(node_modules / "emojibase-data"):
        name = concept["name"]
        for style, family in FAMILIES.items():
            if concept["code"] in styles[style]:
                held_out = name in HELD_OUT_COLORS or name in held_out_pairs.get(family, ())
                webp = encode(styles[style][concept["code"]](), "WEBP", lossless=True, method=6)
                splits["test" if held_out else "train"].append(
                    {
                        "image": {"bytes": webp, "path": None},
                        "captions": captions_of(name, concept["keywords"], style),
                        "concept": name,
                        "style": style,
                        "group": concept["group"],
                    }
                )
    return splits


def main(node_modules: str, folder: str) -> None:
    for split, rows in build(Path(node_modules)).items():
        table = datasets.Dataset.from_list(
            rows,
            datasets.Features(
                {
                    "image": datasets.Image(),
                    "captions": datasets.List(datasets.Value("string")),
                    **dict.fromkeys(("concept", "style", "group"), datasets.Value("string")),
                }
            ),
        )
        table.to_parquet(Path(folder, f"{split}.parquet"))
        print(f"{split}: {len(rows)} images of {len({row['concept'] for row in rows})} concepts")


if __name__ == "__main__":
    main(*sys.argv[1:])
