"""Train a ladder VAE by stochastic variational inference.

    python train_svi.py --preset digits --out runs/digits
    python train_svi.py --preset mnist-12 --max-minutes 600 --lr-decay cosine --ema 0.999
    python train_svi.py --resume runs/digits --steps 3000

A run folder holds config.json, metrics.jsonl, TensorBoard events, checkpoints/ and images/.
Ctrl-C finishes the step, writes a checkpoint and exits.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

import datasets
from checkpoint import Run, load_weights
from config import Config, OneLineParser, add_options, config_from, given_options
from devices import choose_device
from elbo import FreeBitsELBO
from errors import UserError, run_command
from guide import build_ladder
from importance import (
    Bounds,
    bits_per_dim,
    channel_kl,
    importance_weighted_bounds,
    random_index,
)
from inspection import prior_samples, reconstructions
from interruption import Interrupted, Interruption
from monitor import Monitor
from networks import count_parameters, data_dependent_init
from pictures import reconstruction_grid, sample_grid
from provenance import provenance
from schedule import Length, kl_weight, learning_rate
from svi import SVI, MovingAverage

# Options that a resumed run may change: they do not change what has been learned so far.
CHANGEABLE = {
    "steps",
    "epochs",
    "max_minutes",
    "tr_log_interv",
    "ts_log_interv",
    "ll_interv",
    "ll_samples",
    "ll_images",
    "test_batch_size",
    "ckpt_interv",
    "keep_checkpoints",
}

# A channel counts as active where its KL, averaged over images, is above this many nats.
ACTIVE_KL = 0.01


class Training:
    """A run in progress: networks, optimiser, data and how far it has come."""

    def __init__(self, config: Config, device: torch.device, data_dir: Path) -> None:
        self.config = config
        self.device = device
        self.images = datasets.load(config.dataset, config.train_split, data_dir).to(device)
        # The test set stays unseen where a validation set is kept for choosing by.
        held_out = "valid" if config.train_split == "train" else "test"
        self.held_out = datasets.load(config.dataset, held_out, data_dir).to(device)
        self.batches = datasets.TrainingBatches(self.images, config.batch_size, config.seed)
        self.length = Length.of(config, self.batches.steps_per_epoch)
        _, height, width = self.images.shape
        top = math.prod(config.latent_sizes((height, width))[-1])
        if config.batchnorm and config.batch_size * top == 1:
            raise UserError(
                "--batch-size is 1 and the top feature map 1x1, which leaves batch normalisation "
                "nothing to average over; give a larger batch, or --no-bn"
            )

        torch.manual_seed(config.seed)
        model, guide = build_ladder(config, self.images.shape)
        elbo = FreeBitsELBO(config.free_bits, analytic_kl=config.analytical_kl)
        self.loss_fn: Any = elbo(model, guide).to(device)
        optimizer = torch.optim.Adamax(
            [p for p in self.loss_fn.parameters() if p.requires_grad],
            lr=config.lr,
            weight_decay=config.weight_decay,
        )
        self.average = MovingAverage(self.loss_fn, config.ema) if config.ema else None
        self.svi = SVI(
            self.loss_fn,
            optimizer,
            clip_norm=config.grad_clip,
            skip_norm=config.grad_skip,
            average=self.average,
        )
        self.step = 0
        self._minutes_before = 0.0
        self._began = time.monotonic()

    @property
    def minutes(self) -> float:
        """Time spent on the run, in this session and before it was resumed."""
        return self._minutes_before + (time.monotonic() - self._began) / 60

    @property
    def finished(self) -> bool:
        """Whether the run has come to its bound."""
        return self.length.progress(self.step, self.minutes) >= 1

    def initialise(self) -> None:
        """Set the initial weights from the first batch, if the configuration asks for it."""
        if self.config.data_dep_init:
            self.loss_fn.train()
            with data_dependent_init(self.loss_fn):
                self.loss_fn.guide(self.batches(0))

    def take_step(self) -> None:
        """One step of training."""
        progress = self.length.progress(self.step, self.minutes)
        for group in self.svi.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, progress)
        self.svi.elbo.kl_weight = kl_weight(self.config, self.step)
        self.svi.step(self.batches(self.step))
        self.step += 1

    def evaluated_module(self) -> nn.Module:
        """The ELBO module whose weights evaluations use: the moving average where there is one."""
        return self.loss_fn if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "weights": self.loss_fn.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.svi.optimizer.state_dict(),
            "minutes": self.minutes,
            "skipped": self.svi.skipped,
            "cpu_random_state": torch.get_rng_state(),
            "cuda_random_state": (
                torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            ),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state; raises `UserError` where it cannot be continued."""
        if state["optimizer"] is None:
            raise UserError("the checkpoint holds weights alone, which cannot be trained further")
        load_weights(self.loss_fn, state["weights"])
        try:
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.svi.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["cpu_random_state"].cpu())
            if self.device.type == "cuda" and state["cuda_random_state"] is not None:
                torch.cuda.set_rng_state(state["cuda_random_state"].cpu(), self.device)
            self.svi.skipped = int(state["skipped"])
            self._minutes_before = float(state["minutes"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint does not hold this run's state of training: {error!r}"
            ) from None
        self.step = state["step"]
        self._began = time.monotonic()


class Logger:
    """Turns a run's progress into entries of its `Monitor`."""

    def __init__(self, training: Training, monitor: Monitor) -> None:
        self.training = training
        self.monitor = monitor
        self.split = training.held_out.split
        self.image_shape = training.held_out.shape
        # Colour images' figures are compared in bits per dimension, binary ones' in nats.
        self.in_bits = not datasets.is_binary(training.config.dataset)
        self._restart_clock()
        self._shown = 0.0

    def _restart_clock(self) -> None:
        self._since_step, self._since = self.training.step, time.monotonic()

    def _images_per_second(self) -> float:
        steps = self.training.step - self._since_step
        elapsed = time.monotonic() - self._since
        return steps * self.training.config.batch_size / max(elapsed, 1e-9)

    def _shown_bound(self, nats: float) -> str:
        """A bound on the log-likelihood, for reading."""
        bits = f" ({bits_per_dim(-nats, self.image_shape):.3f} bits/dim)" if self.in_bits else ""
        return f"{nats:.2f} nats{bits}"

    def _bits_per_dim(self, tag: str, nats: float) -> dict[str, float]:
        """The scalar for a negative bound in bits per dimension, for images compared in it."""
        return {tag: bits_per_dim(nats, self.image_shape)} if self.in_bits else {}

    def progress(self) -> None:
        """Keep the progress bar up to date, twice a second at most."""
        self.monitor.advance()
        if self.monitor.shows_bar and time.monotonic() - self._shown > 0.5:
            means = self.training.svi.peek()
            if means is not None:
                self.monitor.show(
                    ELBO=self._shown_bound(-means.negative_elbo),
                    images_per_s=f"{self._images_per_second():.0f}",
                )
            self._shown = time.monotonic()

    def training_entry(self) -> None:
        """Log the means over the steps since the last entry."""
        training = self.training
        rate = self._images_per_second()
        means = training.svi.read()
        values = {
            "train/learning_rate": training.svi.optimizer.param_groups[0]["lr"],
            "train/kl_weight": training.svi.elbo.kl_weight,
            "train/images_per_second": rate,
            "train/skipped_updates": training.svi.skipped,
        }
        if means is not None:
            values |= {
                "train/loss": means.loss,
                "train/negative_elbo": means.negative_elbo,
                "train/reconstruction": -means.log_likelihood,
                "train/kl": sum(means.kl),
                "train/gradient_norm": means.grad_norm,
            }
            values |= self._bits_per_dim("train/bits_per_dim", means.negative_elbo)
            values |= by_layer("train_kl", means.kl)
        self.monitor.scalars(training.step, values)
        if not self.monitor.shows_bar:
            elbo = f"ELBO {self._shown_bound(-means.negative_elbo)}" if means else "all skipped"
            self.monitor.say(f"step {training.step}: {elbo}, {rate:.0f} images/s")
        self._restart_clock()

    def evaluation(self, interruption: Interruption) -> None:
        """Log the ELBO of the held-out images, their KL by layer, samples and reconstructions."""
        began = time.monotonic()
        training, step = self.training, self.training.step
        bounds = self._bounds(len(training.held_out), 1, interruption)
        kl = bounds.kl.mean(0).tolist()
        elbo = bounds.elbo.mean().item()
        values = {
            f"{self.split}/negative_elbo": -elbo,
            f"{self.split}/reconstruction": -bounds.log_likelihood.mean().item(),
            f"{self.split}/kl": sum(kl),
        }
        values |= self._bits_per_dim(f"{self.split}/bits_per_dim", -elbo)
        values |= by_layer(f"{self.split}_kl", kl)
        values |= by_layer(f"{self.split}_active_channels", self._active_channels())
        self.monitor.scalars(step, values)
        self._pictures()
        self.monitor.say(
            f"step {step}: {self.split} ELBO {self._shown_bound(elbo)}, KL {sum(kl):.2f}"
        )
        training.loss_fn.train()
        self._since += time.monotonic() - began

    def bound(self, interruption: Interruption) -> None:
        """Log the importance-weighted bound of the held-out images, or of a random few."""
        began = time.monotonic()
        training, config = self.training, self.training.config
        count = config.ll_images or len(training.held_out)
        bounds = self._bounds(count, config.ll_samples, interruption)
        bound = -bounds.importance_weighted[config.ll_samples].mean().item()
        tag = f"{self.split}/negative_bound_{config.ll_samples}_samples"
        values = {tag: bound} | self._bits_per_dim(f"{tag}_bits_per_dim", bound)
        self.monitor.scalars(training.step, values)
        self.monitor.say(
            f"step {training.step}: {self.split} log-likelihood at least "
            f"{self._shown_bound(-bound)} ({config.ll_samples} samples)"
        )
        training.loss_fn.train()
        self._since += time.monotonic() - began

    def _evaluated(self) -> Any:
        """The ELBO module that evaluations use, in evaluation mode."""
        return self.training.evaluated_module().eval()

    def _bounds(self, count: int, samples: int, interruption: Interruption) -> Bounds:
        """The bound of `count` held-out images with `samples` samples."""
        module, images, config = self._evaluated(), self.training.held_out, self.training.config
        return importance_weighted_bounds(
            module.model,
            module.guide,
            images,
            random_index(len(images), count, config.seed),
            [samples],
            batch_size=config.test_batch_size,
            seed=config.seed,
            on_images=interruption.check,
        )

    def _active_channels(self) -> list[float]:
        """How many latent channels each layer makes use of, by a thousand held-out images."""
        module, images, config = self._evaluated(), self.training.held_out, self.training.config
        some = random_index(len(images), 1000, config.seed)
        with seeded(config.seed, self.training.device):
            channels = channel_kl(module.guide, images, some, config.test_batch_size)
        return [float((channel > ACTIVE_KL).sum()) for channel in channels]

    def _pictures(self) -> None:
        """Show samples, and reconstructions of held-out images."""
        module, images, config = self._evaluated(), self.training.held_out, self.training.config
        x = images.batch(random_index(len(images), 32, config.seed).to(images.index_device))
        with seeded(config.seed, self.training.device):
            samples = prior_samples(module.model, 64)
            reconstructed = reconstructions(module.guide, x)
        step = self.training.step
        self.monitor.picture(step, "samples", sample_grid(samples, 8))
        self.monitor.picture(step, "reconstructions", reconstruction_grid(x, reconstructed, 8))


def by_layer(group: str, values: Sequence[float]) -> dict[str, float]:
    """Tags of one value per layer, layer_01 at the bottom."""
    return {f"{group}/layer_{i:02d}": value for i, value in enumerate(values, start=1)}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside, and leave the training's random state as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def run_training(training: Training, run: Run | None, interruption: Interruption) -> None:
    """Train until the bound of the run, or a signal; log, evaluate and write checkpoints."""
    config = training.config
    folder = None if run is None else run.path
    saved_step = training.step

    def save() -> None:
        nonlocal saved_step
        if run is not None and saved_step != training.step:
            run.save_checkpoint(training.step, training.state())
            saved_step = training.step

    with Monitor(folder, training.step, training.length.steps) as monitor:
        logger = Logger(training, monitor)
        if training.step == 0:
            monitor.configuration(config.to_dict(), f"{logger.split}/negative_elbo")
        training.loss_fn.train()
        try:
            finished = False
            while not finished:
                training.take_step()
                finished = training.finished  # asked once: with --max-minutes it may change
                logger.progress()
                if is_due(training.step, config.tr_log_interv):
                    logger.training_entry()
                if is_due(training.step, config.ckpt_interv) or finished:
                    save()
                interruption.check()
                if is_due(training.step, config.ts_log_interv) or finished:
                    logger.evaluation(interruption)
                if is_due(training.step, config.ll_interv):
                    logger.bound(interruption)
        except Interrupted:
            monitor.say(f"interrupted after step {training.step}")
            save()


def is_due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps, or never for 0, is to be done after `step`."""
    return interval > 0 and step % interval == 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="train_svi.py",
        description="Train a ladder VAE by stochastic variational inference.",
    )
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder (default: runs/...)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in RUN")
    parser.add_argument("--dry-run", action="store_true", help="write nothing to disk")
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
        help="where the data sets are kept (default: LVAE_DATA in the environment, or data/)",
    )
    add_options(parser)
    return parser.parse_args(argv)


def resumed_config(stored: Config, arguments: argparse.Namespace) -> Config:
    """The stored configuration, with the changes of the command line where they are possible."""
    if arguments.preset or arguments.out or arguments.dry_run:
        raise UserError("--resume takes its run as it is: leave out --preset, --out and --dry-run")
    given = given_options(arguments)
    for name in given.keys() - CHANGEABLE:
        if given[name] != getattr(stored, name):
            raise UserError(
                f"the run to resume has {name} {getattr(stored, name)}, which cannot be changed "
                f"to {given[name]}"
            )
    return replace(stored, **given)


def default_folder(config: Config, preset: str | None) -> Path:
    """A new folder under runs/, named after the run and the time."""
    words = [preset or f"{config.dataset}-{len(config.z_dims)}-layers"]
    if config.descr:
        words.append("-".join(config.descr.split()).replace(os.sep, "-"))
    words.append(datetime.now().strftime("%Y%m%d-%H%M%S"))
    return Path("runs") / "-".join(words)


def prepare(arguments: argparse.Namespace) -> tuple[Training, Run | None]:
    """The run that the command line asks for, new or resumed, ready to go."""
    device = choose_device(arguments.device)
    if arguments.resume is not None:
        stored = Run.open(arguments.resume)
        run = replace(stored, config=resumed_config(stored.config, arguments))
        state = run.load_checkpoint(None, device)
        training = Training(run.config, device, arguments.data_dir)
        training.load_state(state)
        if training.finished:
            raise UserError(
                f"the run in {run.path} has come to its end at step {training.step}; "
                "give it more --steps, --epochs or --max-minutes"
            )
        run.write_config()
        return training, run
    config = config_from(arguments)
    training = Training(config, device, arguments.data_dir)
    training.initialise()
    if arguments.dry_run:
        return training, None
    path = arguments.out or default_folder(config, arguments.preset)
    return training, Run.create(path, config, training.images.shape, provenance(device))


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code, 128 + the signal's number where one ended the run."""
    arguments = parse_arguments(argv)
    with pyro.validation_enabled(False):
        training, run = prepare(arguments)
        describe(training, run)
        with Interruption() as interruption:
            run_training(training, run, interruption)
    return 0 if interruption.signal is None else 128 + interruption.signal


def describe(training: Training, run: Run | None) -> None:
    """Print what is about to be trained, and where."""
    config, length = training.config, training.length
    parameters = count_parameters(training.loss_fn)
    print(
        f"{len(config.z_dims)} layers, {parameters:,} parameters, on {training.device}; "
        f"{len(training.images):,} images of {config.dataset} ({config.train_split})"
    )
    if length.steps is None and length.minutes is None:
        print("no --steps, --epochs or --max-minutes: trains until interrupted (Ctrl-C)")
    if run is not None:
        print(f"run folder {run.path}; watch it with: tensorboard --logdir {run.path}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
