import pytest
import torch
from accelerate import Accelerator
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from cond_diffusion.data import cache as contexts
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


def test_frozen_means_frozen(encoder: TextEncoder):
    around = torch.nn.Sequential(encoder).train()
    assert around.training
    assert not any(module.training for module in encoder.modules())
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert not encoder(["a digit seven"]).requires_grad


def test_any_text_can_be_encoded(encoder: TextEncoder):
    text = "żółw 🦖 七!"
    ids = encoder.tokenizer(text).input_ids
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_the_words_that_are_cut_are_named(encoder: TextEncoder):
    prompt = " ".join(["seven"] * 14) + " and then eight"
    ids, cut = encoder.tokenize(["a digit seven", prompt])
    assert cut == ["", "and then eight"]
    theirs = encoder.tokenizer(["a digit seven", prompt], padding="max_length", truncation=True, max_length=16)
    assert ids.tolist() == theirs.input_ids
    assert torch.equal(encoder([prompt]), encoder([" ".join(["seven"] * 14)]))


def test_the_table_holds_the_context_of_each_caption(encoder: TextEncoder):
    captions = ["", "seven", "a digit two"]
    table = context_table(encoder, captions, Accelerator(cpu=True))
    torch.testing.assert_close(table(["a digit two", "", "a digit two"]), encoder(["a digit two", "", "a digit two"]))


@pytest.mark.parametrize(
    "shape",
    [
        # openai/clip-vit-base-patch32 and openai/clip-vit-large-patch14, the latter Stable Diffusion 1's
        CLIPTextConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=12),
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12),
    ],
    ids=["ViT-B/32", "ViT-L/14"],
)
def test_a_clip_of_the_real_architectures_takes_the_built_in_one_s_place(encoder: TextEncoder, shape: CLIPTextConfig):
    real = TextEncoder(encoder.tokenizer, CLIPTextModel(shape), max_length=77)
    assert real(["a digit seven"]).shape == (1, 77, shape.hidden_size)


def test_the_text_half_of_a_whole_clip_is_loaded(encoder: TextEncoder, tmp_path):
    """openai's repositories hold both halves in one file."""
    half = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**half, "vocab_size": len(encoder.tokenizer), "eos_token_id": encoder.tokenizer.eos_token_id}
    clip = CLIPModel(CLIPModel.config_class(text_config=text, vision_config={**half, "image_size": 8, "patch_size": 4}))
    clip.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(tmp_path, max_length=16)
    ids = encoder.tokenizer("a digit seven", padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = clip.text_model(ids).last_hidden_state
    torch.testing.assert_close(loaded(["a digit seven"]), expected)


def test_a_length_beyond_the_encoder_s_positions_is_refused():
    with pytest.raises(UserError, match=r"text.max_length: 17 is more than the encoder's 16 positions"):
        TextEncoder.from_pretrained("builtin", max_length=17)


def test_what_is_no_clip_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no-such-folder: there is no such folder"):
        TextEncoder.from_pretrained(tmp_path / "no-such-folder", max_length=16)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a 'bert' model; expected a CLIP"):
        TextEncoder.from_pretrained(tmp_path, max_length=16)


def test_a_hub_that_cannot_be_reached_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"openai/clip-vit-base-patch32.*text\.encoder=builtin") as caught:
        TextEncoder.from_pretrained("openai/clip-vit-base-patch32", max_length=77)
    assert "\n" not in str(caught.value)


@pytest.fixture
def many(encoder: TextEncoder, tmp_path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """More captions than are embedded in memory; the cache lies in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(contexts, "CAPTIONS_PER_SHARD", 10)
    return [f"a digit {word} {number}" for number in range(12) for word in ("two", "seven")]


def test_many_captions_are_embedded_once_and_kept_on_the_disk(
    encoder: TextEncoder, many: list[str], tmp_path, monkeypatch: pytest.MonkeyPatch
):
    table = context_table(encoder, many, Accelerator(cpu=True))
    torch.testing.assert_close(table(many[::-1]), encoder(many[::-1]))
    files = sorted(tmp_path.rglob("contexts/*/*"))
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    content = files[1].read_bytes()
    files[1].unlink()  # which `table` still reads
    files[1].write_bytes(content[:-100])  # as if the power had gone
    embedded = []
    embed = contexts.embed

    def counted(encoder: TextEncoder, captions: list[str]) -> torch.Tensor:
        embedded.extend(captions)
        return embed(encoder, captions)

    monkeypatch.setattr(contexts, "embed", counted)
    again = context_table(encoder, many, Accelerator(cpu=True))
    assert embedded == many[10:20]
    assert torch.equal(again(many), table(many))


def test_kept_contexts_are_those_of_this_encoder_length_and_captions(encoder: TextEncoder, many: list[str], tmp_path):
    context_table(encoder, many, Accelerator(cpu=True))
    other = TextEncoder.from_pretrained("builtin", max_length=16)
    with torch.no_grad():
        next(other.clip.parameters()).mul_(1.5)
    longer = TextEncoder.from_pretrained("builtin", max_length=12)
    quick = TextEncoder.from_pretrained("builtin", max_length=16)
    clip = CLIPTextModel(CLIPTextConfig(**{**quick.clip.config.to_dict(), "hidden_act": "gelu"}))
    clip.load_state_dict(quick.clip.state_dict())
    quick = TextEncoder(quick.tokenizer, clip, 16)
    for read_by, captions in ((other, many), (longer, many), (quick, many), (encoder, many[::-1])):
        table = context_table(read_by, captions, Accelerator(cpu=True))
        torch.testing.assert_close(table(captions), read_by(captions))
    assert len(list(tmp_path.glob("cond_diffusion/contexts/*"))) == 5


def test_a_cache_that_cannot_be_written_is_one_line(encoder: TextEncoder, many: list[str], tmp_path):
    (tmp_path / "cond_diffusion").write_text("in the way")
    with pytest.raises(UserError, match="embedding captions: cannot be kept in .*: .*(Not a dir|exists)"):
        context_table(encoder, many, Accelerator(cpu=True))
