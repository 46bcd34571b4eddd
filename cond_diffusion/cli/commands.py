"""The commands: their arguments, and what they print.

What a command runs is imported after its arguments are parsed: `--help` and wrong arguments do not wait for torch.
"""

import argparse
import importlib.util
import logging
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cond_diffusion.cli.main import ArgumentParser, add_options, config_file, config_parser
from cond_diffusion.config.run import ClipPretrainingConfig, Config, load_config
from cond_diffusion.config.sampling import (
    DEFAULT_EVALUATION,
    GUIDANCE_OF_MODEL,
    IMAGE_OPTIONS,
    REPORTED_OPTIONS,
    SAMPLERS_OF,
    GenerationSettings,
    SamplingOptions,
)
from cond_diffusion.config.schema import MAX_TEXT_BYTES, decode_text, expand_home, local_path, read_text
from cond_diffusion.errors import Interrupted, UserError, printable, user_errors

if TYPE_CHECKING:
    from cond_diffusion.pipeline.text_to_image import TextToImage

FILES = ("output", "no_labels", "film", "attention_maps")
MODEL_OPTIONS = ("checkpoint", "dtype", "compile")

logger = logging.getLogger(__name__)


def train(arguments: list[str] | None = None) -> None:
    """Train a model, or check a run before training."""
    parser = config_parser("Train a text-to-image model.", Path("mnist"))
    parser.add_argument("--check", action="store_true", help="check the data and overfit one batch, without training")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(Config, config_file(options.config), options.overrides)
    if options.check:
        from cond_diffusion.training.preflight import check

        for line in check(config):
            print(printable(line))
        return
    from cond_diffusion.training.trainer import train

    try:
        train(config)
    except Interrupted:
        raise
    except KeyboardInterrupt as interruption:  # before the first step or after the last
        message = "interrupted; the same command with resume=true continues from the newest checkpoint"
        raise KeyboardInterrupt(message) from interruption


def pretrain_clip(arguments: list[str] | None = None) -> None:
    """Train a small CLIP on a captioned data set."""
    options = config_parser("Train a small CLIP on a captioned data set.").parse_intermixed_args(arguments)
    config = load_config(ClipPretrainingConfig, options.config and config_file(options.config), options.overrides)
    from cond_diffusion.training.clip_pretraining import pretrain

    split, accuracies = pretrain(config)
    for name, accuracy in accuracies.items():
        print(f"{split} split: {name}: {accuracy:.2%}")
    print(f"saved {config.run_dir}; use it for training with text.encoder={config.run_dir}")


def sample(arguments: list[str] | None = None) -> None:
    """Generate images from prompts."""
    description = "Generate images from prompts, as one PNG with a row per prompt or as a folder of PNGs."
    parser = ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='for example "a digit seven"')
    prompts_help = "more prompts, one per line; - is standard input"
    parser.add_argument("--prompts-file", type=expand_home, metavar="FILE", help=prompts_help)
    add_options(parser, GenerationSettings)
    parser.add_argument("--batch-size", type=int, help="images per batch (default: as many as fit, at most 64)")
    from_image_help = "PNG to regenerate from its embedded settings; other options override them"
    parser.add_argument("--from-image", type=expand_home, metavar="PNG", help=from_image_help)
    files = parser.add_argument_group("files to write")
    output_help = "all images (default: an unused name based on the prompt)"
    files.add_argument("--output", type=expand_home, metavar="PNG", help=output_help)
    files.add_argument("--no-labels", action="store_true", help="omit the prompts beside the rows")
    output_dir_help = "write one PNG per image into this folder; existing files are skipped"
    files.add_argument("--output-dir", type=expand_home, metavar="FOLDER", help=output_dir_help)
    film_help = "animation of x_t and x_0_hat during sampling, .gif or .webp"
    files.add_argument("--film", type=expand_home, metavar="FILE", help=film_help)
    maps_help = "cross-attention to words of the whole prompt"
    files.add_argument("--attention-maps", type=expand_home, metavar="PNG", help=maps_help)
    given = vars(parser.parse_intermixed_args(arguments))
    files = {name: given.pop(name) for name in FILES}
    folder, batch_size = given.pop("output_dir"), given.pop("batch_size")
    prompts = given.pop("prompts") + read_prompts(given.pop("prompts_file"))
    recorded = recorded_settings(given.pop("from_image"), given)
    settings = GenerationSettings(**{**recorded, **given, **({"prompts": prompts} if prompts else {})})
    if not settings.prompts:
        parser.error('no PROMPT; expected at least one, for example "a digit seven"')
    if folder == "":
        raise UserError("--output-dir: ''; expected a folder")
    if folder is not None and (conflicting := next((name for name, value in files.items() if value), None)):
        raise UserError(f"--{conflicting.replace('_', '-')}: does not support --output-dir; remove one of them")
    from cond_diffusion.pipeline.generate import generate_to_file, generate_to_folder

    if folder is None:
        labels = not files.pop("no_labels")
        for path in generate_to_file(settings, labels=labels, batch_size=batch_size, **files):
            print(path)
        return
    generate_to_folder(settings, folder, batch_size=batch_size)
    print(folder)


def recorded_settings(path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings stored in a PNG, without options of a sampler, input image or model that `given` replaces."""
    if path is None:
        return {}
    from cond_diffusion.pipeline.generate import read_settings

    recorded = read_settings(path, "--from-image")
    of_model = (*GUIDANCE_OF_MODEL, "ema_width", "lora")
    for option, names in {"sampler": SAMPLERS_OF, "image": IMAGE_OPTIONS, "checkpoint": of_model}.items():
        if option in given and given[option] != recorded.get(option):
            dropped = {name: recorded.pop(name) for name in names if name in recorded and name not in given}
            if dropped:
                values = ", ".join(f"{name} {value}" for name, value in dropped.items())
                logger.info("--from-image: without %s, since --%s replaces %s", values, option, recorded.get(option))
    for name in ("image", "mask"):
        if recorded.get(name) and name not in given and not Path(recorded[name]).exists():
            raise UserError(f"--from-image: {path} was made from {recorded[name]}, which is not there; give --{name}")
    return recorded


def read_prompts(file: str | None) -> list[str]:
    """Return the non-empty lines of a file, or of standard input for "-"."""
    if file is None:
        return []
    name = "--prompts-file: " + ("standard input" if file == "-" else file)
    if file == "-":
        with user_errors(f"{name} cannot be read", OSError, hint="; expected prompts, one per line"):
            content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise UserError(f"{name} has more than {MAX_TEXT_BYTES} bytes")
        text = decode_text(content, name)
    else:
        text = read_text(Path(file), "--prompts-file")
    if not (prompts := [line.strip() for line in text.splitlines() if line.strip()]):
        raise UserError(f"{name} contains no prompts; expected one per line")
    return prompts


def evaluate(arguments: list[str] | None = None) -> None:
    """Evaluate samples of a checkpoint, print a table, and write all results to a folder."""
    parser = _evaluation_parser("Compare samples of a checkpoint with real images.")
    samples_help = "number of images to generate, for the emoji from each subset (default: %(default)s)"
    parser.add_argument("--samples", type=int, default=1000, help=samples_help)
    parser.add_argument("--paraphrases", action="store_true", help="use all captions except the first of each group")
    add_options(parser, SamplingOptions, only=REPORTED_OPTIONS, defaults=vars(DEFAULT_EVALUATION))
    features_help = "folder or Hub id of a CLIP for feature distances"
    parser.add_argument("--features", type=expand_home, metavar="CLIP", help=features_help)
    parser.add_argument("--sweep", action="store_true", help="also sweep over guidance scales, samplers and steps")
    output_help = "output folder (default: %(default)s)"
    parser.add_argument("--output", type=local_path, default=Path("evaluation"), help=output_help)
    options = parser.parse_args(arguments)
    _check_minimum("samples", options.samples, 10)
    given = {name: value for name, value in vars(options).items() if name in REPORTED_OPTIONS}
    sampling = replace(DEFAULT_EVALUATION, **given)
    pipe, config, checkpoint = _load(options)
    from cond_diffusion.data.loader import open_training_data
    from cond_diffusion.diffusion.samplers import sampling_timesteps
    from cond_diffusion.evaluation import emoji, evaluator, metrics, report

    sampling = pipe.completed(sampling)
    sampling_timesteps(sampling.sampler, pipe.schedule, sampling.steps)
    sampling.per_prompt("guidance_scale", 1)
    settings = {
        "checkpoint": checkpoint,
        **{name: getattr(options, name) for name in ("samples", "paraphrases", "features")},
        "dtype": pipe.precision,
        **report.reported(sampling),
    }
    if config.data.source == emoji.SOURCE:
        for name in ("paraphrases", "features", "sweep"):
            if getattr(options, name):
                hint = "which have a judge of their own; remove it"
                raise UserError(f"--{name}: does not support the emoji data, {hint}")
        with report.Results(options.output, settings) as results:
            print(emoji.format_emoji(emoji.evaluate_emoji(pipe, options.samples, sampling, results)))
        print(f"\nsaved {options.output}")
        return
    for package in ("torchmetrics", "matplotlib") if options.sweep else ("torchmetrics",):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'evaluate: requires {package}; install it with: pip install "cond_diffusion[eval]"')
    features = metrics.load_clip_judge(options.features, config.data) if options.features else None
    with report.Results(options.output, settings) as results:
        training_data = open_training_data(config.data, config.seed)
        measuring = evaluator.load_evaluator(pipe, config, features, training_data)
        prompts = measuring.prompts(options.samples, paraphrases=options.paraphrases)
        count = options.samples // len(prompts) * len(prompts)
        generate = partial(measuring.generate, pipe, prompts, count)
        samples = report.evaluate(measuring, [prompt for prompt, _ in prompts], generate, sampling, results)
        held_out = results.part("held-out loss", lambda: evaluator.held_out_loss(pipe, config, training_data))
        print(report.format_table(samples, held_out))
        if options.sweep:
            report.sweep(measuring, generate, sampling, results, count, pipe.schedule.num_timesteps)
    print(f"\nsaved {options.output}")


def likelihood(arguments: list[str] | None = None) -> None:
    """Print the variational bound of the data that a checkpoint was trained on."""
    parser = _evaluation_parser("Compute the variational bound of real images, in bits per dimension.")
    parser.add_argument("--split", default="test", help="split of the training data (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="number of images, starting at the first (default: all)")
    parser.add_argument("--batch-size", type=int, default=250, help="images per batch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    options = parser.parse_args(arguments)
    _check_minimum("samples", options.samples, 1)
    _check_minimum("batch-size", options.batch_size, 1)
    pipe, config, _ = _load(options)
    from cond_diffusion.evaluation.likelihood import bits_per_dimension, format_bits

    numbers = {"count": options.samples, "batch_size": options.batch_size, "seed": options.seed}
    print(format_bits(*bits_per_dimension(pipe, config.data, options.split, **numbers)))


def _evaluation_parser(description: str) -> argparse.ArgumentParser:
    parser = ArgumentParser(description=description)
    add_options(parser, GenerationSettings, only=MODEL_OPTIONS)
    return parser


def _check_minimum(option: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise UserError(f"--{option}: {value}; expected at least {minimum}")


def _load(options: argparse.Namespace) -> tuple["TextToImage", Config, str]:
    """Return the pipeline, the config of its training, and the name to record of the checkpoint."""
    settings = GenerationSettings(**{name: value for name, value in vars(options).items() if name in MODEL_OPTIONS})
    from cond_diffusion.pipeline.checkpoint import lasting_name, read_checkpoint
    from cond_diffusion.pipeline.text_to_image import TextToImage

    pipe, config = read_checkpoint(
        settings.checkpoint, lambda found: (TextToImage.from_checkpoint(found, dtype=settings.dtype), found.run_config)
    )
    pipe.to_accelerator()
    name = lasting_name(settings.checkpoint, pipe.folder)
    return pipe.compile() if settings.compile else pipe, config, name


def demo(arguments: list[str] | None = None) -> None:
    """Serve a web page that generates images."""
    parser = ArgumentParser(description="Open a web page that generates images.")
    runs_help = "folder that contains run folders (default: %(default)s)"
    parser.add_argument("--runs", type=local_path, default=Path("runs"), help=runs_help)
    host_help = "0.0.0.0 allows access from all machines, without a password (default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=host_help)
    parser.add_argument("--port", type=int, default=7860, help="port of the server (default: %(default)s)")
    name_help = "another name that the page is opened by, for example behind a proxy; can be given several times"
    parser.add_argument("--allow-host", action="append", type=str.lower, default=[], metavar="NAME", help=name_help)
    parser.add_argument("--no-browser", action="store_true", help="print the address without opening a browser")
    options = parser.parse_args(arguments)
    for name in options.allow_host:
        if not re.fullmatch(r"(\*\.)?[a-z0-9_][a-z0-9_.-]*|\[?[0-9a-f.]*:[0-9a-f.:]*\]?", name):
            raise UserError(f"--allow-host: {name!r}; expected a name such as digits.example, without scheme and port")
    if importlib.util.find_spec("gradio") is None:
        raise UserError('demo: requires gradio; install it with: pip install "cond_diffusion[demo]"')
    from cond_diffusion.cli.demo import serve_until_stopped

    serve_until_stopped(options.runs, options.host, options.port, options.allow_host, not options.no_browser)
