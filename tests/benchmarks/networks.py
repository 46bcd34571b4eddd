"""Compare our UNet with diffusers' `UNet2DConditionModel` of the same weights: a training step, and guided sampling.

    python tests/benchmarks/networks.py [--sizes built-in rgb64 stable-diffusion] [--modes default bf16] [--rounds 7]

Each uses its usual setup: ours trains with fused AdamW, diffusers' with AdamW as in its examples; both sample in
20 steps of DDIM at scale 3, ours with our sampler and guidance, diffusers' with DDIMScheduler. In the mode `default`,
ours has the precision that `auto` selects, and diffusers' is fp32. Modes that the machine is slow in are skipped.

Each measurement uses a new process for each network, alternately, since the memory allocator has settings and a state
for each process: ours has the settings of `train.py` and `sample.py` (`device.keep_memory`), diffusers' those of glibc,
or ours with `--keep-memory`.
"""

import argparse
import gc
import multiprocessing
import os
import tempfile
from functools import partial
from multiprocessing.connection import Connection

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from measuring import finished, flop, hardware, memory_gb, peak_flop_per_second, peak_memory_gb, seconds
from torch.nn import functional as F

from cond_diffusion.config.run import ObjectiveConfig
from cond_diffusion.config.schedule import ScheduleConfig
from cond_diffusion.config.unet import UNetConfig, to_diffusers
from cond_diffusion.device import DTYPES, autocast, choose_precision, keep_memory
from cond_diffusion.diffusion.guidance import guided
from cond_diffusion.diffusion.objective import Objective, denoiser
from cond_diffusion.diffusion.samplers import ddim
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.models.unet import UNet

SIZES = {
    # name: (UNet config, batch size in training, batch size in sampling, tokens)
    "built-in": (
        UNetConfig((32, 64), (False, True), num_groups=4, in_channels=4, sample_size=14, context_dim=64),
        128,
        64,
        16,
    ),
    "rgb64": (
        UNetConfig(
            (64, 128, 256), (False, True, True), num_heads=(4, 4, 8), in_channels=3, sample_size=64, context_dim=512
        ),
        8,
        4,
        77,
    ),
    "stable-diffusion": (
        UNetConfig(
            (320, 640, 1280, 1280), (True, True, True, False), 8, 2, in_channels=4, sample_size=64, context_dim=768
        ),
        8,
        4,
        77,
    ),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, SCALE = 20, 3.0
MODES = {
    # name: (precision of ours, precision of diffusers', whether both are compiled)
    "default": ("auto", "fp32", False),
    "fp32": ("fp32", "fp32", False),
    "bf16": ("bf16", "bf16", False),
    "compiled-fp32": ("fp32", "fp32", True),
    "compiled-bf16": ("bf16", "bf16", True),
}


class Contest:
    """The two networks on the same inputs."""

    def __init__(self, size: str, mode: str) -> None:
        config, batch, drawn, tokens = SIZES[size]
        precision, self.their_precision, _ = MODES[mode]
        self.precision = choose_precision(precision, DEVICE, "--modes")
        torch.manual_seed(0)
        self.ours = UNet(config).to(DEVICE)
        with torch.no_grad():
            for weight in self.ours.parameters():  # a new network outputs 0, which makes the comparison meaningless
                weight.normal_(0, 0.05)
        self.theirs = UNet2DConditionModel.from_config(to_diffusers(config)).to(DEVICE)
        self.theirs.load_state_dict(self.ours.state_dict())
        self.theirs.train()
        shape = (config.in_channels, config.sample_size, config.sample_size)
        self.batch, self.drawn = batch, drawn
        self.x_0 = torch.randn(batch, *shape, device=DEVICE)
        self.eps = torch.randn_like(self.x_0)
        self.t = torch.randint(0, 1000, (batch,))
        self.context = torch.randn(batch, tokens, config.context_dim, device=DEVICE)
        self.x_T = torch.randn(drawn, *shape, device=DEVICE)
        self.optimizer = torch.optim.AdamW(self.ours.parameters(), 1e-4, weight_decay=0.0, fused=True)
        self.their_optimizer = torch.optim.AdamW(self.theirs.parameters(), 1e-4, weight_decay=1e-2)
        self.schedule = NoiseSchedule(ScheduleConfig())
        self.objective = Objective(ObjectiveConfig(), self.schedule)
        self.their_noise = DDPMScheduler()

    def our_step(self) -> None:
        with autocast(self.precision, DEVICE):
            loss = self.objective.loss(self.ours, self.x_0, self.t, self.eps, self.context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.ours.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def their_step(self) -> None:
        with autocast(self.their_precision, DEVICE):
            t = self.t.to(DEVICE)
            output = self.theirs(self.their_noise.add_noise(self.x_0, self.eps, t), t, self.context).sample
            loss = F.mse_loss(output.float(), self.eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.theirs.parameters(), 1.0)
        self.their_optimizer.step()
        self.their_optimizer.zero_grad()

    @torch.inference_mode()
    def our_images(self) -> torch.Tensor:
        context = self.context[: self.drawn]
        with autocast(self.precision, DEVICE):
            network = guided(
                self.ours,
                context,
                torch.zeros_like(context),
                torch.full((self.drawn,), SCALE),
                project=self.ours.project_context,
            )
            denoise = denoiser(network, self.objective.prediction, lambda x_0_hat: x_0_hat)
            timesteps = self.schedule.sampling_timesteps(STEPS)
            *_, last = ddim(denoise, self.schedule, self.x_T, timesteps, lambda: torch.randn_like(self.x_T), eta=0.0)
        return last.x

    @torch.inference_mode()
    def their_images(self) -> torch.Tensor:
        context = self.context[: self.drawn]
        both = torch.cat([torch.zeros_like(context), context])
        scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(STEPS)
        x = self.x_T
        with autocast(self.their_precision, DEVICE):
            for t in scheduler.timesteps:
                uncond, cond = self.theirs(torch.cat([x, x]), t, both).sample.chunk(2)
                x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
        return x


def serve(whose: str, size: str, mode: str, keeps_memory: bool, connection: Connection) -> None:
    """Run the calls that arrive, "step" and "images", until one is empty; answer each as `Worker.run` says."""
    if keeps_memory:
        keep_memory()
    contest = Contest(size, mode)
    network, step, images = (
        (contest.ours, contest.our_step, contest.our_images)
        if whose == "ours"
        else (contest.theirs, contest.their_step, contest.their_images)
    )
    if MODES[mode][2]:
        network.compile()
    gc.disable()
    before = memory_gb()
    connection.send(None)
    while call := connection.recv():
        {"step": step, "images": images}[call]()
        finished()
        connection.send(peak_memory_gb() - before)


class Worker:
    """A process that runs one of the two networks (see `serve`)."""

    def __init__(self, whose: str, size: str, mode: str, keeps_memory: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, end = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(whose, size, mode, keeps_memory, end), daemon=True)
        self.process.start()
        end.close()  # so that `recv` raises if the process ends
        self.connection.recv()

    def run(self, call: str) -> float:
        """Run the call, and return the peak memory of the process so far, in GB, beyond that of the networks."""
        self.connection.send(call)
        return self.connection.recv()

    def close(self) -> None:
        self.connection.send("")
        self.process.join()


def rows(size: str, mode: str, rounds: int, keeps_memory: bool) -> list[str]:
    """Measure one size in one mode, and return the lines of the table."""
    if "bf16" in mode and choose_precision("auto", DEVICE, "--modes") != "bf16":
        return [f"| {size} | {mode} | skipped: bf16 is not faster than fp32 on this machine | | | | |"]
    contest = Contest(size, mode)
    difference = (contest.our_images() - contest.their_images()).abs().max().item()
    is_exact = DEVICE.type == "cpu" and contest.precision == contest.their_precision == "fp32"
    if is_exact and not difference < 1e-3 * contest.our_images().abs().max().item():
        raise RuntimeError(f"{size}: the images differ by {difference}, so the times are not comparable")
    # Counted in eager mode: compilation may fuse or remove operations.
    work = flop(contest.our_step)
    peak = peak_flop_per_second(DEVICE, DTYPES[contest.precision])
    lines = []
    for what, call, count, work_of_one in (
        ("guided sampling, 20 steps", "images", contest.drawn, None),
        ("training step", "step", contest.batch, work),
    ):
        workers = {"ours": Worker("ours", size, mode, True), "theirs": Worker("theirs", size, mode, keeps_memory)}
        calls = {who: partial(worker.run, call) for who, worker in workers.items()}
        if MODES[mode][2]:
            first = seconds(calls, rounds=1, warm_up=0)
            lines.append(
                f"| {size} | {mode} | {what}, first call | {first['ours']:.0f} s | {first['theirs']:.0f} s | | |"
            )
        times = seconds(calls, rounds)
        for worker in workers.values():
            worker.close()
        speed = {who: count / time for who, time in times.items()}
        share = "" if work_of_one is None else f"{work_of_one / times['ours'] / peak:.0%} of {peak / 1e9:.0f} GFLOP/s"
        lines.append(
            f"| {size} | {mode} | {what} | {speed['ours']:.1f} | {speed['theirs']:.1f} "
            f"| {speed['ours'] / speed['theirs']:.2f} | {share} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [*SIZES] if DEVICE.type == "cuda" else [*SIZES][:2]
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=sizes)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep-memory", action="store_true", help="set the allocator of diffusers' process as ours")
    arguments = parser.parse_args()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # so that the first calls are those of a first run
    print(f"On {hardware()}; images per second, interleaved medians of {arguments.rounds}.\n")
    print("| network | mode | what | ours | diffusers | ratio | our share of the peak |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        for mode in arguments.modes:
            print("\n".join(rows(size, mode, arguments.rounds, arguments.keep_memory)), flush=True)
    print("\n| network | memory of a training step beyond the weights, ours | diffusers |\n|---|---|---|")
    for size in arguments.sizes:
        found = []
        for whose in ("ours", "theirs"):
            worker = Worker(whose, size, choose_precision("auto", DEVICE, "--modes"), keeps_memory=False)
            worker.run("step")
            found.append(worker.run("step"))
            worker.close()
        print(f"| {size} | {found[0]:.2f} GB | {found[1]:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
