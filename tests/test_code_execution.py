"""Loading a checkpoint, text encoder, autoencoder, LoRA or Hub repository never executes code from it."""

import ast
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hub import ModelHub
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file
from stable_diffusion import stable_diffusion
from transformers import AutoConfig

from cond_diffusion import TextToImage
from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation.metrics import ClipJudge
from cond_diffusion.images import open_image
from cond_diffusion.models.latents import VAE
from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER, TextEncoder
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL
from cond_diffusion.training.trainer import train

LIBRARIES = {"transformers", "diffusers", "peft"}
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "DiffusionPipeline")
# This diffusers class has no trust_remote_code option; `latents.py` checks its config.json first.
CONCRETE = {"AutoencoderKL"}

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import *
class EvilConfig(CLIPTextConfig): model_type = "evil"
class Evil: pass
"""
AUTO_MAP = dict.fromkeys(AUTO_CLASSES, "evil.Evil") | {"AutoConfig": "evil.EvilConfig"}
POISONS: dict[str, dict[str, dict[str, Any]]] = {
    "an unknown model type": {"config.json": {"model_type": "evil", "auto_map": AUTO_MAP}},
    "a known model type": {"config.json": {"auto_map": AUTO_MAP, "architectures": ["Evil"]}},
    "a kernel": {"config.json": {"attn_implementation": "someone/evil", "_attn_implementation": "someone/evil"}},
    "an adapter": {
        "adapter_config.json": {
            "peft_type": "LORA",
            "base_model_name_or_path": "someone/evil",
            "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
            "megatron_config": {"a": 1},
            "megatron_core": "evil",
        }
    },
    "a tokenizer": {
        "tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    },
    "an image processor": {
        "preprocessor_config.json": {"image_processor_type": "Evil", "auto_map": AUTO_MAP, "size": 28}
    },
    "a class of another module": {"config.json": {"_class_name": ["evil", "Evil"], "auto_map": AUTO_MAP}},
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the file that the code added by `poison` creates. Prompts whether to run code are answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ran"


def poison(folder: Path, marker: Path, files: dict[str, dict[str, Any]]) -> None:
    """Add code to a folder and its sub-folders, and reference it from the JSON files there."""
    for part in {folder, *(path for path in folder.rglob("*") if path.is_dir())}:
        (part / "evil.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
        for name, fields in files.items():
            before = json.loads((part / name).read_text(encoding="utf-8")) if (part / name).exists() else {}
            (part / name).write_text(json.dumps(before | fields), encoding="utf-8")


def load(marker: Path, load_poisoned: Callable[[], object]) -> None:
    """Load a poisoned object, which may raise UserError, and assert that its code did not run."""
    with suppress(UserError):
        load_poisoned()
    assert not marker.exists()


def test_the_added_code_runs_where_it_is_trusted(marker: Path, tmp_path: Path):
    """The control of the tests below."""
    shutil.copytree(BUILT_IN_ENCODER, tmp_path / "clip")
    poison(tmp_path / "clip", marker, POISONS["an unknown model type"])
    AutoConfig.from_pretrained(tmp_path / "clip", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("name", POISONS)
def test_poisoned_folder_runs_no_code(
    name: str, marker: Path, tmp_path: Path, bars_overrides: list[str], model_hub: type[ModelHub]
):
    checkpoint, clip = tmp_path / "checkpoint", tmp_path / "clip"
    shutil.copytree(BUILT_IN_MODEL, checkpoint)
    shutil.copytree(BUILT_IN_ENCODER, clip)
    for folder in (checkpoint, clip):
        poison(folder, marker, POISONS[name])
    for repository, folder in (("someone/pipeline", checkpoint), ("someone/clip", clip)):
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        model_hub.repositories[repository] = files
    load(marker, lambda: TextToImage.from_pretrained(checkpoint))
    load(marker, lambda: TextToImage.from_pretrained("someone/pipeline"))
    for source in (clip, "someone/clip", checkpoint, checkpoint / "text_encoder", "someone/pipeline"):
        load(marker, lambda source=source: TextEncoder.from_pretrained(source, 16))
        load(marker, lambda source=source: ClipJudge.from_pretrained(source))
    for key in ("text.encoder", "init_from"):
        overrides = [f"{key}={checkpoint}", "train.max_steps=1", f"run_dir={tmp_path / key}"]
        load(marker, lambda overrides=overrides: train(load_config(Config, overrides=[*bars_overrides, *overrides])))


# The tokenizer and the image processor are not read here.
@pytest.mark.parametrize("name", [name for name in POISONS if name not in ("a tokenizer", "an image processor")])
def test_poisoned_autoencoder_runs_no_code(name: str, marker: Path, tmp_path: Path, model_hub: type[ModelHub]):
    folder = stable_diffusion(tmp_path / "stable", "epsilon")
    poison(folder, marker, POISONS[name])
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(
        json.dumps(index | {"vae": ["evil", "Evil"], "unet": ["evil", "Evil"]}), encoding="utf-8"
    )
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    model_hub.repositories["someone/stable"] = files
    for source in (folder, "someone/stable"):
        load(marker, lambda source=source: TextToImage.from_pretrained(source))
        load(marker, lambda source=source: VAE.from_pretrained(source))


def test_poisoned_lora_runs_no_code(marker: Path, tmp_path: Path, model_hub: type[ModelHub]):
    matrix = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet = load_file(BUILT_IN_MODEL / "unet" / "diffusion_pytorch_model.safetensors")
    weight = unet[f"{matrix.removeprefix('unet.')}.weight"]
    lora = {f"{matrix}.lora_A.weight": weight[:2].clone(), f"{matrix}.lora_B.weight": weight[:, :2].clone()}
    evil = POISONS["an adapter"]["adapter_config.json"]
    adapter_metadata = json.dumps({f"unet.{key}": value for key, value in evil.items()})
    save_file(lora, tmp_path / "pytorch_lora_weights.safetensors", metadata={"lora_adapter_metadata": adapter_metadata})
    poison(tmp_path, marker, POISONS["an adapter"])
    model_hub.repositories["someone/lora"] = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for source in (tmp_path, "someone/lora"):
        load(marker, lambda source=source: TextToImage.from_pretrained(lora=source))


def _imported(tree: ast.AST) -> set[str]:
    """Return the names that a module imports from one of the libraries."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.name for node in imports if (node.module or "").split(".")[0] in LIBRARIES for name in node.names}


def _is_safe(call: ast.Call) -> bool:
    value = {keyword.arg: keyword.value for keyword in call.keywords}.get("trust_remote_code")
    return isinstance(value, ast.Constant) and value.value is False


def iptc(content: bytes) -> bytes:
    """Return an IPTC file of 8 x 8 pixels that holds an image of another format."""

    def field(record: int, number: int, value: bytes) -> bytes:
        return bytes((0x1C, record, number)) + len(value).to_bytes(2, "big") + value

    header = [(60, b"\1\0"), (20, b"\0\0\0\x08"), (30, b"\0\0\0\x08"), (120, b"\5")]
    return b"".join(field(3, *each) for each in header) + field(8, 10, content)


def test_images_start_no_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Pillow passes PostScript to Ghostscript, whatever the name of the file."""
    marker = tmp_path / "executed"
    (tmp_path / "bin").mkdir()
    interpreter = tmp_path / "bin" / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {marker}\n", encoding="utf-8")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not searched for yet
    with Image.new("RGB", (8, 8)) as image:
        for name in ("a.eps", "b.eps"):
            image.save(tmp_path / name)
    eps = (tmp_path / "b.eps").read_bytes()
    (tmp_path / "b.eps").rename(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(iptc(eps))  # whose content Pillow opens as any image
    for name in ("a.eps", "c.png"):
        with suppress(OSError), Image.open(tmp_path / name) as image:
            image.load()
        assert marker.exists()
        marker.unlink()
    for path in (tmp_path / "a.eps", tmp_path / "b.png", tmp_path / "c.png"):
        (tmp_path / f"{path.stem}.txt").write_text("a caption", encoding="utf-8")
        with pytest.raises(UserError, match="is not a readable image"):
            open_image(str(path), "--image")
    with pytest.raises(UserError, match=r"data\.image_column: .* 2 of 2 images cannot be read"):
        load_captioned_images(DataConfig(source=str(tmp_path), resolution=8))
    assert not marker.exists()


def test_every_loading_call_disables_remote_code():
    for file in (ROOT / "cond_diffusion").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = _imported(tree)
        assert not imported & set(AUTO_CLASSES)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            match call.func:
                case ast.Attribute(value=ast.Name(id=owner), attr="from_pretrained" | "from_config" | "load_config"):
                    # A class in a variable is assumed to be a library's, unless it is `cls` in a class method.
                    ours = owner not in imported and owner[0].isupper()
                    assert ours or owner in (*CONCRETE, "cls") or _is_safe(call), f"{file.name}:{call.lineno}"
                case ast.Attribute(attr="load" | "loads", value=ast.Name(id="torch" | "pickle" | "dill")):
                    pytest.fail(f"{file.name}:{call.lineno} loads a pickle")
