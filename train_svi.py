"""Train a ladder VAE by stochastic variational inference.

    python train_svi.py --preset digits --out runs/digits
    python train_svi.py --preset mnist-12 --max-minutes 600 --lr-decay cosine --ema 0.999
    python train_svi.py --resume runs/digits --steps 3000
    python train_svi.py --init-from runs/digits --lr 1e-4 --steps 500 --out runs/fine-tuned
    torchrun --nproc-per-node 8 train_svi.py --preset celeba-20 --out runs/celeba-20

A run folder holds config.json, metrics.jsonl, TensorBoard events, checkpoints/ and images/.
Ctrl-C finishes the current step, writes a checkpoint and exits, and so do SIGTERM, SIGUSR1 and,
except under nohup, SIGHUP. --resume continues an interrupted run from its last checkpoint; on the
CPU the result equals that of an uninterrupted run, bit for bit. Exit codes: 0 when the run has
reached its length, 128 + N after signal N, 1 if training diverged, 2 for a mistake in the command
or the files, 3 for any other failure.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyro
import torch

import datasets
from elbo import FreeBitsELBO, ImportanceWeightedELBO
from guide import build_ladder
from ladder_vae.runs.command_line import (
    OneLineParser,
    add_options,
    as_user_errors,
    given_options,
    with_lengths,
)
from ladder_vae.runs.config_file import config_for, config_from, requested_options
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.run import Run
from ladder_vae.training.data_parallel import check_batch_size
from ladder_vae.training.fine_tuning import InitialWeights
from ladder_vae.training.resume import StoredRun, is_finished
from ladder_vae.training.trainer import Diverged, Trainer, describe, train
from runtime.device import choose_device, enough_memory, keep_freed_memory
from runtime.distributed import ONE_PROCESS, Launch, Ranks, joined_ranks
from runtime.errors import UserError, run_command
from runtime.files import path_argument, remove_partial_files
from runtime.locks import Lock
from runtime.signals import Interruption

MEMORY_ADVICE = "give a smaller --batch-size, or --test-batch-size if it was an evaluation"


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
    torch.manual_seed(config.seed)
    with as_user_errors():
        model, guide = build_ladder(config.ladder, images.shape)
        first, last = build_objectives(config)
        return Trainer(config, first(model, guide), images, held_out, device, ranks, last)


def build_objectives(config: RunConfig) -> tuple[FreeBitsELBO, FreeBitsELBO | None]:
    """The training objective, and the one that replaces it after `elbo_share` of the run."""
    bound = ImportanceWeightedELBO(config.particles) if config.objective == "iwae" else None
    if bound is not None and not config.elbo_share:
        return bound, None
    particles = 1 if bound is not None else config.particles
    elbo = FreeBitsELBO(
        config.free_bits,
        analytic_kl=config.analytical_kl,
        num_particles=particles,
        vectorize_particles=particles > 1,
    )
    return elbo, bound


def begin(
    config: RunConfig,
    path: Path | None,
    *,
    device: torch.device,
    data_dir: Path,
    ranks: Ranks = ONE_PROCESS,
    numbered: bool = False,
    initial: InitialWeights | None = None,
) -> tuple[Trainer, Run | None]:
    """A new run in the folder `path`, ready to train; if `path` is None, nothing is written.

    It starts from `initial` weights, or random ones for None. With `numbered`, a number is appended
    to the folder's name if the folder exists. If several processes share the work, only the first
    one gets the `Run`.
    """
    trainer = build_trainer(config, device, data_dir, ranks)
    if initial is None:
        trainer.initialise()
    else:
        with ranks.together():
            initial.check_images(trainer.images.shape)
            trainer.start_from(initial.weights)
    state = None if initial is None else trainer.state()  # from all processes
    trainer.prepare()
    run = None
    with ranks.together():
        if ranks.is_first and path is not None:
            origin = provenance(device, ranks.size) | Launch.of_environment().provenance()
            origin |= {} if initial is None else initial.provenance()
            run = Run.create(path, config, trainer.images.shape, origin, numbered=numbered)
            if state is not None:  # so that resuming never needs the initial weights' own files
                run.save_checkpoint(0, state)
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

    Raises `UserError` if the run is finished, cannot be resumed, or is trained by another process.
    """
    stored: StoredRun | None = None
    lock: Lock | None = None
    with ranks.together():
        if ranks.is_first:  # one process reads, for all
            lock = StoredRun.require_run(path).locked().lock
            stored = StoredRun.open(
                path, changes, device if ranks.size == 1 else torch.device("cpu")
            )
    stored = ranks.share(stored)
    assert stored is not None
    run = replace(stored.run, lock=lock)
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
            remove_partial_files(run.path)
            run.write_config()
    trainer.prepare()
    return trainer, run


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="train_svi.py",
        description="Train a ladder VAE by stochastic variational inference.",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="RUN", help="run folder (default: runs/...)"
    )
    parser.add_argument(
        "--resume",
        type=path_argument,
        metavar="RUN",
        help="continue the run in RUN; a length replaces all of its lengths",
    )
    parser.add_argument(
        "--init-from",
        type=path_argument,
        metavar="RUN",
        help="start from the weights of a run, or of a folder or file of tools.export_weights",
    )
    parser.add_argument("--dry-run", action="store_true", help="train, but write nothing to disk")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--nocuda", dest="device", action="store_const", const="cpu", help="same as --device cpu"
    )
    parser.add_argument(
        "--data-dir",
        type=path_argument,
        default=os.environ.get("LVAE_DATA", "data"),
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
        combined = ("preset", "config", "out", "dry_run", "init_from")
        if any(getattr(arguments, name) for name in combined):
            raise UserError(
                "--resume cannot be combined with --preset, --config, --out, --dry-run or "
                "--init-from"
            )
        changes = with_lengths(given_options(arguments))
        return resume(
            arguments.resume, device=device, data_dir=data_dir, changes=changes, ranks=ranks
        )
    if ranks.share(is_begun(arguments, launch)):
        return resume(arguments.out, device=device, data_dir=data_dir, ranks=ranks)
    initial = None
    if arguments.init_from is None:
        config = ranks.in_turns(lambda: config_from(arguments))
    else:
        with ranks.together():
            initial = InitialWeights.load(arguments.init_from)
            options = initial.options(requested_options(arguments))
        config = ranks.in_turns(lambda: config_for(options, arguments.data_dir))
    path = None if arguments.dry_run else arguments.out or default_folder(config, arguments.preset)
    numbered = arguments.out is None
    return begin(
        config,
        path,
        device=device,
        data_dir=data_dir,
        ranks=ranks,
        numbered=numbered,
        initial=initial,
    )


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


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    keep_freed_memory()
    with joined_ranks("; --resume continues from the newest checkpoint") as ranks:
        arguments = parse_arguments(argv)
        with pyro.validation_enabled(False):
            with enough_memory(MEMORY_ADVICE):
                trainer, run = prepare(arguments, ranks)
            return train_to_the_end(trainer, run)


def train_to_the_end(trainer: Trainer, run: Run | None) -> int:
    """Train, and report how the run ended; returns the exit code."""
    ranks, code = trainer.ranks, 0
    if ranks.is_first:
        describe(trainer, run)
    try:
        with Interruption(trainer.clock.agree if ranks.size > 1 else None) as signals:
            try:
                with enough_memory(MEMORY_ADVICE):
                    train(trainer, run, signals)
            except Diverged as diverged:
                code = 1
                if ranks.is_first:
                    print(f"error: {diverged}", file=sys.stderr)
            # torchrun ends all processes as soon as one has exited with another code than 0.
            ranks.collect(None)
    except BaseException:
        if run is not None and run.is_new and trainer.step == 0:
            run.discard()  # so that the same command can start again
        raise
    finally:
        if run is not None:
            run.release()
    return code if signals.signal is None else 128 + signals.signal


if __name__ == "__main__":
    run_command(main)
