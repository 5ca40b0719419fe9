"""Reproduce a row of the likelihood table within a wall-clock budget, by one command.

    python reproduce.py mnist-3 --minutes 20 --out runs/mnist-3
    python reproduce.py mnist-12 --minutes 20 --pause-after 9 --out runs/mnist-12
    python reproduce.py cifar10-15 --minutes 20 --samples 1 100 --dry-run

Trains the row's network by its `-fast` preset, scores the whole test set with 1, 100 and 1,000
samples (CelebA: the `valid` images, as the original), draws the pictures, and leaves in FOLDER what
should be kept, no file larger than 15 MiB:

    FOLDER/metrics.json, per_image.npz, *.png, report.html   as evaluate.py writes them
    FOLDER/weights.safetensors                               as published.py writes it
    FOLDER/reproduce.json                                    what was asked, fitted and done
    FOLDER/ROW-fast/                                         the run, as train_svi.py writes it

The minutes are those of training, evaluations on the way included; scoring comes after them. The
rate is measured in a warm-up, once everything is compiled, and the number of steps fitted to it
before the first one: from then on nothing depends on the clock, and a run that was stopped is
continued by the same command, from FOLDER alone and on another machine too, as if it had not been.
Exit codes: 0 when the row is complete, 3 after --pause-after, 128 + N after signal N, 1 when its
numbers went wrong, 2 for a mistake in the command or the files.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyro
import torch

import datasets
import evaluate
import pieces
import train_svi
from datasets import ImageSet
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.evaluation.batch_size import automatic_batch_size
from ladder_vae.evaluation.importance import ImportanceSampler, random_index
from ladder_vae.evaluation.metrics import curve_samples
from ladder_vae.networks.precision import Execution
from ladder_vae.reports.report import training_report
from ladder_vae.runs.checkpoint import FORMAT, STATE, checkpoint_bytes
from ladder_vae.runs.command_line import OneLineParser, add_config_options, given_options
from ladder_vae.runs.metrics_log import finite_entries, newest
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS, ROWS
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.published import export_weights
from ladder_vae.runs.run import Run
from ladder_vae.training.rate import Rate, fitted_steps, measured_rate
from ladder_vae.training.signals import Interrupted, Interruption
from runtime.device import choose_device, keep_freed_memory
from runtime.distributed import Ranks
from runtime.errors import UserError, run_command
from runtime.files import remove_partial_files, write_json

PAUSED = 3
SAMPLES = [1, 100, 1000]
# The length is fitted to the minutes, or given by --steps.
_LENGTHS = {"epochs", "max_minutes"}
# Evaluations on the way, for the learning curve; a checkpoint at least every so many minutes.
_EVALUATIONS, _CHECKPOINT_MINUTES = 10, 2.0
_PLAN, _PLAN_FORMAT = "reproduce.json", 1
# What is to be done next.
_PHASES = ("training", "scoring", "keeping", "complete")


class Pause(Interruption):
    """An interruption that also comes by itself once `minutes` have passed; None for never."""

    def __init__(self, minutes: float | None) -> None:
        super().__init__()
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def check(self, _: int = 0) -> None:
        if time.monotonic() >= self._end:
            raise Interrupted
        super().check()


class PiecedRun(Run):
    """A run that keeps its last checkpoint alone, in pieces where it is large.

    There is no best one: figures are those of the last weights.
    """

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write the state of training after `step`, then remove whatever else is there."""
        content = checkpoint_bytes(state | {"format": FORMAT, "step": step})
        path = self.checkpoint_path(step)
        pieces.write(path, content)
        for old in path.parent.iterdir():
            if not old.name.startswith(path.name):
                with suppress(OSError):  # one too many does no harm
                    old.unlink()

    def is_better(self, step: int, negative_elbo: float) -> bool:
        return False

    def drop_training(self) -> None:
        """Leave of the last checkpoint what scoring needs: the weights, averaged where they are."""
        state = self.load_checkpoint(None, torch.device("cpu"))
        average = state["average"]
        weights = state["weights"] if average is None else average["weights"]
        kept = dict.fromkeys(STATE) | {"weights": weights, "minutes": state["minutes"]}
        kept["average"] = None if average is None else {"weights": weights}
        self.save_checkpoint(state["step"], kept)


@dataclass
class Plan:
    """What was asked for, what was fitted to it, and how far it has come: FOLDER/reproduce.json."""

    asked: dict[str, Any]  # row, minutes, samples, split, limit, and options of training
    config: dict[str, Any]  # all options of training, its length among them
    rate: dict[str, Any] | None = None  # what the warm-up measured, and where
    phase: str = _PHASES[0]
    batch_size: int | None = None  # of scoring; figures depend on it
    sessions: list[dict[str, Any]] = field(default_factory=list)  # where it was worked on

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises `UserError` where the file is not one that `write` wrote."""
        try:
            content = json.loads(file.read_text())
            if content.pop("format") != _PLAN_FORMAT:
                raise ValueError("of another version of the project")
            plan = cls(**content)
            rate = plan.rate is None or (plan.rate["machine"] and plan.rate["steps_per_second"] > 0)
            if plan.phase not in _PHASES or not isinstance(plan.asked, dict) or not rate:
                raise ValueError("it is not as it was written")
            RunConfig.from_dict(plan.config)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is damaged: {error}; give a new folder to --out") from None
        return plan

    def write(self, file: Path) -> None:
        write_json(file, {"format": _PLAN_FORMAT} | dataclasses.asdict(self))


class Reproduction:
    """A row in progress, in a folder of its own."""

    def __init__(self, folder: Path, plan: Plan, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.plan = plan
        self.run_path = folder / preset_of(plan.asked["row"])
        self.device: str = arguments.device
        self.data_dir: Path = arguments.data_dir

    @property
    def run(self) -> PiecedRun:
        """The run as it is planned; its folder may still have to come into being."""
        config = RunConfig.from_dict(self.plan.config)
        return PiecedRun(self.run_path, config, datasets.image_shape(config.dataset), {})

    def save(self) -> None:
        self.plan.write(self.folder / _PLAN)

    def enter(self, phase: str) -> None:
        """Go on to a phase."""
        self.plan.phase = phase
        self.save()

    def note_session(self) -> None:
        """Keep a record of where the work is done."""
        place = provenance(choose_device(self.device))
        step = max(self.run.checkpoint_steps(), default=0)
        session = {"phase": self.plan.phase, "step": step, "provenance": place}
        self.plan.sessions.append(session)
        self.save()

    def work(self, pause: Pause) -> int:
        """Do all that is still to be done; returns the exit code. Raises `Interrupted`."""
        pause.check()
        if self.plan.phase != "complete":
            self.note_session()
        if self.plan.phase == "training":
            if not self.train(pause):
                return 1
            PiecedRun.open(self.run_path).drop_training()
            self.enter("scoring")
        if self.plan.phase == "scoring":
            pause.check()
            self.score(pause)
            self.enter("keeping")
        if self.plan.phase == "keeping":
            self.keep()
            self.enter("complete")
        return self.finish()

    def train(self, pause: Pause) -> bool:
        """Train to the end; returns whether the numbers are right."""
        if self.is_trained():
            return True
        training, run = train_svi.prepare(self.training_arguments())
        assert run is not None
        train_svi.describe(training, run)
        self.tell_what_is_left(training.step)
        pieced = PiecedRun(**vars(run))
        try:
            train_svi.run_training(training, pieced, pause)
        except train_svi.Diverged:
            print(f"error: {train_svi.advice(training, run)}", file=sys.stderr)
            return False
        pause.check()
        return True

    def is_trained(self) -> bool:
        """Whether the last step has its checkpoint and its evaluation."""
        config = self.run.config
        if self.run.checkpoint_steps()[-1:] != [config.steps]:
            return False
        entries = finite_entries(self.run_path / "metrics.jsonl")
        held_out = "valid" if config.train_split == "train" else "test"
        last = newest(entries, f"{held_out}/negative_elbo")
        return last is not None and last["step"] == config.steps

    def training_arguments(self) -> argparse.Namespace:
        """What train_svi.py is asked for: to begin the run, or to go on with it."""
        begun = (self.run_path / "config.json").exists()
        if not begun and self.run_path.exists():
            remove_partial_files(self.run_path)  # a first config.json that was never finished
        words = ["--resume" if begun else "--out", str(self.run_path), "--device", self.device]
        arguments = train_svi.parse_arguments([*words, "--data-dir", str(self.data_dir)])
        if not begun:
            vars(arguments).update(self.plan.config)
        return arguments

    def tell_what_is_left(self, step: int) -> None:
        steps, rate = self.plan.config["steps"], self.plan.rate
        left = f"{steps - step:,} of {steps:,} steps left"
        if rate is not None:
            minutes = (steps - step) / rate["steps_per_second"] / 60
            left += f", about {minutes:.1f} minutes at the rate of {rate['machine']}"
        print(left, flush=True)

    def score(self, pause: Pause) -> None:
        """Score and draw, with the blocks that were used before if this was begun."""
        evaluation = evaluate.Evaluation(self.scoring_arguments(), Ranks(), pause.check)
        if self.plan.batch_size is None:
            self.plan.batch_size = evaluation.batch_size
            self.save()
        evaluate.evaluate(evaluation)

    def scoring_arguments(self) -> argparse.Namespace:
        asked = self.plan.asked
        words = [str(self.run_path), "--out", str(self.folder), "--split", asked["split"]]
        words += ["--samples", *map(str, asked["samples"]), "--device", self.device]
        words += ["--data-dir", str(self.data_dir)]
        for name, value in {"limit": asked["limit"], "batch-size": self.plan.batch_size}.items():
            words += [] if value is None else [f"--{name}", str(value)]
        return evaluate.parse_arguments(words)

    def keep(self) -> None:
        """Write the weights and the report of the training, and put what is large into pieces."""
        run = PiecedRun.open(self.run_path)
        weights = self.folder / "weights.safetensors"
        export_weights(run, None, weights)
        training_report(run)
        remove_partial_files(self.folder)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                pieces.split(path)

    def finish(self) -> int:
        """The row is complete: its weights are among what is kept, and the checkpoint goes."""
        shutil.rmtree(self.run_path / "checkpoints", ignore_errors=True)
        print(f"complete  {self.folder / 'metrics.json'}")
        return 0


def preset_of(row: str) -> str:
    """The preset that a row is trained by."""
    return f"{row}-fast"


# --- The plan ---


def asked_for(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for; what only says where it runs is not part of it."""
    names = ("row", "minutes", "samples", "split", "limit")
    return {name: getattr(arguments, name) for name in names} | given_options(arguments)


def planned(arguments: argparse.Namespace) -> Plan:
    """A new plan: the length measured, unless --steps gives it."""
    asked = asked_for(arguments)
    options = PRESETS[preset_of(arguments.row)] | given_options(arguments)
    options |= dict.fromkeys(_LENGTHS, 0)
    if arguments.minutes is None:
        return Plan(asked, fitted_config(options, options["steps"]))
    rate = rate_of_training(options, arguments)
    steps = fitted_steps(arguments.minutes, rate)
    place = provenance(choose_device(arguments.device))
    return Plan(asked, fitted_config(options, steps), dataclasses.asdict(rate) | place)


def fitted_config(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """All options of a run of so many steps; what was given of the intervals stays.

    The warm-up of the learning rate takes a tenth of the run at most.
    """
    config = RunConfig.of(**(options | {"steps": steps}))
    fitted: dict[str, Any] = {
        "tr_log_interv": max(1, min(100, steps // 100)),
        "ts_log_interv": math.ceil(steps / _EVALUATIONS),
        "ll_interv": 0,
        "ckpt_interv": 0,
        "checkpoint_minutes": _CHECKPOINT_MINUTES,
        "keep_checkpoints": 1,
    }
    fitted |= {name: options[name] for name in fitted.keys() & options.keys()}
    fitted["lr_warmup"] = min(config.lr_warmup, steps // 10)
    return dataclasses.replace(config, **fitted).to_dict()


def rate_of_training(options: dict[str, Any], arguments: argparse.Namespace) -> Rate:
    """The rate of training steps on this machine, by steps that are then forgotten."""
    words = ["--dry-run", "--device", arguments.device, "--data-dir", str(arguments.data_dir)]
    trial = train_svi.parse_arguments(words)
    # So long that the learning rate stays what it is at the beginning.
    vars(trial).update(options | {"steps": 2**40})
    training, _ = train_svi.prepare(trial)
    training.loss_fn.train()
    print(f"measures the rate of training steps for {arguments.measure:g} seconds", flush=True)
    rate = measured_rate(training.take_step, clock_of(training.device), arguments.measure)
    del training
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rate


def clock_of(device: torch.device) -> Any:
    """Seconds, once the device has done what was asked of it."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def tell_plan(plan: Plan, arguments: argparse.Namespace) -> None:
    """Print what was fitted, and how long scoring would take on this machine."""
    if plan.rate is not None:
        print(
            f"rate      {plan.rate['steps_per_second']:.3g} steps/s of {plan.config['batch_size']} "
            f"images on {plan.rate['machine']}, by {plan.rate['steps']} steps"
        )
    print(f"training  {plan.config['steps']:,} steps")
    if arguments.dry_run:
        print(f"scoring   about {minutes_of_scoring(plan, arguments):.1f} minutes")


def scored_images(arguments: argparse.Namespace, device: torch.device) -> ImageSet:
    """The images of the row's figures; raises `UserError` where they are fewer than --limit."""
    dataset = given_options(arguments).get("dataset", PRESETS[arguments.row]["dataset"])
    images = datasets.load(dataset, arguments.split, arguments.data_dir)
    if (arguments.limit or 0) > len(images):
        raise UserError(f"--limit is {arguments.limit} but there are {len(images)} images")
    return images.to(device)


def minutes_of_scoring(plan: Plan, arguments: argparse.Namespace) -> float:
    """By one group of images through the untrained network, after one that does not count."""
    config, asked = RunConfig.from_dict(plan.config), plan.asked
    device = choose_device(arguments.device)
    images = scored_images(arguments, device)
    model, guide = build_ladder(config.ladder, images.shape)
    module: Any = FreeBitsELBO()(model, guide).to(device).eval()
    execution = Execution.choose("float32", "auto", device)  # as in evaluate.py
    execution.prepare(module)
    batch_size = automatic_batch_size(
        config, module.guide, torch.zeros(1, *images.shape, device=device)
    )
    count = min(asked["limit"] or len(images), len(images))
    sampler = ImportanceSampler(
        module.model,
        module.guide,
        images,
        random_index(len(images), count, 0),
        curve_samples(asked["samples"]),
        batch_size=batch_size,
        seed=0,
        execution=execution,
    )
    clock = clock_of(device)
    sampler.group(0)
    began = clock()
    sampler.group(0)
    return (clock() - began) * len(sampler) / 60


def reproduction(arguments: argparse.Namespace) -> Reproduction:
    """The row to work on: a new one, or the one that is in the folder.

    Raises `UserError` where the folder holds anything else, or was begun by another command.
    """
    folder: Path = arguments.out
    if (folder / _PLAN).exists():
        plan = Plan.read(folder / _PLAN)
        check_same(plan.asked, asked_for(arguments), folder)
        return Reproduction(folder, plan, arguments)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; give a new folder to --out")
    scored_images(arguments, choose_device(arguments.device))  # missed now, not in an hour
    plan = planned(arguments)
    tell_plan(plan, arguments)
    begun = Reproduction(folder, plan, arguments)
    begun.save()
    return begun


def check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise `UserError` where a command is not the one that a folder was begun by."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{folder} was begun with {name} {_shown(before.get(name))}, and this command has "
                f"{_shown(now.get(name))}: give the same command, or a new folder to --out"
            )


def _shown(value: Any) -> str:
    """An option's value for reading."""
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- Command ---


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="reproduce.py",
        description="Reproduce a row of the likelihood table within a wall-clock budget.",
    )
    parser.add_argument(
        "row", choices=ROWS, metavar="ROW", help=f"row of the table: {', '.join(ROWS)}"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="of training (or give --steps)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write and continue")
    parser.add_argument(
        "--pause-after",
        type=float,
        metavar="MINUTES",
        help="end this command in order after so many minutes, with exit code 3, to be continued",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="measure, and say how many steps fit and how long scoring takes; write nothing",
    )
    parser.add_argument(
        "--measure",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="measure the rate of training for so long (default: 20)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=SAMPLES,
        metavar="K",
        help="numbers of importance samples, rising (default: 1 100 1000)",
    )
    parser.add_argument(
        "--split",
        choices=datasets.SPLITS,
        help="images to score (default: test; valid for celeba-20)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="score N random images (default: the whole split)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("LVAE_DATA", "data")),
        help="where the data sets are kept (default: LVAE_DATA in the environment, or data/)",
    )
    options = parser.add_argument_group("in place of the preset's options, as in train_svi.py")
    add_config_options(options)
    arguments = parser.parse_args(argv)
    if arguments.split is None:
        # As the original scores them.
        arguments.split = "valid" if arguments.row == "celeba-20" else "test"
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for values that make no sense, before anything is measured."""
    given = given_options(arguments)
    if unsuited := sorted(given.keys() & _LENGTHS):
        option = unsuited[0].replace("_", "-")
        raise UserError(f"--{option} does nothing here: the length is that of --minutes or --steps")
    if (arguments.minutes is None) == ("steps" not in given):
        raise UserError("give --minutes of training, or its --steps, and not both")
    if given.get("steps") == 0:
        raise UserError("--steps is 0; it must be at least 1")
    for name in ("minutes", "pause_after", "measure"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {value:g}; it must be finite and positive")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("reproduce.py is a single process: start it without torchrun")
    if arguments.out is None and not arguments.dry_run:
        raise UserError("--out is missing: give the folder to write and continue")
    if arguments.dry_run and (arguments.out is not None or arguments.pause_after is not None):
        raise UserError("--dry-run writes nothing: leave out --out and --pause-after")
    RunConfig.of(**(PRESETS[preset_of(arguments.row)] | given))
    # What the scoring would refuse hours later.
    evaluate.parse_arguments(
        ["RUN", "--samples", *map(str, arguments.samples)]
        + ([] if arguments.limit is None else ["--limit", str(arguments.limit)])
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Reproduce a row; returns the exit code."""
    arguments = parse_arguments(argv)
    keep_freed_memory()
    with pyro.validation_enabled(False), Pause(arguments.pause_after) as pause:
        if arguments.dry_run:
            tell_plan(planned(arguments), arguments)
            return 0
        try:
            return reproduction(arguments).work(pause)
        except Interrupted:
            print("paused: the same command goes on from here", file=sys.stderr)
    return PAUSED if pause.signal is None else 128 + pause.signal


if __name__ == "__main__":
    run_command(main)
