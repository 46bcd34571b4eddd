"""Measure how near the text encoder of the emoji places keywords and names: `python tests/emoji_synonyms.py`.

Each keyword of CLDR ("sailing") is compared with the names of all concepts by the cosine of CLIP's pooled outputs,
minus the mean of the names. A nearest name is right if its concept has that keyword. Keywords are in the captions of
training images.
"""

from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cond_diffusion.data.sources import open_source
from cond_diffusion.models.text_encoder import TextEncoder


def keywords() -> tuple[list[str], dict[str, set[int]]]:
    """Return the names of all concepts, and for each keyword the indices of the concepts that have it."""
    captions: dict[str, list[str]] = {}
    for split in ("train", "test"):
        for row in cast(Any, open_source("emoji", split)).select_columns(["concept", "captions"]):
            captions[row["concept"]] = row["captions"]
    concepts_of: dict[str, set[int]] = defaultdict(set)
    for index, (*_, name, with_keywords) in enumerate(captions.values()):
        for keyword in filter(None, with_keywords.removeprefix(name).split(", ")):
            concepts_of[keyword].add(index)
    return [*captions], concepts_of


@torch.inference_mode()
def embed(encoder: TextEncoder, texts: list[str]) -> Tensor:
    """Return the pooled outputs of CLIP."""
    tokens, _ = encoder.tokenize(texts)
    return torch.cat([encoder.clip(input_ids=ids).pooler_output for ids in tokens.split(256)])


def main() -> None:
    names, concepts_of = keywords()
    encoder = TextEncoder.from_pretrained("emoji", None, split_phrases=False)  # the pooled output is of the whole text
    of_names, of_keywords = embed(encoder, names), embed(encoder, [*concepts_of])
    mean = of_names.mean(0)
    similarity = F.normalize(of_keywords - mean, dim=1) @ F.normalize(of_names - mean, dim=1).T
    nearest = similarity.topk(5).indices.tolist()
    right = list(concepts_of.values())
    count = len(right)
    top_1 = sum(found[0] in expected for found, expected in zip(nearest, right, strict=True)) / count
    top_5 = sum(not expected.isdisjoint(found) for found, expected in zip(nearest, right, strict=True)) / count
    chance = sum(map(len, right)) / count / len(names)
    print(f"{count} keywords of {len(names)} concepts: top 1 {top_1:.1%} (chance {chance:.1%}), top 5 {top_5:.1%}")


if __name__ == "__main__":
    main()
