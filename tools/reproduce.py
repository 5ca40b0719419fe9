"""Train and evaluate a row of the likelihood table within a time budget.

    python -m tools.reproduce mnist-12 --minutes 20 --out runs/mnist-12
    python -m tools.reproduce cifar10-15 --minutes 20 --samples 1 100 --dry-run

Trains the row's network with its `-fast` preset, evaluates all test images with 1, 100 and 1,000
samples (for CelebA the `valid` images, as the original implementation does), draws the pictures and
exports the weights:

    FOLDER/run/                                               the run, as train_svi.py writes it
    FOLDER/metrics.json, per_image.npz, *.png, report.html    as evaluate.py writes them
    FOLDER/weights.safetensors                                as tools.export_weights writes it

--minutes is the time for training, including evaluations during training but not the final
evaluation. A warm-up measures the rate of training steps, and the number of steps is chosen to
leave 5% of the minutes for evaluations and checkpoints. The same command resumes an interrupted
one: training continues from the newest checkpoint, and the evaluation from its progress file. Exit
codes: 0 when the row is complete, 128 + N after signal N, 1 if training diverged, 2 for a mistake
in the command or the files, 3 for any other failure.
"""

import argparse
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch

import datasets
import evaluate
import train_svi
from datasets import ImageSet
from ladder_vae.evaluation.batch_size import automatic_batch_size
from ladder_vae.evaluation.importance import ImportanceSampler
from ladder_vae.evaluation.metrics import curve_samples
from ladder_vae.evaluation.options import choose_images, parse
from ladder_vae.networks.precision import Execution
from ladder_vae.runs.command_line import (
    OneLineParser,
    add_run_options,
    at_least,
    config_of,
    flag,
    given_options,
)
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS, ROWS
from ladder_vae.runs.provenance import machine
from ladder_vae.runs.published import published_weights, write_weights
from ladder_vae.runs.run import Run, is_empty
from ladder_vae.training.logger import elbo_tag
from ladder_vae.training.rate import Rate, fitted_steps, measured_rate
from ladder_vae.training.resume import changed_config
from ladder_vae.training.trainer import Trainer
from runtime.device import choose_device, enough_memory, keep_freed_memory
from runtime.errors import UserError, run_command
from runtime.files import (
    exists,
    names_in,
    path_argument,
    read_json,
    remove_partial_files,
    writing,
)

# A preset's length is removed, because --minutes or --steps determines the length.
_LENGTHS = {"epochs": 0, "max_minutes": 0.0}
# The number of evaluations during training, and the minutes between checkpoints.
_EVALUATIONS, _CHECKPOINT_MINUTES = 10, 2.0
# During the measurement the run is so long that its learning rate does not decay.
_ENDLESS = 2**40


def preset_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the row's preset, overridden by those given, without a length."""
    return PRESETS[f"{arguments.row}-fast"] | _LENGTHS | given_options(arguments)


def fitted_config(options: dict[str, Any], steps: int) -> RunConfig:
    """The configuration of a run of `steps` steps, with intervals that suit its length.

    Intervals in `options` take precedence. Learning-rate warm-up takes at most a tenth of the run.
    """
    config = config_of(options | {"steps": steps})
    intervals: dict[str, Any] = {
        "tr_log_interv": max(1, min(100, steps // 100)),
        "ts_log_interv": math.ceil(steps / _EVALUATIONS),
        "ll_interv": 0,
        "ckpt_interv": 0,
        "checkpoint_minutes": _CHECKPOINT_MINUTES,
        "keep_checkpoints": 1,
    }
    intervals |= {name: options[name] for name in intervals.keys() & options.keys()}
    return replace(config, lr_warmup=min(config.lr_warmup, steps // 10), **intervals)


# --- Measuring ---


def measure(arguments: argparse.Namespace, device: torch.device) -> tuple[Trainer, Rate]:
    """Measure the rate of training steps on this machine, with a trainer that is then discarded."""
    config = config_of(preset_options(arguments) | {"steps": _ENDLESS})
    trainer, _ = train_svi.begin(config, None, device=device, data_dir=arguments.data_dir)
    trainer.loss_fn.train()
    print(f"measuring the rate of training steps for {arguments.measure:g} seconds", flush=True)
    rate = measured_rate(trainer.take_step, idle_clock(device), arguments.measure)
    print(
        f"rate        {rate.steps_per_second:.3g} steps/s of {config.batch_size} images on "
        f"{machine(device)}, over {rate.steps} steps",
        flush=True,
    )
    return trainer, rate


def idle_clock(device: torch.device) -> Callable[[], float]:
    """A clock that waits until the device is idle and returns seconds."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def chosen_steps(arguments: argparse.Namespace, device: torch.device) -> int:
    """The number of training steps: --steps, or as many as fit into --minutes."""
    if arguments.minutes is None:
        return arguments.steps
    _, rate = measure(arguments, device)
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
    return fitted_steps(arguments.minutes, rate)


def evaluation_minutes(arguments: argparse.Namespace, trainer: Trainer) -> float:
    """The time of the evaluation, estimated from one group of images."""
    module, device = trainer.loss_fn.eval(), trainer.device
    images = load_images(arguments).to(device)
    sampler = ImportanceSampler(
        module.model,
        module.guide,
        images,
        choose_images(images, arguments.limit, 0),
        curve_samples(arguments.samples),
        batch_size=automatic_batch_size(
            trainer.config.ladder, module.guide, torch.zeros(1, *images.shape, device=device)
        ),
        seed=0,
        execution=Execution.choose("float32", "auto", device),
    )
    clock = idle_clock(device)
    sampler.group(0)  # warm-up
    began = clock()
    sampler.group(0)
    return (clock() - began) * len(sampler) / 60


def dry_run(arguments: argparse.Namespace, device: torch.device) -> None:
    """Print how many steps fit, and how long training and evaluation would take."""
    trainer, rate = measure(arguments, device)
    given = arguments.minutes is None
    steps = arguments.steps if given else fitted_steps(arguments.minutes, rate)
    minutes = steps / rate.steps_per_second / 60
    print(f"training    {steps:,} steps, about {minutes:.1f} minutes")
    print(f"evaluation  about {evaluation_minutes(arguments, trainer):.1f} minutes")


# --- The row ---


def load_images(arguments: argparse.Namespace) -> ImageSet:
    """The images to evaluate; raises `UserError` if there are fewer than --limit."""
    dataset = preset_options(arguments)["dataset"]
    images = datasets.load(dataset, arguments.split, arguments.data_dir)
    choose_images(images, arguments.limit, 0)
    return images


def train(arguments: argparse.Namespace, device: torch.device) -> int:
    """Begin the run or resume it, unless it is finished; returns the exit code.

    Raises `UserError` if the folder holds anything else, or a run with other options.
    """
    folder: Path = arguments.out
    path = folder / "run"
    if not exists(path / "config.json"):
        remove_partial_files(folder)
        if set(names_in(folder)) - {"run"} or not is_empty(path):
            raise UserError(f"{folder} is not an empty folder; give a new folder to --out")
        with writing(folder):  # before the rate is measured, which takes a while
            folder.mkdir(parents=True, exist_ok=True)
        steps = chosen_steps(arguments, device)
        config = fitted_config(preset_options(arguments), steps)
        print(f"training    {steps:,} steps", flush=True)
        begun = train_svi.begin(config, path, device=device, data_dir=arguments.data_dir)
        return train_svi.train_to_the_end(*begun)
    run = Run.open(path)
    changes = {"steps": run.config.steps} | preset_options(arguments)
    changes.pop("lr_warmup", None)  # fitted to the number of steps
    if is_trained(run, changed_config(run.config, changes).steps):
        return 0
    resumed = train_svi.resume(path, device=device, data_dir=arguments.data_dir, changes=changes)
    return train_svi.train_to_the_end(*resumed)


def is_trained(run: Run, steps: int) -> bool:
    """Whether the run has the checkpoint and the logged evaluation of its last step."""
    entries = read_entries(run.path / "metrics.jsonl")
    tag = elbo_tag(run.config.held_out_split)
    evaluated = any(entry["step"] == steps and tag in entry for entry in entries)
    return evaluated and run.checkpoint_steps()[-1:] == [steps]


def finish(arguments: argparse.Namespace, device: torch.device) -> int:
    """Evaluate the trained ladder and export its weights, unless this is done; returns 0."""
    folder: Path = arguments.out
    execution = Execution.choose("float32", "auto", device)
    ladder = evaluate.EvaluatedLadder.load(folder / "run", device=device, execution=execution)
    if not is_complete(arguments, ladder.step):
        results = evaluate.evaluate(
            ladder,
            ladder.images(arguments.split, arguments.data_dir),
            folder,
            samples=arguments.samples,
            limit=arguments.limit,
            overwrite=arguments.overwrite or is_of_another_step(folder, ladder.step),
        )
        evaluate.print_results(ladder, results, folder)
        write_weights(folder / "weights.safetensors", *published_weights(ladder.run, None))
    print(f"complete  {folder / 'metrics.json'}")
    return 0


def is_complete(arguments: argparse.Namespace, step: int) -> bool:
    """Whether the requested evaluation and the weights, which are written last, exist."""
    metrics: Path = arguments.out / "metrics.json"
    if not exists(arguments.out / "weights.safetensors") or not exists(metrics):
        return False
    found = read_json(metrics)
    samples = [str(k) for k in arguments.samples]
    return (found["step"], found["split"], found["limit"], list(found["iw"])) == (
        *(step, arguments.split, arguments.limit),
        samples,
    )


def is_of_another_step(folder: Path, step: int) -> bool:
    """Whether the evaluation in a folder, if any, is of the row before it was trained further."""
    metrics = folder / "metrics.json"
    return metrics.exists() and read_json(metrics)["step"] != step


# --- Command line ---


def positive(text: str) -> float:
    """The argparse type of a duration."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be finite and positive")
    return value


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples",
        type=at_least(1),
        nargs="+",
        default=[1, 100, 1000],
        metavar="K",
        help="numbers of importance samples, ascending (default: 1 100 1000)",
    )
    parser.add_argument(
        "--split",
        choices=datasets.SPLITS,
        help="images to evaluate (default: test; valid for celeba-20)",
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="evaluate N random images (default: all)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an evaluation with other settings (default: refuse to)",
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.reproduce",
        description="Train and evaluate a row of the likelihood table within a time budget.",
    )
    parser.add_argument(
        "row", choices=ROWS, metavar="ROW", help=f"row of the table: {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--minutes", type=positive, metavar="M", help="minutes of training (or give --steps)"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FOLDER", help="where to write and resume"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print how many steps fit and how long the evaluation would take; write nothing",
    )
    parser.add_argument(
        "--measure",
        type=positive,
        default=20.0,
        metavar="SECONDS",
        help="length of the warm-up that measures the rate of training (default: 20)",
    )
    add_evaluation_options(parser)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--data-dir",
        type=path_argument,
        default=os.environ.get("LVAE_DATA", "data"),
        help="folder of the data sets (default: $LVAE_DATA, or data/)",
    )
    add_run_options(parser)
    arguments = parse(parser, argv)
    if arguments.split is None:  # as the original implementation evaluates CelebA
        arguments.split = "valid" if arguments.row == "celeba-20" else "test"
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for options that cannot be combined."""
    given = given_options(arguments)
    for name in _LENGTHS.keys() & given.keys():
        raise UserError(f"{flag(name)} has no effect here: give --minutes or --steps")
    if (arguments.minutes is None) == ("steps" not in given):
        raise UserError("give either --minutes of training or its --steps")
    if given.get("steps") == 0:
        raise UserError("--steps is 0; it must be at least 1")
    if (arguments.out is None) != arguments.dry_run:
        raise UserError("give either --out FOLDER or --dry-run, which writes nothing")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "this command runs as a single process: start it without torchrun, or unset WORLD_SIZE"
        )
    config = config_of({"steps": 1} | preset_options(arguments))  # raises for invalid options
    if config.elbo_share and (arguments.dry_run or arguments.minutes is not None):
        raise UserError(
            "the steps of a run with --elbo-share become slower once the bound replaces the ELBO: "
            "give --steps, and no --minutes or --dry-run"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Reproduce a row; returns the exit code."""
    arguments = parse_arguments(argv)
    keep_freed_memory()
    device = choose_device(arguments.device)
    load_images(arguments)  # fails now rather than after training
    with pyro.validation_enabled(False):
        if arguments.dry_run:
            dry_run(arguments, device)
            return 0
        with enough_memory(train_svi.MEMORY_ADVICE):
            return train(arguments, device) or finish(arguments, device)


if __name__ == "__main__":
    run_command(main, "; the same command continues")
