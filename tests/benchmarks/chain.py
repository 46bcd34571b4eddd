"""The whole chain of 1000 steps beside a few steps of a solver: time, prompt accuracy, Fréchet distance.

python tests/benchmarks/chain.py [--samples 500] [--guidance-scale 1.5] [--steps 20]
"""

import argparse
import time

from measuring import hardware

from cond_diffusion.config.run import checkpoint_config
from cond_diffusion.evaluation.evaluator import Judging, Sampling
from cond_diffusion.pipeline.text_to_image import TextToImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="builtin")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--sampler", default="dpm_solver")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15, 20])
    parser.add_argument("--chain", type=int, help="steps of the chain (default: all)")
    arguments = parser.parse_args()

    pipe = TextToImage.from_pretrained(arguments.checkpoint).to_accelerator()
    judging = Judging(pipe, checkpoint_config(pipe.folder))
    prompts = judging.prompts(arguments.samples)
    floor = judging.floor(arguments.samples)
    print(f"On {hardware()}; {arguments.samples} samples at scale {arguments.guidance_scale}, by {judging.judge}.")
    print(f"As many real pictures have a Fréchet distance of {floor:.2f}.\n")
    print("| sampler | steps | seconds | faster | prompt accuracy | Fréchet distance |\n|---|---|---|---|---|---|")
    whole = 0.0
    for sampler, steps in [("ddpm", arguments.chain), *((arguments.sampler, steps) for steps in arguments.steps)]:
        sampling = Sampling(sampler, steps, arguments.guidance_scale)
        start = time.perf_counter()
        samples = judging.draw(prompts, arguments.samples, sampling)
        seconds = time.perf_counter() - start
        whole = whole or seconds
        accuracy, distance = judging.accuracy_and_distance(samples)
        print(
            f"| {sampler} | {steps or pipe.schedule.num_timesteps} | {seconds:.1f} | {whole / seconds:.1f} "
            f"| {accuracy:.1%} | {distance:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
