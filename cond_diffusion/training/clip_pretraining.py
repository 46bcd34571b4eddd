"""Pretrain a small CLIP on a captioned data set, for use as a text encoder where the Hub is not available.

`cond-diffusion pretrain-clip --config clip_mnist` learns a byte-pair vocabulary from the captions and writes a
`CLIPModel` folder in transformers' format, which can be used like any CLIP from the Hub.

The loss is CLIP's (Radford et al. 2021, fig. 3) with the targets of UniCL (Yang et al. 2022): captions of the same
group are positives of each other. A batch contains many of them, and CLIP's diagonal targets would push them apart.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from cond_diffusion.config.run import ClipPretrainingConfig
from cond_diffusion.data.dataset import CaptionedImages, load_captioned_images
from cond_diffusion.images import to_model
from cond_diffusion.models.text_encoder import embed_images, embed_texts, quiet_transformers
from cond_diffusion.pipeline.run_folder import RunLock, make_run_dir, new_run_dir
from cond_diffusion.seeding import generator, sample_indices


def train_tokenizer(captions: list[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary (Sennrich et al. 2016) in CLIP's order: bytes, word-final bytes, merges, special
    tokens.

    It contains every byte, so any text can be encoded, including unseen words.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIPTokenizer's normalizer and pre-tokenizer decide which bytes merges may join.
    clip_backend = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip_backend.normalizer, clip_backend.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - 2,  # the trainer counts the plain bytes, but not the word-final ones
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), start, end]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def build_clip(config: ClipPretrainingConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a randomly initialized `CLIPModel`."""
    shared = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.num_heads,
    }
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**shared, **special_tokens, "vocab_size": len(tokenizer), "max_position_embeddings": config.max_length}
    vision = {
        **shared,
        "image_size": config.data.resolution,
        "patch_size": config.patch_size,
        "num_channels": config.data.channels,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.width))


def contrastive_loss(
    logits: Float[Tensor, "images texts"],
    group_of_image: Int64[Tensor, " images"],
    group_of_text: Int64[Tensor, " texts"],
) -> Float[Tensor, ""]:
    """Compute the symmetric contrastive loss of UniCL: each target is uniform over all pairs of the same group."""
    same = (group_of_image[:, None] == group_of_text[None, :]).to(logits.dtype)
    to_text = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, same.T / same.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


@torch.no_grad()
def zero_shot_accuracy(
    clip: CLIPModel, tokenizer: CLIPTokenizer, data: CaptionedImages, max_length: int
) -> dict[str, float]:
    """Compute the zero-shot classification accuracy for each caption template.

    Each image is classified as the caption group with the nearest caption. The n-th template consists of the n-th
    captions of all groups; where groups differ in length, only indices that all of them have are evaluated.

    Returns:
        The accuracy by template; keys are the captions of the first group.
    """
    features = torch.cat([embed_images(clip, to_model(images)) for images in data.images.split(500)])
    accuracy = {}
    for captions in zip(*data.caption_groups, strict=False):
        texts = F.normalize(embed_texts(clip, tokenizer, list(captions), max_length), dim=-1)
        accuracy[captions[0]] = ((features @ texts.T).argmax(1) == data.group_of).float().mean().item()
    return accuracy


def pretrain(config: ClipPretrainingConfig) -> dict[str, float]:
    """Train a CLIP and save it to `config.run_dir`. Returns its `zero_shot_accuracy` on the test split."""
    run_dir = new_run_dir(config.run_dir)
    make_run_dir(run_dir)
    with RunLock(run_dir) as lock:
        lock.acquire()
        new_run_dir(config.run_dir)  # check again: the folder had to exist before it could be locked
        return _pretrain(run_dir, config)


def _pretrain(run_dir: Path, config: ClipPretrainingConfig) -> dict[str, float]:
    data, test = load_captioned_images(config.data), load_captioned_images(config.data, config.test_split)
    captions = [caption for group in data.caption_groups for caption in group]
    tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
    torch.manual_seed(config.seed)  # transformers initializes weights from the global random state; nothing else does
    clip = build_clip(config, tokenizer)
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=config.warmup_steps)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.max_steps - config.warmup_steps)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [config.warmup_steps])

    progress_bar = tqdm(range(config.max_steps), desc="training CLIP", unit=" steps")
    for step in progress_bar:
        loss = _training_loss(clip, tokenizer, data, config, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            progress_bar.set_postfix(loss=f"{loss.item():.3f}")
    with quiet_transformers():
        clip.eval().save_pretrained(run_dir)
        tokenizer.save_pretrained(run_dir)
    return zero_shot_accuracy(clip, tokenizer, test, config.max_length)


def _training_loss(
    clip: CLIPModel, tokenizer: CLIPTokenizer, data: CaptionedImages, config: ClipPretrainingConfig, step: int
) -> Float[Tensor, ""]:
    indices = sample_indices(len(data), config.seed, step * config.batch_size, config.batch_size)
    groups = data.group_of[indices]
    draws = torch.rand(len(indices), generator=generator("captions", config.seed, step))
    captions = data.captions_of(indices, draws)
    unique = list(dict.fromkeys(zip(captions, groups.tolist(), strict=True)))

    images = F.normalize(embed_images(clip, to_model(data.images[indices])), dim=-1)
    texts = F.normalize(embed_texts(clip, tokenizer, [caption for caption, _ in unique], config.max_length), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=100) * images @ texts.T
    return contrastive_loss(logits, groups, torch.tensor([group for _, group in unique]))
