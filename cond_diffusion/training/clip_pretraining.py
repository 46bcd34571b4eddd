"""Train a small CLIP on a captioned data set, so that a text encoder exists where no hub is in reach.

`cond-diffusion pretrain-clip --config clip_mnist` writes transformers' own format: a
byte-pair vocabulary learned from the captions, and a `CLIPModel` whose folder can stand wherever a CLIP from the hub
can.

The loss is CLIP's (Radford et al. 2021, fig. 3) with the targets of UniCL (Yang et al. 2022): a batch holds many
captions that mean the same, and they are positives of each other. With only the diagonal as positives the loss would
push equals apart.
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
    """Learn a byte-pair vocabulary (Sennrich et al. 2016) laid out as CLIP's: bytes, bytes that end a word, merges,
    marks.

    Every byte is in it, so any text can be encoded, words that were never seen too.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIPTokenizer's own normalizer and word boundaries decide what the merges may join.
    rules = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - 2,  # the trainer counts the plain bytes, but not those that end a word
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), start, end]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def build_clip(config: ClipPretrainingConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a `CLIPModel` with random weights."""
    half = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.num_heads,
    }
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**half, **marks, "vocab_size": len(tokenizer), "max_position_embeddings": config.max_length}
    vision = {
        **half,
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
    """Return the cross-entropy both ways, the target shared equally among all that mean the same (UniCL)."""
    same = (group_of_image[:, None] == group_of_text[None, :]).to(logits.dtype)
    to_text = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, same.T / same.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


@torch.no_grad()
def zero_shot_accuracy(
    clip: CLIPModel, tokenizer: CLIPTokenizer, data: CaptionedImages, max_length: int
) -> dict[str, float]:
    """Return, for each wording, the share of images that are nearest to their own group's caption among all groups'.

    The wordings are the places of the captions in their groups, and go by the caption of the first group. Where groups
    differ in length, only the places that all of them have count.
    """
    features = torch.cat([embed_images(clip, to_model(images)) for images in data.images.split(500)])
    accuracy = {}
    for captions in zip(*data.caption_groups, strict=False):
        texts = F.normalize(embed_texts(clip, tokenizer, list(captions), max_length), dim=-1)
        accuracy[captions[0]] = ((features @ texts.T).argmax(1) == data.group_of).float().mean().item()
    return accuracy


def pretrain(config: ClipPretrainingConfig) -> dict[str, float]:
    """Train, save into `config.run_dir`, and return what `zero_shot_accuracy` does on the test split."""
    run_dir = new_run_dir(config.run_dir)
    make_run_dir(run_dir)
    with RunLock(run_dir) as lock:
        lock.acquire()
        new_run_dir(config.run_dir)  # still: it could not be locked before it was there
        return _pretrain(run_dir, config)


def _pretrain(run_dir: Path, config: ClipPretrainingConfig) -> dict[str, float]:
    data, test = load_captioned_images(config.data), load_captioned_images(config.data, config.test_split)
    tokenizer = train_tokenizer(
        [c for group in data.caption_groups for c in group], config.vocab_size, config.max_length
    )
    torch.manual_seed(config.seed)  # transformers draws initial weights from the global state, and from nowhere else
    clip = build_clip(config, tokenizer)
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True
    )
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=config.warmup_steps)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.max_steps - config.warmup_steps)
    rate = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, decay], [config.warmup_steps])

    bar = tqdm(range(config.max_steps), desc="training CLIP", unit=" steps")
    for step in bar:
        loss = _training_loss(clip, tokenizer, data, config, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
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
