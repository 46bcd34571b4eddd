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
from cond_diffusion.training.batches import Batches
from cond_diffusion.training.setup import build_run, make_accelerator
from cond_diffusion.training.state import TrainingState
from cond_diffusion.training.trainer import build_text_embedder, open_data


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
    # A folder that does not exist; nothing is written into it.
    config = load_config(Config, arguments.config, ["run_dir=runs/benchmark-of-a-step", *arguments.words])

    accelerator = make_accelerator(config)
    run = build_run(config, accelerator)
    training_data = open_data(run)
    text_embedder = build_text_embedder(training_data.captions(), run.text_encoder, config.train, accelerator)
    state = TrainingState(accelerator.unwrap_model(run.network), run.optimizer, config.train, accelerator)
    batches = Batches(run.config, training_data, text_embedder, run.objective, accelerator, 0, run.latent_space)

    clock, warm_up = Clock(), 5
    for step in range(warm_up + arguments.steps):
        clock.begin()
        with clock.part("data"):
            micro_batches = list(batches.next_step())
        for batch in micro_batches:
            with clock.part("forward"):
                loss = run.objective.loss(run.network, batch.x_0, batch.t, batch.eps, batch.context)
            with clock.part("backward"):
                accelerator.backward(loss / len(micro_batches))
        with clock.part("clipping"):
            accelerator.clip_grad_norm_(run.network.parameters(), config.train.max_grad_norm)
        with clock.part("optimizer"):
            run.optimizer.step()
            run.optimizer.zero_grad()
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
