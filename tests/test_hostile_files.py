"""Damaged, hostile or oversized files: each gives a UserError or a correct result, never another exception."""

import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from stable_diffusion import autoencoder
from transformers import CLIPTextModel

from cond_diffusion import TextToImage, UNet, UNetConfig, UserError
from cond_diffusion.cli.commands import read_prompts
from cond_diffusion.cli.main import command_line
from cond_diffusion.config import unet as unet_config
from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.config.sampling import GenerationSettings
from cond_diffusion.config.schema import from_json, read_json, read_text
from cond_diffusion.data.dataset import open_captioned_files
from cond_diffusion.data.loader import CaptionedStream
from cond_diffusion.images import open_image
from cond_diffusion.models.ema import save_snapshot, snapshots_until, weights_of_width
from cond_diffusion.models.latents import VAE, AutoencoderConfig
from cond_diffusion.models.lora import FILE_NAME, add_lora_file
from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER, TextEncoder, clip_errors, clip_kind, load_tokenizer
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL, Checkpoint
from cond_diffusion.pipeline.generate import CHUNK_PREFIX, encode_png, read_settings
from cond_diffusion.pipeline.run_folder import find_corruption, read_progress
from cond_diffusion.training.setup import build_run, make_accelerator

DEEP = "[" * 200_000
WRONG = [
    *("0", "-1", "1.5", "1e400", "-1e9", "1e9", "1" * 5000, "NaN", "Infinity", "-Infinity", "null", "true", "false"),
    *('""', '"1"', '"\\u001b[31m"', '"\\ud800"', '"\\u0000"', "[]", "[0]", "[null]", "[[1]]", "[true]", '["a"]', "{}"),
    *('{"a": 1}', "[1, 2, 3]", "[1e9]", "[NaN]", "[-1]", '{"": null}', "[" * 150 + "]" * 150, DEEP),
]
WHOLE = ["", "\0", "{", "[]", "5", '"a"', "null", DEEP, '{"a":' * 100_000, "\ufeff{}", "{}", "\xff", "// a\n{}"]


def with_field(value: Any, path: tuple[Any, ...], wrong: str) -> str:
    """Return JSON text with the text `wrong` in place of the field at `path`."""
    if not path:
        return wrong
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [(key, with_field(item, path[1:], wrong) if key == path[0] else json.dumps(item)) for key, item in parts]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {text}" for key, text in inner) + "}"
    return "[" + ", ".join(text for _, text in inner) + "]"


def paths_of(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each field, of fields inside objects, and of the first item of lists."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else []
    for key, item in items:
        yield (key,)
        yield from ((key, *path) for path in paths_of(item))


def accepts(read: Callable[[], object]) -> bool:
    """Return whether `read` succeeds; False for a UserError. Other exceptions fail the test."""
    with suppress(UserError):
        read()
        return True
    return False


PROGRESS = {
    "step": 2,
    "samples_per_step": 8,
    "held_out_loss": 0.5,
    "data": {"source": "a"},
    "stream": {"epoch": 0, "block": 1, "position": 2, "shard": 0, "inside": None},
    "scaler": {"scale": 1.0},
    "base": "a",
}
INDEX = {"metadata": {"total_size": 5}, "weight_map": {"conv_in.weight": "a.safetensors"}}


def unet_of(folder: Path) -> None:
    """Read a UNet's config as `UNet.from_pretrained` does, and build it without weights."""
    file = folder / "unet" / "config.json"
    with torch.device("meta"):
        UNet(unet_config.from_diffusers(read_json(file), file))


@cache
def text_model() -> CLIPTextModel:
    return TextEncoder.from_pretrained("builtin", None).clip


def tokenizer_of(folder: Path) -> None:
    """Read a tokenizer as `TextEncoder.from_pretrained` does, and embed a caption."""
    with clip_errors("text.encoder", folder):
        encoder = TextEncoder(load_tokenizer(folder / "tokenizer", text_model().config.vocab_size), text_model(), None)
    assert encoder(["a digit one"]).isfinite().all()


def shards_of(folder: Path) -> None:
    UNet.from_pretrained(folder / "sharded")


FILES: dict[str, Callable[[Path], object]] = {
    "unet/config.json": unet_of,
    "model_index.json": lambda folder: Checkpoint(folder).latent_space,
    "scheduler/scheduler_config.json": lambda folder: Checkpoint(folder).prediction,
    "checksums.json": lambda folder: find_corruption(folder, with_state=True),
    "text_encoder/config.json": lambda folder: clip_kind(folder / "text_encoder"),
    "clip/config.json": lambda folder: clip_kind(folder / "clip"),
    "tokenizer/tokenizer_config.json": tokenizer_of,
    "vae/config.json": lambda folder: from_json(AutoencoderConfig, read_json(folder / "vae" / "config.json"), "vae"),
    "state/progress.json": read_progress,
    "sharded/diffusion_pytorch_model.safetensors.index.json": shards_of,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all files that are read."""
    folder = tmp_path_factory.mktemp("hostile") / "checkpoint"
    for part in ("unet", "scheduler", "text_encoder", "tokenizer", "model_index.json"):
        (shutil.copytree if (BUILT_IN_MODEL / part).is_dir() else shutil.copy)(
            BUILT_IN_MODEL / part, make(folder) / part
        )
    make(folder / "clip")
    shutil.copy(BUILT_IN_ENCODER / "config.json", folder / "clip")
    vae = {**autoencoder().config, "_class_name": "AutoencoderKL"}
    checksum = {"bytes": 301, "blake2b": "a" * 128}
    for name, fields in {
        "vae/config.json": {key: value for key, value in vae.items() if key != "_use_default_values"},
        "state/progress.json": PROGRESS,
        "checksums.json": {"model_index.json": checksum, "unet/config.json": checksum},
        "sharded/config.json": json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")),
        "sharded/diffusion_pytorch_model.safetensors.index.json": INDEX,
    }.items():
        make((folder / name).parent)
        (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


SLOW_TO_READ = "tokenizer/tokenizer_config.json"  # with each value, all of the tokenizer's files are read


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == SLOW_TO_READ else name for name in FILES]
)
def test_every_wrong_value_of_every_field_is_refused_or_correct(name: str, folder: Path):
    file, read = folder / name, FILES[name]
    content = file.read_text(encoding="utf-8")
    fields, refused = json.loads(content), 0
    checksums = (folder / "checksums.json").read_bytes()
    if name != "checksums.json":
        (folder / "checksums.json").unlink()
    try:
        for path in paths_of(fields):
            for wrong in WRONG:
                file.write_text(with_field(fields, path, wrong), encoding="utf-8")
                refused += not accepts(lambda: read(folder))
        for text in WHOLE:
            file.write_bytes(text.encode("latin-1" if text == "\xff" else "utf-8"))
            accepts(lambda: read(folder))
    finally:
        file.write_text(content, encoding="utf-8")
        (folder / "checksums.json").write_bytes(checksums)
    assert refused > len(WRONG) or name == "checksums.json"  # which reports damage as text


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MATRIX = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def small_unet() -> UNet:
    return UNet(UNetConfig(channels=(32, 64), num_groups=8, in_channels=1, sample_size=8, context_dim=16))


def lora_file(folder: Path, metadata: str = "{}", value: float = 0.1) -> Path:
    """Write a LoRA of rank 2 for a matrix of `small_unet`."""
    tensors = {
        f"unet.{MATRIX}.lora_A.weight": torch.full((2, 64), value),
        f"unet.{MATRIX}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(tensors, make(folder) / FILE_NAME, metadata={"lora_adapter_metadata": metadata})
    return folder / FILE_NAME


def snapshot_run(folder: Path, value: float = 0.0) -> Path:
    """Write two snapshots of a tensor; return the path of a checkpoint of the same run."""
    for step in (1, 2):
        save_snapshot(folder, step, [(width, {"a": torch.full((2,), value)}) for width in (0.1, 0.05)])
    return folder / "checkpoints" / "step-00000002"


def change_tensor(file: Path, value: float) -> str:
    """Write `value` into the last tensor of a file; return the tensor's name."""
    tensors = load_file(file)
    name = max(tensors)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path):
    shutil.copytree(BUILT_IN_MODEL, tmp_path / "model")
    autoencoder().save_pretrained(tmp_path / "vae")
    clip = change_tensor(tmp_path / "model" / "text_encoder" / "model.safetensors", value)
    cases: list[tuple[str, Callable[[], object]]] = [
        (change_tensor(tmp_path / "model" / WEIGHTS, value), lambda: UNet.from_pretrained(tmp_path / "model" / "unet")),
        (clip.removeprefix("text_model."), lambda: TextEncoder.from_pretrained(tmp_path / "model", None)),
        (
            change_tensor(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", value),
            lambda: VAE.from_pretrained(tmp_path / "vae"),
        ),
        ("lora_A", lambda: add_lora_file(small_unet(), lora_file(tmp_path / "lora", value=value))),
        ("0.a", lambda: weights_of_width(snapshot_run(tmp_path / "run", value), 0.08)),
    ]
    for name, load in cases:
        with pytest.raises(UserError, match=name):
            load()


def test_every_wrong_value_in_the_metadata_of_safetensors_is_refused_or_correct(tmp_path: Path):
    unet, tensors = small_unet(), {"0.a": torch.zeros(2), "1.a": torch.zeros(2)}
    checkpoint = snapshot_run(tmp_path)
    snapshot = tmp_path / "snapshots" / "step-00000002.safetensors"
    for wrong in [*WRONG, *WHOLE]:
        for metadata in (wrong, f'{{"unet.lora_alpha": {wrong}}}', f'{{"lora_alpha": {wrong}}}'):
            if accepts(lambda metadata=metadata: add_lora_file(unet, lora_file(tmp_path / "lora", metadata))):
                assert all(weight.isfinite().all() for weight in unet.parameters())
        for widths in ({"widths": wrong}, {"widths": f"[{wrong}, {wrong}]"}, {"width": wrong}):
            save_file(tensors, snapshot, metadata=widths)
            accepts(lambda: weights_of_width(checkpoint, 0.08))


@pytest.mark.parametrize("shape", [(), (0,), (2,), (0, 64), (2, 64), (2, 64, 1, 1), (3, 64)])
def test_lora_of_any_shape_is_refused_or_added(shape: tuple[int, ...], tmp_path: Path):
    for up in ((), (64,), (64, 0), (64, 2), (64, 2, 1, 1)):
        tensors = {f"unet.{MATRIX}.lora_A.weight": torch.ones(shape), f"unet.{MATRIX}.lora_B.weight": torch.ones(up)}
        save_file(tensors, tmp_path / FILE_NAME)
        accepts(lambda: add_lora_file(small_unet(), tmp_path))


def test_files_that_are_no_snapshots_are_ignored(tmp_path: Path):
    checkpoint = snapshot_run(tmp_path)
    for name in ("step-foo", "step-", "step-1.5", "step--0000001", "step-00000000", "step-00000001.old"):
        (tmp_path / "snapshots" / f"{name}.safetensors").write_bytes(b"?")
    assert [snapshot.step for snapshot in snapshots_until(tmp_path, 2)] == [1, 1, 2, 2]
    assert weights_of_width(checkpoint, 0.08)["a"].tolist() == [0, 0]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()


TAR_MEMBERS = {
    **dict.fromkeys(("pth", "pyd", "pickle", "cbor", "mp", "msg", "ten", "tb", "npy", "npz"), b"garbage\x80"),
    **dict.fromkeys(("cls", "id"), b"9" * 30),
    "json": DEEP.encode(),
    "x.gz": b"garbage",
}
METADATA = {
    "metadata.jsonl": ["", "\n\n", "[1]", "5", "{}", '{"file_name": 5}', '{"file_name": "/dev/zero"}', DEEP],
    "metadata.csv": ["", "\n", "file_name", "file_name,text\na.png", f"file_name,text\na.png,{'x' * 200_000}"],
    "metadata.parquet": ["", "PAR1"],
}


@pytest.mark.parametrize("streaming", [False, True])
def test_stray_members_and_metadata_are_refused_or_ignored(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a member of a tar reached torch.load"))
    sources = []
    for kind, content in TAR_MEMBERS.items():
        sources.append(tmp_path / f"{kind}.tar")
        with tarfile.open(sources[-1], "w") as archive:
            for i in range(2):
                for suffix, data in {"png": png(), "txt": b"a bar", kind: content}.items():
                    member = tarfile.TarInfo(f"{i:04}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    for name, contents in METADATA.items():
        for i, content in enumerate(contents):
            sources.append(make(tmp_path / f"{name}-{i}"))
            (sources[-1] / "a.png").write_bytes(png())
            (sources[-1] / name).write_text(content, encoding="utf-8")
    read = set()
    for source in sources:
        columns: dict[str, Any] = {"image_column": "png", "caption_column": "txt"} if source.suffix == ".tar" else {}
        config = DataConfig(source=str(source), resolution=8, **columns)
        if accepts(lambda config=config: CaptionedStream(config, 0) if streaming else open_captioned_files(config)):
            read.add(source.name)
    assert {"pth.tar", "pickle.tar", "cbor.tar", "npy.tar"} <= read
    assert not {"metadata.jsonl-0", "metadata.csv-0", "metadata.parquet-0", "json.tar"} & read


def test_what_is_not_a_regular_file_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    unet = small_unet()
    for i, path in enumerate(["/dev/zero", str(tmp_path / "pipe"), str(make(tmp_path / "folder"))]):
        data, clip, weights = make(tmp_path / f"data-{i}"), make(tmp_path / f"clip-{i}"), tmp_path / f"unet-{i}"
        unet.save_pretrained(weights)
        (weights / Path(WEIGHTS).name).unlink()
        for link in (data / "a.png", data / "a.txt", clip / "config.json", weights / Path(WEIGHTS).name):
            link.symlink_to(path)
        reads: list[Callable[[], object]] = [
            lambda weights=weights: UNet.from_pretrained(weights),
            lambda path=path: read_text(Path(path), "--config"),
            lambda path=path: read_prompts(path),
            lambda path=path: read_settings(path, "--from-image"),
            lambda path=path: open_image(path, "--image"),
            lambda path=path: add_lora_file(unet, path, local_files_only=True),
            lambda data=data: open_captioned_files(DataConfig(source=str(data))),
            lambda path=path: open_captioned_files(DataConfig(source=path)),
            lambda clip=clip: TextEncoder.from_pretrained(clip, None),
        ]
        for read in reads:
            assert not accepts(read)


def test_every_wrong_setting_in_a_png_is_refused_or_correct(tmp_path: Path):
    file = tmp_path / "a.png"
    settings = GenerationSettings(prompts=("a",), seed=1, guidance_scale=2.0, eta=0.5, sampler="ddim")
    file.write_bytes(encode_png(Image.new("L", (2, 2)), settings))
    with Image.open(file) as image:
        stored: dict[str, str] = image.text  # type: ignore[attr-defined]
    for name in [*stored, *(f"{CHUNK_PREFIX}{field}" for field in ("strength", "guidance_interval", "lora", "order"))]:
        for wrong in [*WRONG, *WHOLE]:
            chunks = PngImagePlugin.PngInfo()
            for chunk, text in {**stored, name: wrong}.items():
                chunks.add_itxt(chunk, text)
            Image.new("L", (2, 2)).save(file, pnginfo=chunks)
            accepts(lambda: GenerationSettings(**read_settings(str(file), "--from-image")))


def test_text_of_a_file_reaches_the_terminal_escaped(capsys: pytest.CaptureFixture[str]):
    hostile = "a\x1b]0;title\x07\x1b[2J\u202eb\nc"

    def command() -> None:
        logging.getLogger("cond_diffusion.test").warning("%s", hostile)
        raise UserError(f"key: {hostile}")

    assert command_line(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() and r"\x1b[2J" in line for line in lines)


TOO_LARGE = [
    *("unet.channels=[1000000000,64]", "unet.channels=[1000000,1000000]", "unet.blocks_per_level=1000000000"),
    *("data.resolution=100000", "train.batch_size=1000000000000", "sample.num_images=100000000000"),
]


@pytest.mark.parametrize("override", TOO_LARGE)
def test_run_that_exceeds_the_memory_is_refused_before_it_allocates(override: str, tmp_path: Path):
    overrides = [f"run_dir={tmp_path / 'run'}", 'sample.prompts=["a"]', override]
    with pytest.raises(UserError, match=override.split("=")[0]):
        build_run(config := load_config(Config, overrides=overrides), make_accelerator(config))
    assert not (tmp_path / "run").exists()


def test_sampling_that_exceeds_the_memory_is_refused_before_it_allocates():
    pipe = TextToImage.from_pretrained()
    for options in ({"num_images": 10**11}, {"num_images": 10**11, "batch_size": 10**11}):
        with pytest.raises(UserError, match="num_images"):
            pipe("a", steps=1, **options)
    unet = UNet(UNetConfig(channels=(32,), attention=(True,), in_channels=4, sample_size=2**20, context_dim=64))
    with pytest.raises(UserError, match="GB"):
        TextToImage(unet, pipe.text_encoder, pipe.prediction, pipe.latent_space)("a", steps=1)


def test_prompts_are_embedded_in_batches_and_give_the_same_images(monkeypatch: pytest.MonkeyPatch):
    pipe = TextToImage.from_pretrained()
    prompts, sizes, embed = [f"the number {i}" for i in range(5)], [], pipe.text_encoder.embed
    expected = pipe(prompts, num_images=2, steps=1, batch_size=3, output_type="pt", progress=False)
    monkeypatch.setattr("cond_diffusion.pipeline.text_to_image.PROMPT_BATCH_SIZE", 2)
    monkeypatch.setattr(pipe.text_encoder, "embed", lambda ids: (sizes.append(len(ids)), embed(ids))[1])
    images = pipe(prompts, num_images=2, steps=1, batch_size=3, output_type="pt", progress=False)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    assert max(sizes) == 2
