"""Measure what an emoji model gets from the parts of a prompt: `python tests/benchmarks/prompts.py [CHECKPOINT]`.

Noise is added to real images up to a timestep, and the network predicts the image: with the image's prompt, with the
prompt without the style ("a red apple"), without a prompt, and with the embeddings of the tokens up to the comma, or of
those after it, taken from another prompt, with the same style and another concept whose name has as many tokens. Where
captions are encoded as a whole, the embeddings after the comma depend on the concept.

A second table shows at which noise levels concept and style get lost: noise is added to the real images up to a share
of the timesteps, and they are sampled to the end with their prompts.
"""

import argparse
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from measuring import hardware
from torch import Tensor

from cond_diffusion.device import autocast
from cond_diffusion.evaluation.emoji import SUBSETS, Emoji, EmojiImages, EmojiJudge, recognized
from cond_diffusion.images import to_bytes, to_model, to_pillow
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.pipeline.text_to_image import TextToImage

TIMESTEPS = (999, 950, 900, 800, 700)
STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = ("prompt", "without the style", "no prompt", "other tokens up to the comma", "other tokens after it")


def concept_of(prompt: str) -> str:
    """Return "a red apple" of "a red apple, 3d style"."""
    return prompt.rsplit(", ", 1)[0]


def concept_tokens(encoder: TextEncoder, prompts: list[str]) -> list[int]:
    """Return the number of tokens of each prompt up to the comma, the start token and the comma included."""
    ids, _ = encoder.tokenize([concept_of(prompt) for prompt in prompts])
    is_mark = ids == encoder.tokenizer.eos_token_id  # which is also the padding
    return (is_mark.int().argmax(1) + 1).tolist()


def with_donors(encoder: TextEncoder, emoji: Emoji, real: EmojiImages) -> tuple[EmojiImages, list[str], Tensor]:
    """Return the images for which there is another prompt, these prompts, and the numbers of tokens up to the comma."""
    lengths, donors = concept_tokens(encoder, real.prompts), defaultdict(list)
    of_train = zip(emoji.train.style.tolist(), concept_tokens(encoder, emoji.train.prompts), strict=True)
    for row, key in enumerate(of_train):
        donors[key].append(row)
    draw = torch.Generator().manual_seed(0)
    rows, prompts = [], []
    for row, key in enumerate(zip(real.style.tolist(), lengths, strict=True)):
        others = [other for other in donors[key] if emoji.train.concept[other] != real.concept[row]]
        if others:
            rows.append(row)
            prompts.append(emoji.train.prompts[others[int(torch.randint(len(others), (), generator=draw))]])
    indices = torch.tensor(rows, dtype=torch.int64)
    return real.rows(indices), prompts, torch.tensor(lengths)[indices]


@torch.inference_mode()
def errors(pipe: TextToImage, emoji: Emoji, real: EmojiImages) -> dict[int, list[float]]:
    """Return the mean squared error of x_0_hat at each timestep, for each of `COLUMNS`."""
    real, donors, lengths = with_donors(pipe.text_encoder, emoji, real)
    own, other = pipe.text_encoder(real.prompts), pipe.text_encoder(donors)
    is_concept = (torch.arange(own.shape[1]) < lengths[:, None])[..., None]
    contexts = [
        own,
        pipe.text_encoder([concept_of(prompt) for prompt in real.prompts]),
        pipe.text_encoder([""]).expand_as(own),
        torch.where(is_concept, other, own),
        torch.where(is_concept, own, other),
    ]
    x_0 = pipe.latent_space.encode(to_model(real.images))
    found = {}
    for timestep in TIMESTEPS:
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(timestep))
        t = torch.full((len(x_0),), timestep)
        x_t = pipe.schedule.q_sample(x_0, t, eps)

        def error(context: Float[Tensor, "b l d"], x_t: Tensor = x_t, t: Tensor = t) -> float:
            return (pipe.prediction.denoised(pipe.unet(x_t, t, context), x_t, t).x_0_hat - x_0).square().mean().item()

        with autocast(pipe.precision, pipe.device):
            found[timestep] = [error(context) for context in contexts]
    return found


def image_to_image(pipe: TextToImage, real: EmojiImages, strength: float) -> EmojiImages:
    """Generate an image from each real image with noise, and its prompt."""
    options: dict[str, Any] = {"sampler": "dpm_solver", "steps": 20, "guidance_scale": 3.0, "phrase_guidance": 0.0}
    options |= {"strength": strength, "output_type": "pt", "progress": False}
    pairs = zip(real.prompts, to_pillow(to_model(real.images)), strict=True)
    images = [pipe(prompt, image=image, seed=seed, **options) for seed, (prompt, image) in enumerate(pairs)]
    return replace(real, images=to_bytes(torch.cat(images)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="emoji")
    parser.add_argument("--samples", type=int, default=250, help="images of each kind (default: %(default)s)")
    arguments = parser.parse_args()
    pipe, emoji = TextToImage.from_pretrained(arguments.checkpoint), Emoji()
    print(f"On {hardware()}. Mean squared error of x_0_hat.\n")
    print(f"| images | t | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}", flush=True)
    for name in SUBSETS:
        for timestep, row in errors(pipe, emoji, emoji.subset(name, arguments.samples)).items():
            print(f"| {name} | {timestep} | {' | '.join(f'{value:.4f}' for value in row)} |", flush=True)
    judge, what = EmojiJudge.load(), ("concept, top 1", "concept, top 5", "family of styles")
    print(f"\nSampled from real images with noise.\n\n| images | strength | {' | '.join(what)} |\n|{'---|' * 5}")
    for name in SUBSETS:
        real = emoji.subset(name, arguments.samples)
        for strength in STRENGTHS:
            share = recognized(judge, emoji, image_to_image(pipe, real, strength))
            print(f"| {name} | {strength} | {' | '.join(f'{share[key]:.1%}' for key in what)} |", flush=True)


if __name__ == "__main__":
    main()
