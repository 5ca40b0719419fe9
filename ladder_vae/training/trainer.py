"""Training a ladder: the state of a run in progress, and the loop over its steps."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import ImageSet, TrainingBatches
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.networks.initialization import data_dependent_init, scale_branches
from ladder_vae.networks.precision import Execution
from ladder_vae.runs.checkpoint import load_weights
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from ladder_vae.training.checkpointer import Checkpointer
from ladder_vae.training.clock import Clock
from ladder_vae.training.cuda_graph import CudaRecorder
from ladder_vae.training.data_parallel import (
    Replicas,
    check_batch_statistics,
    random_states,
    restore_random_state,
    seed_noise,
    synchronised,
)
from ladder_vae.training.device_step import DeviceSVI
from ladder_vae.training.logger import Logger, Monitor
from ladder_vae.training.moving_average import MovingAverage
from ladder_vae.training.optimizers import make_optimizer
from ladder_vae.training.schedule import Length, is_due, kl_weight, learning_rate
from ladder_vae.training.svi import SVI
from runtime.distributed import ONE_PROCESS, Ranks
from runtime.errors import UserError
from runtime.signals import Interrupted, Interruption

# Training ends after this many skipped updates in a row. The host checks once per as many steps.
SKIPPED_IN_A_ROW = 10


class Diverged(Exception):  # noqa: N818 (the program did nothing wrong)
    """Too many updates in a row were skipped. The message tells the user what to do."""


class Trainer:
    """A run in progress: networks, optimizer, data, and the number of steps taken.

    If several processes share the work, each has its own trainer. The trainers differ only in their
    noise and in their part of the batch.

    Args:
        loss_fn: Pyro's ELBOModule, `FreeBitsELBO(...)(model, guide)`. Its parameters are trained.
        images: the training images, on `device`.
        held_out: the images for evaluations during training, on `device`.
        ranks: the processes that share each batch.
        last_objective: replaces the ELBO module's objective after `elbo_share` of the run.

    Raises `ValueError` if options do not suit the device or the number of processes.
    """

    def __init__(
        self,
        config: RunConfig,
        loss_fn: Any,
        images: ImageSet,
        held_out: ImageSet,
        device: torch.device,
        ranks: Ranks = ONE_PROCESS,
        last_objective: Any = None,
    ) -> None:
        self.config = config
        self.images = images
        self.held_out = held_out
        self.device = device
        self.ranks = ranks
        self.clock = Clock(ranks)
        self.batches = TrainingBatches(images, config.batch_size, config.seed, flip=config.flip)
        self.length = Length.of(config, self.batches.steps_per_epoch)
        check_batch_statistics(config, images.shape, ranks)

        # The gradient of iwae goes through the networks twice, which compiled ones forbid.
        compile = "no" if config.objective == "iwae" else config.compile
        self.execution = Execution.choose(config.precision, compile, device)
        self.loss_fn = loss_fn.to(device)
        self.execution.lay_out(self.loss_fn)
        if config.sync_bn:
            self.loss_fn = synchronised(self.loss_fn, ranks, device)
        self.average = MovingAverage(self.loss_fn, config.ema) if config.ema else None
        self.svi = self._svi()
        self.last_objective = last_objective
        self.step = 0
        self._minutes_before = 0.0
        self._began = self.clock.now

    def _svi(self) -> SVI:
        config = self.config
        options: dict[str, Any] = {
            "clip_norm": config.grad_clip,
            "skip_norm": config.grad_skip,
            "spike": config.grad_spike,
            "average": self.average,
            "execution": self.execution,
        }
        optimizer = make_optimizer(config, self.loss_fn, self.execution.precision)
        if self.device.type == "cuda":
            recorder = CudaRecorder() if self.ranks.size == 1 else None
            return DeviceSVI(self.loss_fn, optimizer, recorder=recorder, **options)
        return SVI(self.loss_fn, optimizer, **options)

    @property
    def minutes(self) -> float:
        """Minutes spent on the run, including those before it was resumed."""
        return self._minutes_before + (self.clock.now - self._began) / 60

    @property
    def finished(self) -> bool:
        """Whether the run has reached its length."""
        return self.length.progress(self.step, self.minutes) >= 1

    def initialise(self) -> None:
        """Set the initial weights: `data_dep_init`, from the first batch, and `scale_branches`."""
        if self.config.data_dep_init:
            self.loss_fn.train()
            with data_dependent_init(self.loss_fn):
                self.loss_fn.guide(self.batches(0))
        if self.config.scale_branches:
            scale_branches(self.loss_fn)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Set the initial weights, also of the average; raises `UserError` if they do not fit."""
        load_weights(self.loss_fn, weights)
        if self.average is not None:
            load_weights(self.average.module, weights)

    def prepare(self) -> None:
        """Compile the networks and connect the processes; call it once the weights are set."""
        self.execution.compile_blocks(self.loss_fn)
        if self.ranks.size > 1:
            if self.step == 0:
                seed_noise(self.ranks, self.config.seed, self.step)
            replicas = Replicas(self.loss_fn, self.ranks, self.device)
            self.loss_fn.train()
            replicas.warm_up(self._batch())
            replicas.attach(self.svi)

    def take_step(self) -> None:
        """Take one training step."""
        progress = self.length.progress(self.step, self.minutes)
        last = self.last_objective
        if last is not None and self.svi.elbo is not last and progress >= self.config.elbo_share:
            self.svi.maximise(last)
        self.svi.schedule(
            learning_rate(self.config, self.step, progress), kl_weight(self.config, self.step)
        )
        self.svi.step(self._batch())
        self.step += 1

    def _batch(self) -> Tensor:
        """The batch of the next step, or this process's part of it."""
        return self.batches.part(self.step, self.ranks.rank, self.ranks.size)

    def has_diverged(self, *, wait: bool) -> bool:
        """Whether too many updates in a row were skipped.

        Without `wait`, the result may lag a few steps behind a GPU. Several processes always wait,
        so that all get the same result.
        """
        guard = self.svi.guard
        row = guard.longest_row if wait or self.ranks.size > 1 else guard.longest_row_seen()
        return row >= SKIPPED_IN_A_ROW

    def evaluated_module(self) -> nn.Module:
        """The ELBO module that evaluations use: the moving average if there is one."""
        return self.loss_fn if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs. All processes must call this together."""
        return {
            "weights": self.loss_fn.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "svi": self.svi.state_dict(),
            "minutes": self.minutes,
            **random_states(self.ranks, self.device),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state; raises `UserError` if it does not fit the run."""
        if state["svi"] is None:
            raise UserError("the checkpoint holds only weights, so training cannot resume from it")
        load_weights(self.loss_fn, state["weights"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.svi.load_state_dict(state["svi"])
        restore_random_state(state, self.ranks, self.device, self.config.seed)
        self._minutes_before = state["minutes"]
        self.step = state["step"]
        self._began = self.clock.now


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
    if config.elbo_share:
        print(
            f"maximises the ELBO for {config.elbo_share:.0%} of the run, and then the "
            f"importance-weighted bound with {config.particles} samples, whose steps take longer"
        )
    if run is not None:
        print(f"run folder {run.path}; to monitor it: tensorboard --logdir {run.path}")
    sys.stdout.flush()


def train(trainer: Trainer, run: Run | None, signals: Interruption) -> None:
    """Train until the run reaches its length or a signal arrives.

    Logs, evaluates and writes checkpoints to the run folder; without `run`, nothing is written.
    If several processes share the work, the first one writes.

    Raises `Diverged` if too many updates in a row were skipped, and `UserError` if the last
    checkpoint cannot be written.
    """
    config, ranks = trainer.config, trainer.ranks
    if not ranks.is_first:
        run = None
    folder: Path | None = None if run is None else run.path
    with Monitor(folder, trainer.step, trainer.length.steps, silent=not ranks.is_first) as monitor:
        logger = Logger(config, trainer.held_out, monitor, trainer.step, ranks)
        checkpointer = Checkpointer(
            run, config, trainer.state, monitor, trainer.step, trainer.clock
        )
        if trainer.step == 0:
            monitor.configuration(config.options(), logger.elbo_tag)
        trainer.loss_fn.train()
        try:
            _take_steps(trainer, run, logger, checkpointer, signals)
        except Interrupted:
            monitor.say(f"interrupted after step {trainer.step}")
        checkpointer.save(trainer.step, final=True)


def _take_steps(
    trainer: Trainer,
    run: Run | None,
    logger: Logger,
    checkpointer: Checkpointer,
    signals: Interruption,
) -> None:
    """The training loop. Raises `Interrupted` after a signal."""
    config = trainer.config
    finished = trainer.finished
    if trainer.step > 0:  # the run may have been interrupted during this step's evaluation
        _evaluate_if_due(trainer, logger, checkpointer, signals, finished)
    while not finished:
        trainer.take_step()
        signals.agree()
        finished = trainer.finished  # once per step: with --max-minutes it depends on the clock
        logger.progress(trainer.step, trainer.svi)
        if is_due(trainer.step, config.tr_log_interv):
            logger.training_entry(trainer.step, trainer.svi)
        if (is_due(trainer.step, SKIPPED_IN_A_ROW) or finished) and trainer.has_diverged(
            wait=finished
        ):
            raise Diverged(_advice(trainer.step, run))
        if finished or checkpointer.is_due(trainer.step):
            checkpointer.save(trainer.step)
        signals.check()
        _evaluate_if_due(trainer, logger, checkpointer, signals, finished)


def _evaluate_if_due(
    trainer: Trainer,
    logger: Logger,
    checkpointer: Checkpointer,
    signals: Interruption,
    finished: bool,
) -> None:
    config, step, module = trainer.config, trainer.step, trainer.evaluated_module()
    if finished or is_due(step, config.ts_log_interv):
        negative_elbo = logger.evaluation(step, module, signals.on_images)
        checkpointer.evaluated(step, negative_elbo)
    if is_due(step, config.ll_interv):
        logger.bound(step, module, signals.on_images)


def _advice(step: int, run: Run | None) -> str:
    """What to do after training has diverged."""
    steps = [] if run is None else run.checkpoint_steps()
    last = f"the last good checkpoint is that of step {steps[-1]}" if steps else "no checkpoint yet"
    how = f"--resume {run.path}" if run is not None and steps else "start again"
    return (
        f"step {step}: {SKIPPED_IN_A_ROW} updates in a row were skipped because their loss or "
        f"gradient was not finite or exploded; {last}: {how} with a lower --lr, or with --grad-clip"
    )
