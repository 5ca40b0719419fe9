"""What a run logs: TensorBoard, metrics.jsonl, pictures, lines on stderr and a progress bar."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from datasets import ImageSet
from ladder_vae.evaluation.importance import Bounds
from ladder_vae.evaluation.kl import ACTIVE_KL
from ladder_vae.evaluation.metrics import bits_per_dim, is_density
from ladder_vae.reports.image_grids import write_png
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.training.held_out import HeldOutEvaluation, evaluation_mode
from ladder_vae.training.step_means import StepMeans
from ladder_vae.training.svi import SVI
from runtime.distributed import ONE_PROCESS, Ranks
from runtime.errors import UserError
from runtime.files import AppendedFile, to_json, write_atomically, writing

# A layer has collapsed if its KL is below `ACTIVE_KL`, or if its KL is at most this fraction above
# the free bits.
COLLAPSED_MARGIN = 0.05


def elbo_tag(split: str) -> str:
    """The tag of the held-out images' negative ELBO."""
    return f"{split}/negative_elbo"


def bound_tag(split: str, samples: int) -> str:
    """The tag of the held-out images' negative importance-weighted bound."""
    return f"{split}/negative_bound_{samples}_samples"


class Monitor:
    """Writes a run's scalars and pictures, and shows lines and a progress bar.

    Scalars go to TensorBoard and, one JSON object per entry, to `metrics.jsonl`; pictures go to
    TensorBoard and `images/`. Without a folder nothing is written. A resumed run drops entries
    after `first_step`, because training repeats those steps.

    A `silent` monitor prints nothing; if several processes share the work, all but the first have
    one.

    Raises `UserError` if the folder cannot be written at the start. If the disk fills up later, one
    line warns, training continues, and entries are kept until they can be written.
    """

    def __init__(
        self,
        folder: Path | None,
        first_step: int,
        total_steps: int | None,
        *,
        silent: bool = False,
    ) -> None:
        self.folder = folder
        self._silent = silent
        self._first_step = first_step
        self._logged: dict[str, float | None] = {}  # for the first step, before the interruption
        self._metrics: _LogFile | None = None
        self._board: _LogFile | None = None
        if folder is not None:
            self._open(folder, first_step)
        self._bar = tqdm(
            initial=first_step,
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            disable=silent or not sys.stderr.isatty(),
        )

    def _open(self, folder: Path, first_step: int) -> None:
        # Importing TensorBoard takes a second, and a dry run does not need it.
        from ladder_vae.training import tensorboard_events as events

        path = folder / "metrics.jsonl"
        kept = [entry for entry in read_entries(path) if entry["step"] <= first_step]
        lines = "".join(f"{to_json(entry)}\n" for entry in kept)
        write_atomically(path, lambda file: file.write(lines.encode()))
        with writing(folder):
            self._metrics = _LogFile(path)
            self._board = _LogFile(events.event_path(folder))
            self._board.file.append(events.opening(first_step))
        # TensorBoard drops older files' entries from this step on, so write this step's again.
        for entry in kept:
            if entry["step"] == first_step:
                values = {tag: entry[tag] for tag in entry if tag not in ("step", "time")}
                self._board.put(events.scalars(first_step, values, entry.get("time") or 0.0))
                self._logged |= values
        end = f"-{first_step}.png"
        for file in sorted((folder / "images").glob(f"*{end}")):
            with suppress(OSError, ValueError, SyntaxError), Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
                name = file.name.removesuffix(end)
                self._board.put(events.picture(first_step, name, pixels, "HWC"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        for file in (self._metrics, self._board):
            if file is not None:
                file.close()

    def configuration(self, values: Mapping[str, Any], metric: str) -> None:
        """Log the configuration as text, and as hyper-parameters beside the scalar `metric`."""
        if self._board is not None:
            from ladder_vae.training import tensorboard_events as events

            self._board.put(events.configuration(values, metric))

    def logged(self, step: int) -> dict[str, float | None]:
        """The scalars, by tag, that the log already has for a resumed run's first step.

        For other steps there are none. Values that are not finite are None.
        """
        return self._logged if step == self._first_step else {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log one entry: the `values` at `step`, by tag."""
        if self._board is None or self._metrics is None:
            return
        from ladder_vae.training import tensorboard_events as events

        now = round(time.time(), 3)
        entry = {"step": step, "time": now} | dict(values)
        self._metrics.put(f"{to_json(entry)}\n".encode())
        self._board.put(events.scalars(step, values, now))

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """Log a picture (3, H, W) in [0, 1], also as `images/NAME-STEP.png`."""
        if self._board is None or self.folder is None:
            return
        from ladder_vae.training import tensorboard_events as events

        self._board.put(events.picture(step, name, picture, "CHW"))
        try:
            write_png(self.folder / "images" / f"{name}-{step}.png", picture)
        except UserError as error:
            self.say(f"warning: {error}")

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._bar.update()

    @property
    def shows_bar(self) -> bool:
        """Whether there is a progress bar."""
        return not self._bar.disable

    def show(self, **values: str) -> None:
        """Set the values at the end of the progress bar."""
        self._bar.set_postfix(values, refresh=False)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if not self._silent:
            _print(line)

    def sync(self) -> None:
        """Flush all entries to disk, so that they survive a power failure."""
        for file in (self._metrics, self._board):
            if file is not None:
                file.sync()


def _print(line: str) -> None:
    """Print a line to stderr, above the progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class _LogFile:
    """A log file. If the disk is full, records are kept in memory and written later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = AppendedFile(path)
        self._waiting: list[bytes] = []

    def put(self, record: bytes) -> None:
        """Append the waiting records and this one."""
        was_full = bool(self._waiting)
        self._waiting.append(record)
        try:
            while self._waiting:
                self.file.append(self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            if not was_full:  # warn once
                reason = error.strerror or error
                _print(
                    f"warning: cannot write {self.path} ({reason}); will retry at the next entry"
                )
        else:
            if was_full:
                _print(f"{self.path} is complete again")

    def sync(self) -> None:
        """Flush the file to disk."""
        with suppress(OSError):
            self.file.sync()

    def close(self) -> None:
        """Try once more to write waiting records, and close the file."""
        if self._waiting:
            self.put(b"")
        self.file.close()


class Logger:
    """Turns a run's progress into log entries.

    A resumed run does not repeat an evaluation of its first step that the log already has.

    Args:
        step: the number of steps taken so far.
    """

    def __init__(
        self,
        config: RunConfig,
        held_out: ImageSet,
        monitor: Monitor,
        step: int,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        self.split = held_out.split
        self.elbo_tag = elbo_tag(held_out.split)
        self.bound_tag = bound_tag(held_out.split, config.ll_samples)
        self._config = config
        self._monitor = monitor
        self._ranks = ranks
        self._evaluation = HeldOutEvaluation(config, held_out, ranks)
        self._image_shape = held_out.shape
        # Bounds on the probability of 8-bit images are also shown in bits per dimension.
        self._in_bits = held_out.levels > 2 and not is_density(config.ladder.likelihood)
        self._since_step, self._since = step, time.monotonic()
        self._shown = 0.0
        self._collapsed: set[int] = set()

    def progress(self, step: int, svi: SVI) -> None:
        """Update the progress bar, at most twice a second."""
        self._monitor.advance()
        if self._monitor.shows_bar and time.monotonic() - self._shown > 0.5:
            means = svi.sums.peek_behind()
            if means is not None:
                self._monitor.show(
                    ELBO=self._formatted(-means.negative_elbo),
                    images_per_s=f"{self._images_per_second(step):.0f}",
                )
            self._shown = time.monotonic()

    def training_entry(self, step: int, svi: SVI) -> None:
        """Log the means over the steps since the last entry."""
        rate, means = self._images_per_second(step), svi.sums.read()
        values = {
            "train/learning_rate": svi.learning_rate,
            "train/kl_weight": svi.kl_weight,
            "train/images_per_second": rate,
            "train/skipped_updates": svi.guard.skipped,
            "train/gradient_spikes": svi.guard.spikes,
        }
        if means is not None:
            values |= self._training_scalars(means)
            self._report_collapse(step, collapsed_layers(means.kl, self._config.free_bits))
            layers = range(1, len(means.kl) + 1)
            values |= by_layer("train_kl_collapsed", [float(i in self._collapsed) for i in layers])
        self._monitor.scalars(step, values)
        if not self._monitor.shows_bar:
            elbo = (
                f"ELBO {self._formatted(-means.negative_elbo)}" if means else "all updates skipped"
            )
            flag = f", KL collapsed in {_listed(self._collapsed)}" if self._collapsed else ""
            self._monitor.say(f"step {step}: {elbo}, {rate:.0f} images/s{flag}")
        self._since_step, self._since = step, time.monotonic()

    def _training_scalars(self, means: StepMeans) -> dict[str, float]:
        values = {
            "train/loss": means.loss,
            "train/negative_elbo": means.negative_elbo,
            "train/reconstruction": -means.log_likelihood,
            "train/kl": sum(means.kl),
            "train/gradient_norm": means.grad_norm,
        }
        values |= self._bits("train/bits_per_dim", means.negative_elbo)
        return values | by_layer("train_kl", means.kl)

    def _report_collapse(self, step: int, now: set[int]) -> None:
        """Report the layers whose KL has collapsed or recovered since the last entry."""
        if fallen := now - self._collapsed:
            self._monitor.say(f"step {step}: KL of {_listed(fallen)} has collapsed")
        if risen := self._collapsed - now:
            self._monitor.say(f"step {step}: KL of {_listed(risen)} has recovered")
        self._collapsed = now

    def evaluation(self, step: int, module: nn.Module, on_images: Callable[[int], None]) -> float:
        """Log the held-out ELBO, KL by layer, samples and reconstructions.

        Returns the negative ELBO in nats. `on_images` is called after each group of images.
        """
        logged = self._ranks.share(self._monitor.logged(step))
        if self.elbo_tag in logged:
            known = logged[self.elbo_tag]
            return math.nan if known is None else known
        with self._not_training(), evaluation_mode(module):
            bounds = self._evaluation.elbo(module, on_images)
            if self._ranks.is_first:
                self._evaluation_entry(step, module, bounds)
        return -bounds.elbo.mean().item()

    def _evaluation_entry(self, step: int, module: nn.Module, bounds: Bounds) -> None:
        kl = bounds.kl.mean(0).tolist()
        elbo = bounds.elbo.mean().item()
        values = {
            self.elbo_tag: -elbo,
            f"{self.split}/reconstruction": -bounds.log_likelihood.mean().item(),
            f"{self.split}/kl": sum(kl),
        }
        values |= self._bits(f"{self.split}/bits_per_dim", -elbo)
        values |= by_layer(f"{self.split}_kl", kl)
        active = self._evaluation.active_channels(module)
        values |= by_layer(f"{self.split}_active_channels", active)
        for name, picture in self._evaluation.pictures(module).items():
            self._monitor.picture(step, name, picture)
        self._monitor.scalars(step, values)  # last, because it marks the evaluation as complete
        self._monitor.say(
            f"step {step}: {self.split} ELBO {self._formatted(elbo)}, KL {sum(kl):.2f}"
        )

    def bound(self, step: int, module: nn.Module, on_images: Callable[[int], None]) -> None:
        """Log the importance-weighted bound of all held-out images, or of a random subset."""
        if self.bound_tag in self._ranks.share(self._monitor.logged(step)):
            return
        samples = self._config.ll_samples
        with self._not_training(), evaluation_mode(module):
            bounds = self._evaluation.bound(module, on_images)
        bound = bounds.importance_weighted[samples].mean().item()
        values = {self.bound_tag: -bound} | self._bits(f"{self.bound_tag}_bits_per_dim", -bound)
        self._monitor.scalars(step, values)
        self._monitor.say(
            f"step {step}: {self.split} log-likelihood at least {self._formatted(bound)} "
            f"({samples} samples)"
        )

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Exclude the time inside from the training rate."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def _images_per_second(self, step: int) -> float:
        images = (step - self._since_step) * self._config.batch_size
        return images / max(time.monotonic() - self._since, 1e-9)

    def _formatted(self, nats: float) -> str:
        """A bound on the log-likelihood with its unit."""
        bits = f" ({bits_per_dim(-nats, self._image_shape):.3f} bits/dim)" if self._in_bits else ""
        return f"{nats:.2f} nats{bits}"

    def _bits(self, tag: str, nats: float) -> dict[str, float]:
        """The scalar for a negative bound in bits per dimension, for 8-bit images only."""
        return {tag: bits_per_dim(nats, self._image_shape)} if self._in_bits else {}


def by_layer(group: str, values: Sequence[float]) -> dict[str, float]:
    """One value for each layer, by tag; layer_01 is the bottom."""
    return {f"{group}/layer_{i:02d}": value for i, value in enumerate(values, start=1)}


def collapsed_layers(kl: Sequence[float], free_bits: float) -> set[int]:
    """The layers, from 1 at the bottom, whose latents carry almost no information.

    `kl` are means over images and steps, in nats, bottom to top.
    """
    floor = (1 + COLLAPSED_MARGIN) * free_bits if free_bits else ACTIVE_KL
    return {i for i, value in enumerate(kl, start=1) if value <= floor}


def _listed(layers: set[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, sorted(layers)))}"
