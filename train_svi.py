"""Train a ladder VAE by stochastic variational inference.

    python train_svi.py --preset digits --out runs/digits
    python train_svi.py --preset mnist-12 --max-minutes 600 --lr-decay cosine --ema 0.999
    python train_svi.py --resume runs/digits --steps 3000
    torchrun --nproc-per-node 8 train_svi.py --preset celeba-20 --out runs/celeba-20

A run folder holds config.json, metrics.jsonl, TensorBoard events, checkpoints/ and images/.
Ctrl-C finishes the step, writes a checkpoint and exits; --resume goes on from there, or from
whatever else ended the run, as if nothing had been. Exit codes: 0 when the run has come to its end,
128 + N after signal N, 1 when its numbers went wrong, 2 for a mistake in the command or the files.
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
from torch import Tensor, nn

import datasets
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.evaluation.importance import Bounds, importance_weighted_bounds, random_index
from ladder_vae.evaluation.kl import by_channel, mean_kl
from ladder_vae.evaluation.metrics import bits_per_dim
from ladder_vae.evaluation.sampling import prior_samples, reconstructions
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.networks.initialization import data_dependent_init
from ladder_vae.networks.precision import Execution
from ladder_vae.reports.image_grids import reconstruction_grid, sample_grid
from ladder_vae.runs.checkpoint import Damaged, load_weights
from ladder_vae.runs.command_line import OneLineParser, add_options, config_from, given_options
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.run import Run
from ladder_vae.training.data_parallel import (
    Clock,
    Replicas,
    check_batch,
    random_states,
    restore_random_state,
    seed_noise,
    synchronised,
)
from ladder_vae.training.monitor import Monitor
from ladder_vae.training.moving_average import MovingAverage
from ladder_vae.training.schedule import Length, kl_weight, learning_rate
from ladder_vae.training.signals import Interrupted, Interruption
from ladder_vae.training.svi import SVI
from runtime.device import choose_device, keep_freed_memory
from runtime.distributed import Launch, Ranks, joined_ranks
from runtime.errors import UserError, run_command
from runtime.files import remove_partial_files

# Options that a resumed run may change: its length and monitoring, how it is run on the machine it
# finds itself on, and what to turn to where training goes wrong. None of them changes what has been
# learned so far.
CHANGEABLE = {
    "steps",
    "epochs",
    "max_minutes",
    "lr",
    "precision",
    "compile",
    "grad_clip",
    "grad_skip",
    "grad_spike",
    "tr_log_interv",
    "ts_log_interv",
    "ll_interv",
    "ll_samples",
    "ll_images",
    "test_batch_size",
    "ckpt_interv",
    "checkpoint_minutes",
    "keep_checkpoints",
    "sync_bn",
}

# A channel counts as active where its KL, averaged over images, is above this many nats; and a
# layer as collapsed where its KL is below, or with free bits above them by less than this share.
ACTIVE_KL = 0.01
COLLAPSED_MARGIN = 0.05

# So many updates in a row that are left out end a run. The host looks as often as that.
SKIPPED_IN_A_ROW = 10


class Diverged(Exception):  # noqa: N818 (no error of the program)
    """One update after another was left out."""


class Training:
    """A run in progress: networks, optimiser, data and how far it has come.

    Several ranks have one each, alike in all but the noise and their part of each batch.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        data_dir: Path,
        ranks: Ranks = Ranks(),  # noqa: B008 (cannot change)
    ) -> None:
        self.config = config
        self.device = device
        self.ranks = ranks
        self.clock = Clock(ranks)
        check_batch(config.batch_size, ranks)
        # The test set stays unseen where a validation set is kept for choosing by.
        held_out = "valid" if config.train_split == "train" else "test"
        self.images, self.held_out = ranks.in_turns(
            lambda: [
                datasets.load(config.dataset, split, data_dir).to(device)
                for split in (config.train_split, held_out)
            ]
        )
        self.batches = datasets.TrainingBatches(self.images, config.batch_size, config.seed)
        self.length = Length.of(config, self.batches.steps_per_epoch)
        _, height, width = self.images.shape
        top = math.prod(config.ladder.latent_sizes((height, width))[-1])
        parts = 1 if config.sync_bn else ranks.size
        if config.ladder.batchnorm and config.batch_size // parts * top == 1:
            among = f" for {parts} processes" if parts > 1 else ""
            raise UserError(
                f"--batch-size is {config.batch_size}{among} and the top feature map 1x1, which "
                "leaves batch normalisation nothing to average over; give a larger one, or --no-bn"
            )

        torch.manual_seed(config.seed)
        model, guide = build_ladder(config.ladder, self.images.shape)
        elbo = FreeBitsELBO(config.free_bits, analytic_kl=config.analytical_kl)
        self.loss_fn: Any = elbo(model, guide).to(device)
        self.execution = Execution.choose(config.precision, config.compile, device)
        self.execution.lay_out(self.loss_fn)
        if config.sync_bn:
            self.loss_fn = synchronised(self.loss_fn, ranks, device)
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
            spike=config.grad_spike,
            average=self.average,
            execution=self.execution,
            recorded=device.type == "cuda" and ranks.size == 1,
        )
        self.step = 0
        self._minutes_before = 0.0
        self._began = self.clock.now

    @property
    def place(self) -> str:
        """Where it is trained, for reading."""
        ranks = self.ranks.size
        return f"{self.device}" if ranks == 1 else f"{ranks} x {self.device.type}"

    @property
    def minutes(self) -> float:
        """Time spent on the run, in this session and before it was resumed."""
        return self._minutes_before + (self.clock.now - self._began) / 60

    @property
    def finished(self) -> bool:
        """Whether the run has come to its bound."""
        return self.length.progress(self.step, self.minutes) >= 1

    @property
    def elbo_tag(self) -> str:
        """Of the held-out images' negative ELBO."""
        return f"{self.held_out.split}/negative_elbo"

    @property
    def bound_tag(self) -> str:
        """Of the held-out images' importance-weighted bound."""
        return f"{self.held_out.split}/negative_bound_{self.config.ll_samples}_samples"

    def initialise(self) -> None:
        """Set the initial weights from the first batch, if the configuration asks for it."""
        if self.config.data_dep_init:
            self.loss_fn.train()
            with data_dependent_init(self.loss_fn):
                self.loss_fn.guide(self.batches(0))

    def make_ready(self) -> None:
        """Compile the networks, and share each batch with the other ranks if there are any.

        To be called on all, once the weights are those to go on from. A run that begins draws other
        noise on each rank.
        """
        self.execution.compile_blocks(self.loss_fn)
        if self.ranks.size == 1:
            return
        if self.step == 0:
            seed_noise(self.ranks, self.config.seed, self.step)
        self.svi.replicas = Replicas(self.loss_fn, self.ranks, self.device)
        self.loss_fn.train()
        self.svi.replicas.warm_up(self._batch())

    def take_step(self) -> None:
        """One step of training."""
        progress = self.length.progress(self.step, self.minutes)
        self.svi.schedule(
            learning_rate(self.config, self.step, progress), kl_weight(self.config, self.step)
        )
        self.svi.step(self._batch())
        self.step += 1

    def _batch(self) -> Tensor:
        """What this rank sees in the next step."""
        if self.ranks.size == 1:
            return self.batches(self.step)
        return self.batches.part(self.step, self.ranks.rank, self.ranks.size)

    def check_updates(self, *, wait: bool) -> None:
        """Raise `Diverged` where too many updates in a row have been left out.

        Without `wait` as far as it is known by now. Several ranks wait for all steps: they must
        know the same.
        """
        guard = self.svi.guard
        row = guard.longest_row if wait or self.ranks.size > 1 else guard.longest_row_seen()
        if row >= SKIPPED_IN_A_ROW:
            raise Diverged

    def evaluated_module(self) -> nn.Module:
        """The ELBO module whose weights evaluations use: the moving average where there is one."""
        return self.loss_fn if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; to be called on all ranks."""
        return {
            "weights": self.loss_fn.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.svi.optimizer_state(),
            "minutes": self.minutes,
            "log": self.svi.state_dict(),
            **random_states(self.ranks, self.device),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state; raises `UserError` where it cannot be continued."""
        if state["optimizer"] is None:
            raise UserError("the checkpoint holds weights alone, which cannot be trained further")
        load_weights(self.loss_fn, state["weights"])
        try:
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.svi.load_optimizer(state["optimizer"])
            self.svi.load_state_dict(state["log"])
            restore_random_state(state, self.ranks, self.device, self.config.seed)
            self._minutes_before = float(state["minutes"])
            if not 0 <= self._minutes_before < math.inf:
                raise ValueError(f"{state['minutes']} minutes")
        except (
            *(ArithmeticError, AssertionError, AttributeError, LookupError),
            *(RuntimeError, TypeError, ValueError),
        ) as error:
            raise UserError(
                f"the checkpoint does not hold this run's state of training: {error!r}"
            ) from None
        self.step = state["step"]
        self._began = self.clock.now


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
        self._collapsed: set[int] = set()

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
            means = self.training.svi.peek_behind()
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
            "train/learning_rate": training.svi.learning_rate,
            "train/kl_weight": training.svi.kl_weight,
            "train/images_per_second": rate,
            "train/skipped_updates": training.svi.guard.skipped,
            "train/gradient_spikes": training.svi.guard.spikes,
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
            now = collapsed_layers(means.kl, training.config.free_bits)
            values |= by_layer(
                "train_kl_collapsed", [float(i in now) for i in range(1, len(means.kl) + 1)]
            )
            self._tell_of_collapse(now)
        self.monitor.scalars(training.step, values)
        if not self.monitor.shows_bar:
            elbo = f"ELBO {self._shown_bound(-means.negative_elbo)}" if means else "all skipped"
            flag = f", KL collapsed in {layers(self._collapsed)}" if self._collapsed else ""
            self.monitor.say(f"step {training.step}: {elbo}, {rate:.0f} images/s{flag}")
        self._restart_clock()

    def _tell_of_collapse(self, now: set[int]) -> None:
        """Say which layers' KL has collapsed or recovered since the last entry."""
        step = self.training.step
        if fallen := now - self._collapsed:
            self.monitor.say(f"step {step}: KL of {layers(fallen)} has collapsed")
        if risen := self._collapsed - now:
            self.monitor.say(f"step {step}: KL of {layers(risen)} has recovered")
        self._collapsed = now

    def evaluation(self, interruption: Interruption) -> float:
        """Log the ELBO of the held-out images, their KL by layer, samples and reconstructions.

        Returns the negative ELBO in nats. A resumed run that has it in its log does nothing.
        """
        began = time.monotonic()
        training, step = self.training, self.training.step
        logged = training.ranks.share(self.monitor.logged(step))
        if self.training.elbo_tag in logged:
            known = logged[self.training.elbo_tag]
            return math.nan if known is None else known
        bounds = self._bounds(len(training.held_out), 1, interruption)
        elbo = bounds.elbo.mean().item()
        if training.ranks.is_first:
            self._evaluation_entry(bounds)
        training.loss_fn.train()
        self._since += time.monotonic() - began
        return -elbo

    def _evaluation_entry(self, bounds: Bounds) -> None:
        """Log an evaluation with its pictures."""
        step = self.training.step
        kl = bounds.kl.mean(0).tolist()
        elbo = bounds.elbo.mean().item()
        values = {
            self.training.elbo_tag: -elbo,
            f"{self.split}/reconstruction": -bounds.log_likelihood.mean().item(),
            f"{self.split}/kl": sum(kl),
        }
        values |= self._bits_per_dim(f"{self.split}/bits_per_dim", -elbo)
        values |= by_layer(f"{self.split}_kl", kl)
        values |= by_layer(f"{self.split}_active_channels", self._active_channels())
        self._pictures()
        self.monitor.scalars(step, values)  # last: where it is logged, all has been done
        self.monitor.say(
            f"step {step}: {self.split} ELBO {self._shown_bound(elbo)}, KL {sum(kl):.2f}"
        )

    def bound(self, interruption: Interruption) -> None:
        """Log the importance-weighted bound of the held-out images, or of a random few.

        A resumed run that has it in its log does nothing.
        """
        began = time.monotonic()
        training, config = self.training, self.training.config
        if self.training.bound_tag in training.ranks.share(self.monitor.logged(training.step)):
            return
        count = config.ll_images or len(training.held_out)
        bounds = self._bounds(count, config.ll_samples, interruption)
        bound = -bounds.importance_weighted[config.ll_samples].mean().item()
        values = {self.training.bound_tag: bound}
        values |= self._bits_per_dim(f"{self.training.bound_tag}_bits_per_dim", bound)
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
            ranks=self.training.ranks,
            on_images=interruption.on_images,
        )

    def _active_channels(self) -> list[float]:
        """How many latent channels each layer makes use of, by a thousand held-out images."""
        module, images, config = self._evaluated(), self.training.held_out, self.training.config
        some = random_index(len(images), 1000, config.seed)
        with seeded(config.seed, self.training.device):
            channels = by_channel(mean_kl(module.guide, images, some, config.test_batch_size))
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


def collapsed_layers(kl: Sequence[float], free_bits: float) -> set[int]:
    """The layers, from 1 at the bottom, that say next to nothing of the image beyond free bits.

    `kl` are means over images and steps, in nats, bottom to top.
    """
    floor = (1 + COLLAPSED_MARGIN) * free_bits if free_bits else ACTIVE_KL
    return {i for i, value in enumerate(kl, start=1) if value <= floor}


def layers(numbers: set[int]) -> str:
    """Layers by their numbers, for reading."""
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))}"


class Keeper:
    """Writes a run's checkpoints. Without a run there are none.

    A disk that is full in the middle of training is told of in one line, and the next checkpoint
    tries again. Of several ranks the first has the run, and writes; all call the same methods.
    """

    def __init__(self, training: Training, run: Run | None, monitor: Monitor) -> None:
        self.training = training
        self.run = run
        self.monitor = monitor
        self._keeps = training.ranks.share(run is not None)
        self._saved_step = training.step
        self._tried = training.clock.now

    @property
    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        minutes = self.training.config.checkpoint_minutes
        waited = (self.training.clock.now - self._tried) / 60
        return is_due(self.training.step, self.training.config.ckpt_interv) or (
            0 < minutes <= waited
        )

    def save(self, *, final: bool = False) -> None:
        """Write a checkpoint, unless this step has one.

        Raises `UserError` where it is the final one and cannot be written.
        """
        step = self.training.step
        if not self._keeps or self._saved_step == step:
            return
        self._tried = self.training.clock.now
        problem = self.training.ranks.share(self._write(step, self.training.state()))
        if problem is None:
            self._saved_step = step
        elif final:
            raise UserError(problem)
        else:
            self.monitor.say(f"warning: no checkpoint of step {step}: {problem}")

    def _write(self, step: int, state: dict[str, Any]) -> str | None:
        """Write the state, if this is the first rank; returns why that failed, where it did."""
        if self.run is None:
            return None
        self.monitor.sync()  # the log goes at least as far as any checkpoint
        try:
            self.run.save_checkpoint(step, state)
        except UserError as error:
            return str(error)
        return None

    def evaluated(self, negative_elbo: float) -> None:
        """Keep the present weights if they are the best so far, by the held-out images."""
        step = self.training.step
        better = self.run is not None and self.run.is_better(step, negative_elbo)
        if not self.training.ranks.share(better):
            return
        self.save()
        if self.run is not None and self._saved_step == step:
            try:
                self.run.mark_best(step, negative_elbo)
            except UserError as error:
                self.monitor.say(f"warning: {error}")


def run_training(training: Training, run: Run | None, interruption: Interruption) -> None:
    """Train until the bound of the run, or a signal; log, evaluate and write checkpoints.

    Of several ranks only the first is given the run.

    Raises `Diverged` where updates were left out one after another.
    """
    config, silent = training.config, not training.ranks.is_first
    folder = None if run is None else run.path
    with Monitor(folder, training.step, training.length.steps, silent=silent) as monitor:
        logger, keeper = Logger(training, monitor), Keeper(training, run, monitor)
        if training.step == 0:
            monitor.configuration(config.options(), training.elbo_tag)
        training.loss_fn.train()
        try:
            finished = training.finished
            # A resumed run may have been ended while it evaluated the step of its checkpoint.
            if training.step > 0:
                evaluate_if_due(training, logger, keeper, interruption, finished)
            while not finished:
                training.take_step()
                interruption.agree()
                finished = training.finished  # asked once: with --max-minutes it may change
                logger.progress()
                if is_due(training.step, config.tr_log_interv):
                    logger.training_entry()
                if is_due(training.step, SKIPPED_IN_A_ROW) or finished:
                    training.check_updates(wait=finished)
                if keeper.is_due or finished:
                    keeper.save()
                interruption.check()
                evaluate_if_due(training, logger, keeper, interruption, finished)
        except Interrupted:
            monitor.say(f"interrupted after step {training.step}")
        keeper.save(final=True)


def evaluate_if_due(
    training: Training, logger: Logger, keeper: Keeper, interruption: Interruption, finished: bool
) -> None:
    """The evaluations of the present step, if it has any."""
    if is_due(training.step, training.config.ts_log_interv) or finished:
        keeper.evaluated(logger.evaluation(interruption))
    if is_due(training.step, training.config.ll_interv):
        logger.bound(interruption)


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


def resumed_config(stored: RunConfig, arguments: argparse.Namespace) -> RunConfig:
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


def default_folder(config: RunConfig, preset: str | None) -> Path:
    """A new folder under runs/, named after the run and the time."""
    words = [preset or f"{config.dataset}-{len(config.ladder.z_dims)}-layers"]
    if config.descr:
        words.append("-".join(config.descr.split()).replace(os.sep, "-"))
    words.append(datetime.now().strftime("%Y%m%d-%H%M%S"))
    return Path("runs") / "-".join(words)


def resume(
    arguments: argparse.Namespace, path: Path, launch: Launch, device: torch.device, ranks: Ranks
) -> tuple[Training, Run]:
    """The run in `path`, from its newest checkpoint that is whole; the first rank reads it.

    A run that was ended before its first checkpoint begins again.
    """
    found: tuple[Run, dict[str, Any] | None, list[Damaged]] | None = None
    with ranks.together():
        if ranks.is_first:
            found = stored_run(arguments, path, device if ranks.size == 1 else torch.device("cpu"))
    found = ranks.share(found)
    assert found is not None
    run, state, damaged = found
    training = Training(run.config, device, arguments.data_dir, ranks)
    if state is None:
        training.initialise()
    else:
        with ranks.together():
            training.load_state(state)
    with ranks.together():
        if ranks.is_first:
            # An attempt of torchrun's may have come to the end before one of its processes died.
            if training.finished and is_evaluated(training, run) and launch.attempt == 0:
                raise UserError(
                    f"the run in {run.path} has come to its end at step {training.step}; "
                    "give it more --steps, --epochs or --max-minutes"
                )
            for problem in damaged:
                print(f"warning: {problem}; goes on from step {training.step}", file=sys.stderr)
            if state is None:
                print(f"{run.path} has no checkpoint yet: begins again", file=sys.stderr)
            remove_partial_files(run.path)
            run.write_config()
    return training, run


def stored_run(
    arguments: argparse.Namespace, path: Path, device: torch.device
) -> tuple[Run, dict[str, Any] | None, list[Damaged]]:
    """A run, its newest state that is whole, and what is wrong with those after it."""
    run = Run.open(path)
    if arguments.resume is not None:
        run = replace(run, config=resumed_config(run.config, arguments))
    run.best()  # refused now, rather than at the first evaluation, where it is damaged
    return run, *run.newest_whole(device)


def is_evaluated(training: Training, run: Run) -> bool:
    """Whether the log has all evaluations of a finished run's last step."""
    tags = {training.elbo_tag}
    if is_due(training.step, training.config.ll_interv):
        tags.add(training.bound_tag)
    entries = read_entries(run.path / "metrics.jsonl")
    logged = [entry.keys() for entry in entries if entry["step"] == training.step]
    return tags <= set().union(*logged)


def prepare(
    arguments: argparse.Namespace,
    ranks: Ranks = Ranks(),  # noqa: B008 (cannot change)
) -> tuple[Training, Run | None]:
    """The run that the command line asks for, new or resumed, ready to go.

    Of several ranks the first gets the run.
    """
    launch = Launch.of_environment()
    check_launch(arguments, launch, ranks)
    with ranks.together():
        device = choose_device(arguments.device, ranks.local_rank)
    if device.type == "cuda" and ranks.size > 1:
        torch.cuda.set_device(device)
    training: Training
    run: Run | None
    if arguments.resume is not None:
        training, run = resume(arguments, arguments.resume, launch, device, ranks)
    elif ranks.share(is_begun(arguments, launch)):
        training, run = resume(arguments, arguments.out, launch, device, ranks)
    else:
        training, run = begin(arguments, launch, device, ranks)
    training.make_ready()
    return training, run if ranks.is_first else None


def begin(
    arguments: argparse.Namespace, launch: Launch, device: torch.device, ranks: Ranks
) -> tuple[Training, Run | None]:
    """A new run."""
    config = config_from(arguments)
    training = Training(config, device, arguments.data_dir, ranks)
    training.initialise()
    run = None
    with ranks.together():
        if ranks.is_first and not arguments.dry_run:
            path = arguments.out or default_folder(config, arguments.preset)
            origin = provenance(device, ranks.size) | launch.provenance()
            run = Run.create(path, config, training.images.shape, origin)
    return training, run


def check_launch(arguments: argparse.Namespace, launch: Launch, ranks: Ranks) -> None:
    """Raise `UserError` for options that do not suit how the ranks were started."""
    if launch.attempts > 1 and not (arguments.out or arguments.resume or arguments.dry_run):
        raise UserError("torchrun's --max-restarts needs a run folder to go on in: give --out RUN")
    if ranks.size == 1 and getattr(arguments, "sync_bn", False):
        raise UserError(
            "--sync-bn is for several processes and this is one: leave it out, or start them by "
            "torchrun --nproc-per-node N"
        )
    if ranks.size > 1 and arguments.device.startswith("cuda:"):
        raise UserError(
            f"--device is {arguments.device} for {ranks.size} processes, which need a GPU each: "
            "give --device cuda, and choose by CUDA_VISIBLE_DEVICES"
        )


def is_begun(arguments: argparse.Namespace, launch: Launch) -> bool:
    """Whether an earlier attempt of this launch began the run in --out."""
    if launch.attempt == 0 or arguments.out is None or arguments.dry_run:
        return False
    try:
        origin = Run.open(arguments.out).provenance
    except UserError:
        return False
    return origin.get("launch") == launch.name


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    keep_freed_memory()
    with joined_ranks("; --resume goes on from the newest checkpoint") as ranks:
        arguments = parse_arguments(argv)
        with pyro.validation_enabled(False):
            return train(arguments, ranks)


def train(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Train as one of the ranks; returns the exit code."""
    training, run = prepare(arguments, ranks)
    if ranks.is_first:
        describe(training, run)
    code = 0
    with Interruption(training.clock.agree if ranks.size > 1 else None) as interruption:
        try:
            run_training(training, run, interruption)
        except Diverged:
            code = 1
            if ranks.is_first:
                print(f"error: {advice(training, run)}", file=sys.stderr)
        ranks.collect(None)  # torchrun ends all as soon as one has ended with another code than 0
    return code if interruption.signal is None else 128 + interruption.signal


def advice(training: Training, run: Run | None) -> str:
    """What to do about a run that has diverged."""
    steps = [] if run is None else run.checkpoint_steps()
    last = f"the last good checkpoint is that of step {steps[-1]}" if steps else "no checkpoint yet"
    how = f"--resume {run.path}" if run is not None and steps else "begin anew"
    return (
        f"step {training.step}: {SKIPPED_IN_A_ROW} updates in a row were skipped, their loss or "
        f"gradient not finite or exploding; {last}: {how} with a lower --lr, or with --grad-clip"
    )


def describe(training: Training, run: Run | None) -> None:
    """Print what is about to be trained, and where."""
    config, length = training.config, training.length
    parameters = count_parameters(training.loss_fn)
    print(
        f"{len(config.ladder.z_dims)} layers, {parameters:,} parameters, on {training.place}; "
        f"{len(training.images):,} images of {config.dataset} ({config.train_split})"
    )
    if length.steps is None and length.minutes is None:
        print("no --steps, --epochs or --max-minutes: trains until interrupted (Ctrl-C)")
    if run is not None:
        print(f"run folder {run.path}; watch it with: tensorboard --logdir {run.path}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
