"""When checkpoints are written, and which of them are kept."""

from collections.abc import Callable
from typing import Any

from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from ladder_vae.training.logger import Monitor
from ladder_vae.training.schedule import is_due
from ladder_vae.training.signals import Clock
from runtime.errors import UserError


class Checkpointer:
    """Writes a run's checkpoints. Without a run it writes none.

    If a checkpoint cannot be written during training, for example because the disk is full, one
    line warns, and training continues until the next checkpoint. If several processes share the
    work, all call the methods together, and the first one, which has the run, writes.

    Args:
        state: returns the state of training; all processes call it together.
        step: the number of steps taken so far.
    """

    def __init__(
        self,
        run: Run | None,
        config: RunConfig,
        state: Callable[[], dict[str, Any]],
        monitor: Monitor,
        step: int,
        clock: Clock,
    ) -> None:
        self._run = run
        self._config = config
        self._state = state
        self._monitor = monitor
        self._clock = clock
        self._ranks = clock.ranks
        self._keeps = self._ranks.share(run is not None)
        self._saved_step = step
        self._tried = clock.now

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due, by steps or by minutes."""
        minutes = self._config.checkpoint_minutes
        waited = (self._clock.now - self._tried) / 60
        return is_due(step, self._config.ckpt_interv) or 0 < minutes <= waited

    def save(self, step: int, *, final: bool = False) -> None:
        """Write a checkpoint, unless this step has one already.

        Raises `UserError` if the final one cannot be written.
        """
        if not self._keeps or self._saved_step == step:
            return
        self._tried = self._clock.now
        problem = self._ranks.share(self._write(step, self._state()))
        if problem is None:
            self._saved_step = step
        elif final:
            raise UserError(problem)
        else:
            self._monitor.say(f"warning: no checkpoint of step {step}: {problem}")

    def _write(self, step: int, state: dict[str, Any]) -> str | None:
        """Write the state, on the first process; returns the error message if that fails."""
        if self._run is None:
            return None
        self._monitor.sync()  # the log must reach at least as far as any checkpoint
        try:
            self._run.save_checkpoint(step, state)
        except UserError as error:
            return str(error)
        return None

    def evaluated(self, step: int, negative_elbo: float) -> None:
        """Save the weights as the best checkpoint if their held-out negative ELBO is the lowest."""
        better = self._run is not None and self._run.is_better(step, negative_elbo)
        if not self._ranks.share(better):
            return
        self.save(step)
        if self._run is not None and self._saved_step == step:
            try:
                self._run.mark_best(step, negative_elbo)
            except UserError as error:
                self._monitor.say(f"warning: {error}")
