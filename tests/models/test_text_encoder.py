"""The text encoder, and the cache of its embeddings."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from cond_diffusion.data import cache
from cond_diffusion.data.cache import context_table
from cond_diffusion.errors import UserError
from cond_diffusion.models.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained("builtin", max_length=16)


def test_the_context_is_the_last_hidden_state_of_the_padded_caption(encoder: TextEncoder):
    context = encoder(["a digit seven", ""])
    assert context.shape == (2, 16, encoder.context_dim)
    tokenizer = encoder.tokenizer
    words = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("a digit seven"))
    ids = [tokenizer.bos_token_id, *words, *[tokenizer.eos_token_id] * (15 - len(words))]
    expected = encoder.clip(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(context[0], expected)
    assert (context[0] - context[1]).abs().max() > 0.1


def test_the_first_tokens_do_not_depend_on_max_length(encoder: TextEncoder):
    shorter = TextEncoder(encoder.tokenizer, encoder.clip, max_length=8)
    torch.testing.assert_close(shorter(["a digit seven"])[0], encoder(["a digit seven"])[0, :8])


@pytest.mark.parametrize("phrases", [["a digit seven", "three", "8"], ["one"], [""]])
def test_phrases_are_encoded_as_if_each_were_a_caption(encoder: TextEncoder, phrases: list[str]):
    split = TextEncoder(encoder.tokenizer, encoder.clip, 16, split_phrases=True)
    ends = [len(encoder.tokenizer(phrase).input_ids) for phrase in phrases]  # with the start and the end token
    assert sum(ends) < 16
    expected = torch.cat([context[:end] for context, end in zip(encoder(phrases), ends, strict=True)])
    (context,) = split([", ".join(phrases)])
    torch.testing.assert_close(context[: len(expected)], expected)
    padding = encoder(phrases[-1:])[0, ends[-1] :]
    torch.testing.assert_close(context[len(expected) :], padding[: 16 - len(expected)])


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        # "),": a token of CLIP's vocabulary
        ("an A button (blood type), 3d style", ["an A button (blood type)", "3d style"]),
        ("red apple,3d style", ["red apple", "3d style"]),
        ("1,000 apples, 3d style", ["1,000 apples", "3d style"]),
        (", red apple,, 3d style,", ["red apple", "3d style"]),
        (",", [""]),
    ],
)
def test_commas_separate_phrases(caption: str, phrases: list[str]):
    whole = TextEncoder.from_pretrained("emoji", None, split_phrases=False)
    split = TextEncoder(whole.tokenizer, whole.clip, None, split_phrases=True)
    ids = split.tokenize([caption])[0][0].tolist()
    expected = [token for phrase in phrases for token in whole.tokenizer(phrase).input_ids]
    assert ids == expected + [whole.tokenizer.pad_token_id] * (split.max_length - len(expected))


def test_phrases_do_not_depend_on_the_attention_kernel(encoder: TextEncoder):
    split = TextEncoder(encoder.tokenizer, encoder.clip, 16, split_phrases=True)
    expected = split(["a digit seven, two"])
    encoder.clip.set_attn_implementation("eager")
    try:
        torch.testing.assert_close(split(["a digit seven, two"]), expected)
    finally:
        encoder.clip.set_attn_implementation("sdpa")


def test_split_phrases_are_truncated_and_stored(encoder: TextEncoder, tmp_path: Path):
    split = TextEncoder(encoder.tokenizer, encoder.clip, 8, split_phrases=True)
    caption = "a digit seven, two one one"  # truncated: start, three words, end, start, one word, end
    assert split.cut([caption]) == [caption]
    assert split.tokenize([caption])[1] == ["one one"]
    assert split.max_length_for([caption], 1.0) == 10
    assert split.words("seven, two") == [("seven,", [1]), ("two", [4])]
    split.save_pretrained(tmp_path)
    assert TextEncoder.from_pretrained(tmp_path, None).split_phrases
    assert not TextEncoder.from_pretrained(tmp_path, None, split_phrases=False).split_phrases
    torch.testing.assert_close(TextEncoder.from_pretrained(tmp_path, None)([caption]), split([caption]))
    encoder.save_pretrained(tmp_path)
    assert not TextEncoder.from_pretrained(tmp_path, None).split_phrases


def test_the_encoder_stays_frozen_and_in_eval_mode(encoder: TextEncoder):
    parent = torch.nn.Sequential(encoder).train()
    assert parent.training
    assert not any(module.training for module in encoder.modules())
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert not encoder(["a digit seven"]).requires_grad


def test_any_text_can_be_encoded(encoder: TextEncoder):
    text = "żółw 🦖 七!"
    ids = encoder.tokenizer(text).input_ids
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_truncated_words_are_returned(encoder: TextEncoder):
    prompt = " ".join(["seven"] * 14) + " and then eight"
    ids, cut = encoder.tokenize(["a digit seven", prompt])
    assert cut == ["", "and then eight"]
    theirs = encoder.tokenizer(["a digit seven", prompt], padding="max_length", truncation=True, max_length=16)
    assert ids.tolist() == theirs.input_ids
    assert torch.equal(encoder([prompt]), encoder([" ".join(["seven"] * 14)]))


def test_the_context_table_gives_the_context_of_each_caption(encoder: TextEncoder):
    captions = ["", "seven", "a digit two"]
    table = context_table(encoder, captions, Accelerator(cpu=True))
    torch.testing.assert_close(table(["a digit two", "", "a digit two"]), encoder(["a digit two", "", "a digit two"]))


def test_the_text_model_of_a_complete_clip_is_loaded(encoder: TextEncoder, tmp_path):
    """openai's repositories have the text and the image encoder in one file."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(encoder.tokenizer), "eos_token_id": encoder.tokenizer.eos_token_id}
    clip = CLIPModel(
        CLIPModel.config_class(text_config=text, vision_config={**shape, "image_size": 8, "patch_size": 4})
    )
    clip.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(tmp_path, max_length=16)
    ids = encoder.tokenizer("a digit seven", padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = clip.text_model(ids).last_hidden_state
    torch.testing.assert_close(loaded(["a digit seven"]), expected)


def test_a_length_beyond_the_positions_of_the_encoder_is_refused():
    with pytest.raises(UserError, match=r"^text\.max_length: 17 .*16"):
        TextEncoder.from_pretrained("builtin", max_length=17)


def test_a_source_that_is_not_a_clip_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^text\.encoder: .*/no-such-folder: "):
        TextEncoder.from_pretrained(tmp_path / "no-such-folder", max_length=16)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(UserError, match=rf"^text\.encoder: {tmp_path}: .*'bert'"):
        TextEncoder.from_pretrained(tmp_path, max_length=16)


def test_an_unreachable_hub_is_reported_in_one_line_with_the_alternative(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"^text\.encoder: openai/clip-vit-base-patch32: .*text\.encoder=builtin"
    ) as caught:
        TextEncoder.from_pretrained("openai/clip-vit-base-patch32", max_length=77)
    assert "\n" not in str(caught.value)


@pytest.fixture
def many(encoder: TextEncoder, tmp_path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """More captions than fit one shard; the cache is in `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "CAPTIONS_PER_SHARD", 10)
    return [f"a digit {word} {number}" for number in range(12) for word in ("two", "seven")]


def test_many_captions_are_embedded_once_and_cached_on_disk(
    encoder: TextEncoder, many: list[str], tmp_path, monkeypatch: pytest.MonkeyPatch
):
    table = context_table(encoder, many, Accelerator(cpu=True))
    torch.testing.assert_close(table(many[::-1]), encoder(many[::-1]))
    files = sorted(tmp_path.rglob("contexts/*/*"))
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    content = files[1].read_bytes()
    files[1].unlink()  # not overwritten: `table` still maps the file
    files[1].write_bytes(content[:-100])  # as after a power failure
    embedded = []
    embed = cache.embed

    def counted(encoder: TextEncoder, captions: list[str]) -> torch.Tensor:
        embedded.extend(captions)
        return embed(encoder, captions)

    monkeypatch.setattr(cache, "embed", counted)
    again = context_table(encoder, many, Accelerator(cpu=True))
    assert embedded == many[10:20]
    assert torch.equal(again(many), table(many))


def test_the_cache_depends_on_encoder_length_and_captions(encoder: TextEncoder, many: list[str], tmp_path):
    context_table(encoder, many, Accelerator(cpu=True))
    other = TextEncoder.from_pretrained("builtin", max_length=16)
    with torch.no_grad():
        next(other.clip.parameters()).mul_(1.5)
    shorter = TextEncoder.from_pretrained("builtin", max_length=12)
    clip = CLIPTextModel(CLIPTextConfig(**{**encoder.clip.config.to_dict(), "hidden_act": "gelu"}))
    clip.load_state_dict(encoder.clip.state_dict())
    gelu = TextEncoder(encoder.tokenizer, clip, 16)
    split = TextEncoder(encoder.tokenizer, encoder.clip, 16, split_phrases=True)
    for changed, captions in ((other, many), (shorter, many), (gelu, many), (split, many), (encoder, many[::-1])):
        table = context_table(changed, captions, Accelerator(cpu=True))
        torch.testing.assert_close(table(captions), changed(captions))
    assert len(list(tmp_path.glob("cond_diffusion/contexts/*"))) == 6


def test_an_unwritable_cache_is_reported(encoder: TextEncoder, many: list[str], tmp_path):
    (tmp_path / "cond_diffusion").write_text("not a folder", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^embedding captions: .*{tmp_path}.*(Not a dir|exists)"):
        context_table(encoder, many, Accelerator(cpu=True))
