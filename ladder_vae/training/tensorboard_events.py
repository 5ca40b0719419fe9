"""Records of TensorBoard's event files, as bytes.

`SummaryWriter` writes from its own thread: a full disk ends that thread with a traceback, and a
killed run loses the records that the thread has not written yet. The logger therefore appends the
records to the event file without it.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import summary_pb2
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, image, scalar, text

from ladder_vae.training.tag_descriptions import description
from runtime.files import utf_8

_DATA_CLASSES = {
    "scalars": summary_pb2.DATA_CLASS_SCALAR,
    "images": summary_pb2.DATA_CLASS_BLOB_SEQUENCE,
}

# What TensorBoard shows above a picture, instead of its tag.
_DISPLAY_NAMES = {
    "reconstructions": "reconstructions (rows 1, 3, ...: originals; below each: reconstructions)"
}


def event_path(folder: Path) -> Path:
    """The path of a new event file; TensorBoard reads event files in the order of their names."""
    return folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"


def opening(first_step: int) -> bytes:
    """The first records of a file: TensorBoard drops older files' records from `first_step` on."""
    now = time.time()
    version = _record(wall_time=now, file_version="brain.Event:2")
    start = SessionLog(status=SessionLog.START)
    return version + _record(wall_time=now, step=first_step, session_log=start)


def scalars(step: int, values: Mapping[str, float | None], when: float) -> bytes:
    """Scalars by tag, logged at the time `when` (seconds since 1970); None stands for nan."""
    shown = {tag: float("nan") if value is None else value for tag, value in values.items()}
    return b"".join(
        _record(wall_time=when, step=step, summary=_described(scalar(tag, value), tag, "scalars"))
        for tag, value in shown.items()
    )


def picture(step: int, name: str, pixels: Any, dataformats: str) -> bytes:
    """A picture: a tensor or array whose dimensions have the order `dataformats`."""
    summary = _described(image(name, pixels, dataformats=dataformats), name, "images")
    if name in _DISPLAY_NAMES:
        for value in summary.value:
            value.metadata.display_name = _DISPLAY_NAMES[name]
    return _record(wall_time=time.time(), step=step, summary=summary)


def configuration(values: Mapping[str, Any], metric: str) -> bytes:
    """Options, as text and as hyper-parameters beside the scalar `metric`; and the layer charts."""
    # Text of the command line that is not UTF-8 is escaped.
    values = {
        name: utf_8(value) if isinstance(value, str) else value for name, value in values.items()
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
    shown = text("configuration", f"| option | value |\n|---|---|\n{rows}")
    plain = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in values.items()
    }
    return b"".join(
        _record(wall_time=time.time(), summary=summary)
        for summary in (shown, *hparams(plain, {metric: None}), _layer_charts(metric))
    )


def _layer_charts(metric: str) -> Any:
    """The layout of the tab Custom Scalars: all layers in one chart. `metric` names the split."""
    split = metric.partition("/")[0]
    charts = {
        "KL by layer, training (nats)": "train_kl",
        f"KL by layer, {split} (nats)": f"{split}_kl",
        f"Active channels by layer, {split}": f"{split}_active_channels",
    }
    pattern = {title: ["Multiline", [f"{tag}/layer_.*"]] for title, tag in charts.items()}
    return custom_scalars({"Layers": pattern})


def _described(summary: Any, tag: str, plugin: str) -> Any:
    """`summary` with the description of its tag."""
    for value in summary.value:
        value.metadata.summary_description = description(tag)
        value.metadata.plugin_data.plugin_name = plugin
        value.metadata.data_class = _DATA_CLASSES[plugin]
    return summary


def _record(**content: Any) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(**content).SerializeToString())
    return buffer.getvalue()
