"""Checkpoints of a network that is sharded among processes (FSDP2) equal those of one that is not.

Accelerate shards on GPUs only, so these tests use torch's `fully_shard` on two CPU processes.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import run_in_processes, weights
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from cond_diffusion import TextToImage
from cond_diffusion.config.run import Config
from cond_diffusion.config.schedule import ScheduleConfig
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.diffusion.objective import Prediction
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.models.ema import snapshots_until
from cond_diffusion.models.latents import PixelPatchify
from cond_diffusion.models.layers import ResidualBlock
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.run_folder import checkpoints
from cond_diffusion.training.state import Saver, TrainingState

UNET = UNetConfig(
    channels=(32, 32), attention=(False, True), num_groups=8, in_channels=1, sample_size=8, context_dim=64
)
BATCH, PROCESSES = 8, 2


def run(config: Config, process: int, processes: int, start: int, steps: int) -> None:
    """Train on random images, this process on its part of each batch, and save; sharded if `processes` > 1."""
    torch.manual_seed(0)
    unet = UNet(UNET)
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        for module in unet.modules():
            if isinstance(module, ResidualBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(unet, mesh=mesh)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, fused=True)
    accelerator = Accelerator(cpu=True)
    state = TrainingState(unet, optimizer, config.train, accelerator)
    assert state.sharded == (processes > 1)
    if start:
        assert state.load(checkpoints(Path(config.run_dir))[-1])["step"] == start
    prediction = Prediction("epsilon", NoiseSchedule(ScheduleConfig()))
    pipe = TextToImage(state.averaged_unet(), TextEncoder.from_pretrained("builtin", 16), prediction, PixelPatchify(1))
    with Saver(config, pipe, state, accelerator) as saver:
        for step in range(start, start + steps):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, 1, 8, 8, generator=generator)
            t = torch.randint(1000, (BATCH,), generator=generator)
            context = torch.randn(BATCH, 16, 64, generator=generator)
            target = torch.randn(x.shape, generator=generator)
            local = slice(process, None, processes)
            F.mse_loss(unet(x[local], t[local], context[local]), target[local]).backward()
            optimizer.step()
            optimizer.zero_grad()
            state.update_averages(step + 1)
        progress = {"step": start + steps, "samples_per_step": BATCH, "data": {}}
        saver.save(start + steps, progress, snapshot=True)
        saver.finish(required=True)


def run_process(process: int, config: Config, start: int, steps: int) -> None:
    torch.set_num_threads(1)
    run(config, process, PROCESSES, start, steps)


def run_sharded(config: Config, start: int, steps: int) -> None:
    run_in_processes(PROCESSES, run_process, config, start, steps)


def joined_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the training state, joined from its shards."""
    state: dict[str, torch.Tensor] = {}
    for stem in ("unet", "optimizer", "narrow_ema"):
        files = sorted((checkpoint / "state").glob(f"{stem}-0000?-of-00002.safetensors"))
        assert len(files) == PROCESSES
        shards = [load_file(file) for file in files]
        for name, first in shards[0].items():
            joined = torch.cat([shard[name] for shard in shards]) if first.ndim else first
            state[f"state/{stem}.safetensors:{name}"] = joined
    return state


@pytest.mark.slow
def test_sharded_run_writes_full_averages_and_sharded_state_that_any_number_of_processes_resumes(
    bars_config: Config, tmp_path: Path
):
    config = replace(bars_config, train=replace(bars_config.train, snapshots=1))  # for a second average
    sharded, unsharded = (replace(config, run_dir=str(tmp_path / name)) for name in ("sharded", "unsharded"))
    run(unsharded, 0, 1, 0, 3)
    run_sharded(sharded, 0, 3)
    expected = weights(checkpoints(tmp_path / "unsharded")[-1])
    (checkpoint,) = checkpoints(tmp_path / "sharded")
    averaged = "unet/diffusion_pytorch_model.safetensors"
    average, state = load_file(checkpoint / averaged), joined_state(checkpoint)
    for name, value in expected.items():
        actual = average[name.split(":")[1]] if name.startswith(averaged) else state[name]
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-5, msg=name)
    assert (
        sum(file.stat().st_size for file in checkpoint.rglob("state/unet-*"))
        < 1.2 * (checkpoints(tmp_path / "unsharded")[-1] / "state" / "unet.safetensors").stat().st_size
    )
    assert len(snapshots_until(tmp_path / "sharded", 3)) == 2
    TextToImage.from_pretrained(tmp_path / "sharded")("seven", steps=2, progress=False)

    run(unsharded, 0, 1, 3, 2)
    run_sharded(sharded, 3, 2)  # resumed by two processes
    run(sharded, 0, 1, 5, 2)  # resumed by one
    run(unsharded, 0, 1, 5, 2)
    expected, actual = (weights(checkpoints(tmp_path / name)[-1]) for name in ("unsharded", "sharded"))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-4, msg=name)
