"""Compare DDPM over all timesteps with a few steps of an ODE solver: time, prompt accuracy, Fréchet distance.

python tests/benchmarks/chain.py [--samples 500] [--guidance-scale 1.5] [--steps 20] [--dtype bf16]
"""

import argparse
import time

from measuring import hardware

from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.evaluation.evaluator import load_evaluator
from cond_diffusion.pipeline.checkpoint import open_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="builtin")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--sampler", default="dpm_solver")
    parser.add_argument("--dtype", default="auto", help="precision: auto, fp32, bf16 or fp16")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15, 20])
    parser.add_argument("--chain", type=int, help="number of DDPM steps (default: all timesteps)")
    arguments = parser.parse_args()

    pipe = TextToImage.from_pretrained(arguments.checkpoint, dtype=arguments.dtype).to_accelerator()
    evaluator = load_evaluator(pipe, open_checkpoint(arguments.checkpoint).run_config)
    prompts = evaluator.prompts(arguments.samples)
    baseline = evaluator.real_baseline(arguments.samples)
    print(
        f"On {hardware()}; {arguments.samples} samples at scale {arguments.guidance_scale} in {pipe.precision}, by "
        f"{evaluator.judge_name}."
    )
    print(f"The same number of real images has a Fréchet distance of {baseline:.2f}.\n")
    print("| sampler | steps | seconds | speedup | prompt accuracy | Fréchet distance |\n|---|---|---|---|---|---|")
    whole = 0.0
    chain = arguments.chain or pipe.schedule.num_timesteps
    for sampler, steps in [("ddpm", chain), *((arguments.sampler, steps) for steps in arguments.steps)]:
        sampling = SamplingOptions(sampler=sampler, steps=steps, guidance_scale=arguments.guidance_scale)
        start = time.perf_counter()
        samples = evaluator.generate(pipe, prompts, arguments.samples, sampling)
        seconds = time.perf_counter() - start
        whole = whole or seconds
        print(
            f"| {sampler} | {steps} | {seconds:.1f} | {whole / seconds:.1f} "
            f"| {samples.accuracy:.1%} | {evaluator.distance(samples):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
