"""Train a ladder VAE by stochastic variational inference.

    python train_svi.py --preset digits --out runs/digits
    python train_svi.py --preset mnist-12 --max-minutes 600 --lr-decay cosine --ema 0.999
    python train_svi.py --resume runs/digits --steps 3000
    torchrun --nproc-per-node 8 train_svi.py --preset celeba-20 --out runs/celeba-20

A run folder holds config.json, metrics.jsonl, TensorBoard events, checkpoints/ and images/.
Ctrl-C finishes the current step, writes a checkpoint and exits. --resume continues an interrupted
run from its last checkpoint; on the CPU the result equals that of an uninterrupted run, bit for
bit. Exit codes: 0 when the run has reached its length, 128 + N after signal N, 1 if training
diverged, 2 for a mistake in the command or the files.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyro
import torch

import datasets
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.runs.command_line import OneLineParser, add_options, as_user_errors, given_options
from ladder_vae.runs.config_file import config_from
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.run import Run
from ladder_vae.training.data_parallel import check_batch_size
from ladder_vae.training.resume import StoredRun, is_finished
from ladder_vae.training.signals import Interruption
from ladder_vae.training.trainer import Diverged, Trainer, train
from runtime.device import choose_device, keep_freed_memory
from runtime.distributed import ONE_PROCESS, Launch, Ranks, joined_ranks
from runtime.errors import UserError, run_command
from runtime.files import remove_partial_files


def build_trainer(
    config: RunConfig, device: torch.device, data_dir: Path, ranks: Ranks = ONE_PROCESS
) -> Trainer:
    """Load the data and build model, guide and objective, with random initial weights.

    Raises `UserError` if the data cannot be loaded or does not suit the options.
    """
    with as_user_errors():
        check_batch_size(config.batch_size, ranks)
    images, held_out = ranks.in_turns(
        lambda: [
            datasets.load(config.data, split, data_dir).to(device)
            for split in (config.train_split, config.held_out_split)
        ]
    )
    elbo = FreeBitsELBO(config.free_bits, analytic_kl=config.analytical_kl)
    torch.manual_seed(config.seed)
    with as_user_errors():
        model, guide = build_ladder(config.ladder, images.shape)
        return Trainer(config, elbo(model, guide), images, held_out, device, ranks)


def begin(
    config: RunConfig,
    path: Path | None,
    *,
    device: torch.device,
    data_dir: Path,
    ranks: Ranks = ONE_PROCESS,
) -> tuple[Trainer, Run | None]:
    """A new run in the folder `path`, ready to train; if `path` is None, nothing is written.

    If several processes share the work, only the first one gets the `Run`.
    """
    trainer = build_trainer(config, device, data_dir, ranks)
    trainer.initialise()
    run = None
    with ranks.together():
        if ranks.is_first and path is not None:
            origin = provenance(device, ranks.size) | Launch.of_environment().provenance()
            run = Run.create(path, config, trainer.images.shape, origin)
    trainer.prepare()
    return trainer, run


def resume(
    path: Path,
    *,
    device: torch.device,
    data_dir: Path,
    changes: Mapping[str, Any] = {},
    ranks: Ranks = ONE_PROCESS,
) -> tuple[Trainer, Run]:
    """The run in the folder `path`, ready to continue from its newest undamaged checkpoint.

    A run that was interrupted before its first checkpoint starts again.

    Args:
        changes: options to change, by name; see `CHANGEABLE` in training/resume.py.

    Raises `UserError` if the run is finished or cannot be resumed.
    """
    stored: StoredRun | None = None
    with ranks.together():
        if ranks.is_first:  # one process reads, for all
            stored = StoredRun.open(
                path, changes, device if ranks.size == 1 else torch.device("cpu")
            )
    stored = ranks.share(stored)
    assert stored is not None
    run = stored.run
    trainer = build_trainer(run.config, device, data_dir, ranks)
    if stored.state is None:
        trainer.initialise()
    else:
        with ranks.together():
            trainer.load_state(stored.state)
    with ranks.together():
        if ranks.is_first:
            # A process may die after the run has finished; torchrun then starts all of them again.
            if is_finished(trainer, run) and Launch.of_environment().attempt == 0:
                raise UserError(
                    f"the run in {path} finished at step {trainer.step}; to continue, increase "
                    "--steps, --epochs or --max-minutes"
                )
            stored.report()
            remove_partial_files(path)
            run.write_config()
    trainer.prepare()
    return trainer, run


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="train_svi.py",
        description="Train a ladder VAE by stochastic variational inference.",
    )
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder (default: runs/...)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in RUN")
    parser.add_argument("--dry-run", action="store_true", help="train, but write nothing to disk")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--nocuda", dest="device", action="store_const", const="cpu", help="same as --device cpu"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("LVAE_DATA", "data")),
        help="folder of the data sets (default: $LVAE_DATA, or data/)",
    )
    add_options(parser)
    return parser.parse_args(argv)


def prepare(
    arguments: argparse.Namespace, ranks: Ranks = ONE_PROCESS
) -> tuple[Trainer, Run | None]:
    """Begin or resume the run that the command line describes; returns it ready to train."""
    launch = Launch.of_environment()
    check_launch(arguments, launch, ranks)
    with ranks.together():
        device = choose_device(arguments.device, ranks.local_rank)
    if device.type == "cuda" and ranks.size > 1:
        torch.cuda.set_device(device)
    data_dir = arguments.data_dir
    if arguments.resume is not None:
        if arguments.preset or arguments.config or arguments.out or arguments.dry_run:
            raise UserError(
                "--resume cannot be combined with --preset, --config, --out or --dry-run"
            )
        changes = given_options(arguments)
        return resume(
            arguments.resume, device=device, data_dir=data_dir, changes=changes, ranks=ranks
        )
    if ranks.share(is_begun(arguments, launch)):
        return resume(arguments.out, device=device, data_dir=data_dir, ranks=ranks)
    config = ranks.in_turns(lambda: config_from(arguments))
    path = None if arguments.dry_run else arguments.out or default_folder(config, arguments.preset)
    return begin(config, path, device=device, data_dir=data_dir, ranks=ranks)


def check_launch(arguments: argparse.Namespace, launch: Launch, ranks: Ranks) -> None:
    """Raise `UserError` for options that do not suit the way the processes were started."""
    if launch.attempts > 1 and not (arguments.out or arguments.resume or arguments.dry_run):
        raise UserError("torchrun's --max-restarts needs a run folder to resume: add --out RUN")
    if ranks.size == 1 and getattr(arguments, "sync_bn", False):
        raise UserError(
            "--sync-bn needs several processes but there is only one: start them by torchrun "
            "--nproc-per-node N, or omit it"
        )
    if ranks.size > 1 and arguments.device.startswith("cuda:"):
        raise UserError(
            f"--device is {arguments.device} for {ranks.size} processes, which need one GPU each: "
            "use --device cuda, and choose GPUs by CUDA_VISIBLE_DEVICES"
        )


def is_begun(arguments: argparse.Namespace, launch: Launch) -> bool:
    """Whether an earlier attempt of the same torchrun command began the run in --out."""
    if launch.attempt == 0 or arguments.out is None or arguments.dry_run:
        return False
    try:
        origin = Run.open(arguments.out).provenance
    except UserError:
        return False
    return origin.get("launch") == launch.name


def default_folder(config: RunConfig, preset: str | None) -> Path:
    """A new folder under runs/, named after the preset or the data, and the time."""
    data = config.own.name if config.own else config.dataset
    words = [preset or f"{data}-{len(config.ladder.z_dims)}-layers"]
    if config.descr:
        words.append("-".join(config.descr.split()).replace(os.sep, "-"))
    words.append(datetime.now().strftime("%Y%m%d-%H%M%S"))
    return Path("runs") / "-".join(words)


def describe(trainer: Trainer, run: Run | None) -> None:
    """Print the size of the network, the device, the data and the run folder."""
    config, length, ranks = trainer.config, trainer.length, trainer.ranks
    place = f"{trainer.device}" if ranks.size == 1 else f"{ranks.size} x {trainer.device.type}"
    print(
        f"{len(config.ladder.z_dims)} layers, {count_parameters(trainer.loss_fn):,} parameters, on "
        f"{place}; {len(trainer.images):,} images of {config.dataset} ({config.train_split})"
    )
    if length.steps is None and length.minutes is None:
        print("no --steps, --epochs or --max-minutes: trains until interrupted (Ctrl-C)")
    if run is not None:
        print(f"run folder {run.path}; to monitor it: tensorboard --logdir {run.path}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    keep_freed_memory()
    with joined_ranks("; --resume continues from the newest checkpoint") as ranks:
        arguments = parse_arguments(argv)
        with pyro.validation_enabled(False):
            return train_to_the_end(*prepare(arguments, ranks))


def train_to_the_end(trainer: Trainer, run: Run | None) -> int:
    """Train, and report how the run ended; returns the exit code."""
    ranks, code = trainer.ranks, 0
    if ranks.is_first:
        describe(trainer, run)
    with Interruption(trainer.clock.agree if ranks.size > 1 else None) as signals:
        try:
            train(trainer, run, signals)
        except Diverged as diverged:
            code = 1
            if ranks.is_first:
                print(f"error: {diverged}", file=sys.stderr)
        # Wait for all: torchrun kills the others as soon as one exits with a code other than 0.
        ranks.collect(None)
    return code if signals.signal is None else 128 + signals.signal


if __name__ == "__main__":
    run_command(main)
