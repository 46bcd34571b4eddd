"""A network that is sharded among processes (FSDP2) writes and reads the same checkpoints as one that is not.

Accelerate shards on GPUs alone, so here torch's own `fully_shard` does, on two processes without one.
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
    """Train on random pictures, this process on its share of each batch, and save; sharded if there are several."""
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
    with Saver(Path(config.run_dir), config, pipe, state, accelerator) as saver:
        for step in range(start, start + steps):
            draw = torch.Generator().manual_seed(step)
            x, t = torch.randn(BATCH, 1, 8, 8, generator=draw), torch.randint(1000, (BATCH,), generator=draw)
            context, target = torch.randn(BATCH, 16, 64, generator=draw), torch.randn(x.shape, generator=draw)
            mine = slice(process, None, processes)
            F.mse_loss(unet(x[mine], t[mine], context[mine]), target[mine]).backward()
            optimizer.step()
            optimizer.zero_grad()
            state.update_averages(step + 1)
        saver.save(start + steps, {"step": start + steps}, snapshot=True)
        saver.finish(must=True)


def as_process(process: int, config: Config, start: int, steps: int) -> None:
    torch.set_num_threads(1)
    run(config, process, PROCESSES, start, steps)


def run_sharded(config: Config, start: int, steps: int) -> None:
    run_in_processes(PROCESSES, as_process, config, start, steps)


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The training state, put together from its pieces by hand."""
    found: dict[str, torch.Tensor] = {}
    for stem in ("unet", "optimizer", "narrow_ema"):
        files = sorted((checkpoint / "state").glob(f"{stem}-0000?-of-00002.safetensors"))
        assert len(files) == PROCESSES
        local_shards = [load_file(file) for file in files]
        for name, first in local_shards[0].items():
            whole = torch.cat([piece[name] for piece in local_shards]) if first.ndim else first
            found[f"state/{stem}.safetensors:{name}"] = whole
    return found


@pytest.mark.slow
def test_a_sharded_run_writes_whole_weights_and_its_state_in_pieces_and_any_number_of_processes_goes_on(
    bars_config: Config, tmp_path: Path
):
    config = replace(bars_config, train=replace(bars_config.train, snapshots=1))  # which keeps a second average
    sharded, alone = (replace(config, run_dir=str(tmp_path / name)) for name in ("sharded", "alone"))
    run(alone, 0, 1, 0, 3)
    run_sharded(sharded, 0, 3)
    expected = weights(checkpoints(tmp_path / "alone")[-1])
    (checkpoint,) = checkpoints(tmp_path / "sharded")
    averaged = "unet/diffusion_pytorch_model.safetensors"
    local_shards = whole_state(checkpoint)
    for name, value in expected.items():
        found = (
            load_file(checkpoint / averaged)[name.split(":")[1]] if name.startswith(averaged) else local_shards[name]
        )
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5, msg=name)
    assert (
        sum(file.stat().st_size for file in checkpoint.rglob("state/unet-*"))
        < 1.2 * (checkpoints(tmp_path / "alone")[-1] / "state" / "unet.safetensors").stat().st_size
    )
    assert len(snapshots_until(tmp_path / "sharded", 3)) == 2
    TextToImage.from_pretrained(tmp_path / "sharded")("seven", steps=2, progress=False)

    run(alone, 0, 1, 3, 2)
    run_sharded(sharded, 3, 2)  # two processes go on
    run(sharded, 0, 1, 5, 2)  # then one alone
    run(alone, 0, 1, 5, 2)
    expected, found = (weights(checkpoints(tmp_path / name)[-1]) for name in ("alone", "sharded"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4, msg=name)
