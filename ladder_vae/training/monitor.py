"""What a run shows while it runs: TensorBoard, metrics.jsonl and a progress bar."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ladder_vae.reports.image_grids import write_png
from ladder_vae.runs.metrics_log import read_entries
from runtime.errors import UserError
from runtime.files import AppendedFile, to_json, write_atomically, writing


class Monitor:
    """Writes a run's scalars and pictures, and keeps the progress bar.

    Scalars go to TensorBoard and, one JSON object per entry, to `metrics.jsonl`; pictures to
    TensorBoard and `images/`. Without a folder nothing is written. A resumed run's monitor drops
    what was written after `first_step`, which the run comes to again.

    A `silent` one, of a process that is not the first of several, says nothing either.

    Raises `UserError` where nothing can be written at the start. Later a full disk ends no run: one
    line tells of it, and entries wait until there is room.
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
        self._logged: dict[str, float | None] = {}  # at the first step, before this session
        self._metrics: _Outlet | None = None
        self._board: _Outlet | None = None
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
        # TensorBoard takes a second to import, and a dry run has no need of it.
        from ladder_vae.training import tensorboard_events as events

        path = folder / "metrics.jsonl"
        kept = [entry for entry in read_entries(path) if entry["step"] <= first_step]
        lines = "".join(f"{to_json(entry)}\n" for entry in kept)
        write_atomically(path, lambda file: file.write(lines.encode()))
        with writing(folder):
            self._metrics = _Outlet(path)
            self._board = _Outlet(events.event_path(folder))
            self._board.file.append(events.opening(first_step))
        # TensorBoard is shown anew what belongs to this step: all of it, or nothing, may be there.
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
        for outlet in (self._metrics, self._board):
            if outlet is not None:
                outlet.close()

    def configuration(self, values: Mapping[str, Any], metric: str) -> None:
        """Show the configuration, as text and as hyper-parameters beside the scalar `metric`."""
        if self._board is not None:
            from ladder_vae.training import tensorboard_events as events

            self._board.put(events.configuration(values, metric))

    def logged(self, step: int) -> dict[str, float | None]:
        """Scalars by tag that a resumed run has of its first step already; not finite ones None."""
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
        """Show a picture (3, H, W) in [0, 1] and keep it as `images/NAME-STEP.png`."""
        if self._board is None or self.folder is None:
            return
        from ladder_vae.training import tensorboard_events as events

        self._board.put(events.picture(step, name, picture, "CHW"))
        try:
            write_png(self.folder / "images" / f"{name}-{step}.png", picture)
        except UserError as error:
            self.say(f"warning: {error}")

    def advance(self) -> None:
        """One step more."""
        self._bar.update()

    @property
    def shows_bar(self) -> bool:
        """Whether there is a progress bar to keep up to date."""
        return not self._bar.disable

    def show(self, **values: str) -> None:
        """Set what stands at the end of the progress bar."""
        self._bar.set_postfix(values, refresh=False)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if not self._silent:
            tell(line)

    def sync(self) -> None:
        """Have all entries outlast a failure of power."""
        for outlet in (self._metrics, self._board):
            if outlet is not None:
                outlet.sync()


def tell(line: str) -> None:
    """Print a line to stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class _Outlet:
    """A file that pieces are added to; those that a full disk does not take wait for the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = AppendedFile(path)
        self._waiting: list[bytes] = []

    def put(self, piece: bytes) -> None:
        """Add a piece, after those that still wait."""
        was_full = bool(self._waiting)
        self._waiting.append(piece)
        try:
            while self._waiting:
                self.file.append(self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            if not was_full:  # told once
                reason = error.strerror or error
                tell(f"warning: cannot write {self.path} ({reason}); tries again at the next entry")
        else:
            if was_full:
                tell(f"{self.path} is written again, and lacks nothing")

    def sync(self) -> None:
        """Have what is written outlast a failure of power."""
        with suppress(OSError):
            self.file.sync()

    def close(self) -> None:
        """Close the file; what waits is given a last chance."""
        if self._waiting:
            self.put(b"")
        self.file.close()
