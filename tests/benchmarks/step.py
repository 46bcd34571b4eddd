"""Measure the time of each part of a training step, with the functions that `training.train` calls.

python tests/benchmarks/step.py [--config configs/mnist.yaml] [--steps 40] [key=value ...]
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import finished, hardware

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.cache import context_table
from cond_diffusion.data.loader import open_training_data
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.models.latents import build_latent_space
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.training.batches import Batches
from cond_diffusion.training.setup import make_accelerator, new_optimizer, new_unet
from cond_diffusion.training.state import TrainingState


class Clock:
    """Records the time of each part of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        self.steps.append(defaultdict(float))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        finished()
        self.steps[-1][name] += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/mnist.yaml"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("words", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    config = load_config(Config, arguments.config, arguments.words)

    accelerator = make_accelerator(config)
    latent_space = build_latent_space(config.latent)
    training_data = open_training_data(config.data, config.seed)
    text_encoder = TextEncoder.from_pretrained(
        config.text.encoder, config.text.max_length, config.text.split_phrases
    ).to(accelerator.device)
    contexts = context_table(text_encoder, training_data.captions(), accelerator)  # type: ignore[union-attr]
    objective = Objective(config.objective, NoiseSchedule(config.schedule))
    unet = new_unet(config, text_encoder.context_dim, latent_space).to(accelerator.device)
    network, optimizer = accelerator.prepare(unet, new_optimizer(config.train, unet))
    state = TrainingState(accelerator.unwrap_model(network), optimizer, config.train, accelerator)
    batches = Batches(config, training_data, contexts, objective, accelerator, 0, latent_space)

    clock, warm_up = Clock(), 5
    for step in range(warm_up + arguments.steps):
        clock.begin()
        with clock.part("data"):
            micro_batches = list(batches.next_step())
        for batch in micro_batches:
            with clock.part("forward"):
                loss = objective.loss(network, batch.x_0, batch.t, batch.eps, batch.context)
            with clock.part("backward"):
                accelerator.backward(loss / len(micro_batches))
        with clock.part("clipping"):
            accelerator.clip_grad_norm_(network.parameters(), config.train.max_grad_norm)
        with clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        with clock.part("averages"):
            state.update_averages(step + 1)

    steps = clock.steps[warm_up:]
    whole = statistics.median(sum(parts.values()) for parts in steps)
    images = config.train.batch_size * config.train.gradient_accumulation_steps
    print(f"On {hardware()}; {arguments.config.stem}, medians of {len(steps)} steps of {images} images.\n")
    print("| part | ms | share |\n|---|---|---|")
    for name in steps[0]:
        time_of_part = statistics.median(parts[name] for parts in steps)
        print(f"| {name} | {1e3 * time_of_part:.1f} | {time_of_part / whole:.1%} |")
    print(f"| the step | {1e3 * whole:.1f} | {images / whole:.0f} images per second |")


if __name__ == "__main__":
    main()
