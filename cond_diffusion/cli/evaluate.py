"""The commands `evaluate`, which compares samples with real images, and `likelihood`, a bound in bits per dimension."""

import argparse
import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

from cond_diffusion.cli.main import ArgumentParser, add_options
from cond_diffusion.config.run import Config
from cond_diffusion.config.sampling import GenerationSettings, SamplingOptions
from cond_diffusion.config.schema import expand_home, local_path
from cond_diffusion.data.loader import open_training_data
from cond_diffusion.diffusion.samplers import sampling_timesteps
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation.emoji import SOURCE as EMOJI
from cond_diffusion.evaluation.emoji import evaluate_emoji, format_emoji
from cond_diffusion.evaluation.evaluator import (
    DEFAULT_SAMPLING,
    REPORTED_OPTIONS,
    held_out_loss,
    load_evaluator,
    reported,
)
from cond_diffusion.evaluation.likelihood import bits_per_dimension, format_bits
from cond_diffusion.evaluation.metrics import load_clip_judge
from cond_diffusion.evaluation.report import Results, evaluate, format_table, sweep
from cond_diffusion.pipeline.checkpoint import lasting_name, read_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage

MODEL_OPTIONS = ("checkpoint", "dtype", "compile")


def evaluate_command(arguments: list[str] | None = None) -> None:
    """Evaluate samples of a checkpoint, print a table, and write all results to a folder."""
    parser = _parser("Compare samples of a checkpoint with real images.")
    parser.add_argument(
        "--samples",
        type=int,
        default=1000,
        help="number of images to generate, for the emoji from each subset (default: %(default)s)",
    )
    parser.add_argument("--paraphrases", action="store_true", help="use all captions except the first of each group")
    add_options(parser, SamplingOptions, only=REPORTED_OPTIONS, defaults=reported(DEFAULT_SAMPLING))
    parser.add_argument(
        "--features", type=expand_home, metavar="CLIP", help="folder or Hub id of a CLIP for feature distances"
    )
    parser.add_argument("--sweep", action="store_true", help="also sweep over guidance scales, samplers and steps")
    parser.add_argument(
        "--output", type=local_path, default=Path("evaluation"), help="output folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    _check_minimum("samples", options.samples, 10)
    given = {name: value for name, value in vars(options).items() if name in REPORTED_OPTIONS}
    sampling = replace(DEFAULT_SAMPLING, **given)
    pipe, config, checkpoint = _load(options)
    sampling = pipe.completed(sampling)
    sampling_timesteps(sampling.sampler, pipe.schedule, sampling.steps)
    sampling.per_prompt("guidance_scale", 1)
    settings = {
        "checkpoint": checkpoint,
        **{name: getattr(options, name) for name in ("samples", "paraphrases", "features")},
        "dtype": pipe.precision,
        **reported(sampling),
    }
    if config.data.source == EMOJI:
        for name in ("paraphrases", "features", "sweep"):
            if getattr(options, name):
                hint = "which have a judge of their own; remove it"
                raise UserError(f"--{name}: does not support the emoji data, {hint}")
        with Results(options.output, settings) as results:
            print(format_emoji(evaluate_emoji(pipe, options.samples, sampling, results)))
        print(f"\nsaved {options.output}")
        return
    for package in ("torchmetrics", "matplotlib") if options.sweep else ("torchmetrics",):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'evaluate: requires {package}; install it with: pip install "cond_diffusion[eval]"')
    features = load_clip_judge(options.features, config.data) if options.features else None
    with Results(options.output, settings) as results:
        training_data = open_training_data(config.data, config.seed)
        evaluator = load_evaluator(pipe, config, features, training_data)
        prompts = evaluator.prompts(options.samples, paraphrases=options.paraphrases)
        count = options.samples // len(prompts) * len(prompts)
        generate = partial(evaluator.generate, pipe, prompts, count)
        samples = evaluate(evaluator, [prompt for prompt, _ in prompts], generate, sampling, results)
        print(format_table(samples, results.part("held-out loss", lambda: held_out_loss(pipe, config, training_data))))
        if options.sweep:
            sweep(evaluator, generate, sampling, results, count, pipe.schedule.num_timesteps)
    print(f"\nsaved {options.output}")


def likelihood_command(arguments: list[str] | None = None) -> None:
    """Print the variational bound of the data that a checkpoint was trained on."""
    parser = _parser("Compute the variational bound of real images, in bits per dimension.")
    parser.add_argument("--split", default="test", help="split of the training data (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="number of images, starting at the first (default: all)")
    parser.add_argument("--batch-size", type=int, default=250, help="images per batch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    options = parser.parse_args(arguments)
    _check_minimum("samples", options.samples, 1)
    _check_minimum("batch-size", options.batch_size, 1)
    pipe, config, _ = _load(options)
    size, seed = options.batch_size, options.seed
    bits = bits_per_dimension(pipe, config.data, options.split, count=options.samples, batch_size=size, seed=seed)
    print(format_bits(*bits))


def _parser(description: str) -> argparse.ArgumentParser:
    parser = ArgumentParser(description=description)
    add_options(parser, GenerationSettings, only=MODEL_OPTIONS)
    return parser


def _check_minimum(option: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise UserError(f"--{option}: {value}; expected at least {minimum}")


def _load(options: argparse.Namespace) -> tuple[TextToImage, Config, str]:
    """Return the pipeline, the config of its training, and the name to record of the checkpoint."""
    settings = GenerationSettings(**{name: value for name, value in vars(options).items() if name in MODEL_OPTIONS})
    pipe, config = read_checkpoint(
        settings.checkpoint,
        lambda found: (TextToImage.from_checkpoint(found, dtype=settings.dtype), found.run_config),
    )
    pipe.to_accelerator()
    name = lasting_name(settings.checkpoint, pipe.folder)
    return pipe.compile() if settings.compile else pipe, config, name
