"""What a run shows while it runs: TensorBoard, metrics.jsonl and a progress bar."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from tqdm import tqdm

from atomic import write_atomically, writing
from checkpoint import to_json
from errors import UserError
from pictures import write_png


class Monitor:
    """Writes a run's scalars and pictures, and keeps the progress bar.

    Scalars go to TensorBoard and, one JSON object per entry, to `metrics.jsonl`; pictures to
    TensorBoard and `images/`. Without a folder nothing is written. A resumed run's monitor drops
    what was written after `first_step`, which the run comes to again.
    """

    def __init__(self, folder: Path | None, first_step: int, total_steps: int | None) -> None:
        self.folder = folder
        self._writer: Any = None
        self._metrics: Any = None
        if folder is not None:
            self._open(folder, first_step)
        self._bar = tqdm(
            initial=first_step,
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def _open(self, folder: Path, first_step: int) -> None:
        # TensorBoard takes a second to import, and a dry run has no need of it.
        from torch.utils.tensorboard import SummaryWriter

        path = self._metrics_path = folder / "metrics.jsonl"
        kept = _entries_until(path, first_step)
        write_atomically(path, lambda file: file.write(kept.encode()))
        try:
            # Without a buffer, so that an entry that does not fit on the disk fails here.
            self._metrics = path.open("ab", buffering=0)
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
            self._metrics.close()

    def configuration(self, values: Mapping[str, Any], metric: str) -> None:
        """Show the configuration, as text and as hyper-parameters beside the scalar `metric`."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
        self._writer.add_text("configuration", f"| option | value |\n|---|---|\n{rows}", 0)
        plain = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in values.items()
        }
        for summary in hparams(plain, {metric: None}):
            self._writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log one entry: the `values` at `step`, by tag."""
        if self._writer is None:
            return
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        entry = {"step": step, "time": round(time.time(), 3)} | dict(values)
        with writing(self._metrics_path):
            self._metrics.write(f"{to_json(entry)}\n".encode())

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """Show a picture (3, H, W) in [0, 1] and keep it as `images/NAME-STEP.png`."""
        if self._writer is None or self.folder is None:
            return
        self._writer.add_image(name, picture, step)
        write_png(self.folder / "images" / f"{name}-{step}.png", picture)

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
        self._bar.write(line, file=sys.stderr)


def _entries_until(path: Path, step: int) -> str:
    """The whole lines of metrics.jsonl that belong to the steps up to `step`."""
    if not path.exists():
        return ""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            continue  # cut short when the run was killed
        try:
            entry_step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path} is damaged: {line.strip()[:40]!r} is no entry of it") from None
        if entry_step <= step:
            kept.append(line)
    return "".join(kept)
