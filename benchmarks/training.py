"""How fast a training step is: beside plain PyTorch, and beside its convolutions alone.

    python -m benchmarks.training [--presets digits mnist-3] [--batch-sizes 64] [--lines ...]
    python -m benchmarks.training --scaling

A line is a way to do the same step, KIND/OPTIONS:

    ours/bf16+channels_last     svi.py's step; options are a precision (float32, tf32, bf16) and
                                +channels_last and +compile where they are wanted; on a GPU
                                +graph at the end has it recorded as a CUDA graph
    plain/bf16+channels_last    a loop over the same networks without Pyro (benchmarks/plain.py)
    plain                       that loop as plain PyTorch has it by default: eager, float32, and
                                with the C library's allocator as it is, where ours keeps memory
    convolutions/float32        the convolutions of the step alone, forward and backward: the floor

Each line is a process of its own, since the allocator cannot be set back, and code that one has
compiled would slow another. They take turns, step by step, so that whatever else the machine does
slows all alike. Figures are medians over --repeats turns, once each has done three steps. Weights
and images are random, which changes no time. Peak memory is on the CPU the highest resident set of
the line's process, on a GPU what PyTorch allocated. Afterwards one step of each is profiled, by
kind of operation; on a GPU its operations and bytes are counted for the roofline.

Prints a table, puts the figures in the place of earlier ones of the same preset, batch size and
machine in results/benchmarks/training.json, and draws training_profile.png beside it. --scaling is
cost against depth, width, resolution and batch size: see scaling.py.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.charts import draw_profiles
from benchmarks.lines import TRAINING, Case, Line, TimedSteps
from benchmarks.memory import GIB
from benchmarks.processes import Process, median_seconds, processes
from benchmarks.records import known, machine_of, merged
from benchmarks.roofline import PEAKS, least_milliseconds, totals
from ladder_vae.runs.command_line import OneLineParser
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.runs.provenance import provenance
from runtime.device import choose_device
from runtime.errors import UserError, run_command
from runtime.files import write_json

MODULE = "benchmarks.training"
RESULT = Path(__file__).parent.parent / "results" / "benchmarks" / "training.json"
PICTURE = RESULT.with_name("training_profile.png")
KINDS = tuple(TRAINING)
DEFAULT_PRESETS = ("digits", "mnist-3")
DEFAULT_LINES = (
    "plain",
    "plain/float32+channels_last",
    "ours/float32+channels_last",
    "ours/float32+channels_last+compile",
    "plain/bf16+channels_last",
    "ours/bf16+channels_last",
    "convolutions/float32+channels_last",
    "convolutions/bf16+channels_last",
)


def measured(
    case: Case, lines: Sequence[Line], repeats: int, *, profiled: bool
) -> dict[str, dict[str, Any]]:
    """The figures of each line, by name."""
    makers = {line.name: partial(TRAINING[line.kind], case, line) for line in lines}
    with processes(makers, torch.device(case.device)) as started:
        taken = median_seconds(started, repeats)
        found = {}
        for line, process in zip(lines, started, strict=True):
            found[line.name] = {
                "ms_per_step": 1000 * taken[line.name],
                "images_per_second": case.batch_size / taken[line.name],
                "first_step_seconds": process.ask("first"),
            }
            if line.kind != "convolutions":  # whose process has seen the whole step once
                found[line.name]["peak_bytes"] = process.ask("peak")
                if profiled and not line.is_graph:  # which shows no operation
                    found[line.name]["profile_ms"] = process.ask("by_kind")
    return found


def roofline(case: Case, lines: Sequence[Line]) -> dict[str, Any]:
    """By precision, what a step's operations and bytes are, and the least time for them on a GPU.

    Empty on a processor, and of a GPU whose peaks are not known only the counts.
    """
    if torch.device(case.device).type != "cuda":
        return {}
    peak = PEAKS.get(torch.cuda.get_device_name(case.device))
    found: dict[str, Any] = {}
    for precision in dict.fromkeys(line.execution.precision for line in lines):
        line = Line("plain", f"{precision}+channels_last")
        with closing(Process(line.name, partial(TimedSteps, case, line))) as process:
            counts = process.ask("counts")
        found[precision] = totals(counts)
        if peak is not None:
            found[precision]["least_ms"] = least_milliseconds(counts, peak, precision)
    return found


def figures(
    case: Case, lines: Sequence[Line], repeats: int, *, profiled: bool = True
) -> dict[str, Any]:
    """All that is measured of a case."""
    device = torch.device(case.device)
    return {
        "preset": case.preset,
        "batch_size": case.batch_size,
        "device": case.device,
        "repeats": repeats,
        "weights": "random",
        "images": "random",
        "lines": measured(case, lines, repeats, profiled=profiled),
        "roofline": roofline(case, lines),
        "provenance": provenance(device),
    }


def ratio(found: dict[str, Any], name: str, other: str) -> float | None:
    """How many times as long a step of the one line takes as of the other; None without that."""
    lines = found["lines"]
    return lines[name]["ms_per_step"] / lines[other]["ms_per_step"] if other in lines else None


def table(found: dict[str, Any]) -> str:
    """One case's figures."""
    lines = [
        f"{found['preset']}, batch {found['batch_size']}, {machine_of(found)}",
        f"{'line':38}{'images/s':>10}{'ms a step':>11}{'gain':>7}{'/floor':>8}"
        f"{'peak':>10}{'first':>8}",
    ]
    for name, line in found["lines"].items():
        slower = ratio(found, "plain", name) if "plain" in found["lines"] else None
        floor, peak = ratio(found, name, Line.named(name, KINDS).floor), line.get("peak_bytes")
        lines.append(
            f"{name:38}{line['images_per_second']:>10.4g}{line['ms_per_step']:>11.4g}"
            f"{'' if slower is None else f'{slower:.2f}':>7}"
            f"{'' if floor is None else f'{floor:.2f}':>8}"
            f"{'' if peak is None else f'{peak / GIB:.2f} GiB':>10}"
            f"{line['first_step_seconds']:>6.1f} s"
        )
    for precision, counted in found["roofline"].items():
        least = counted.get("least_ms")
        if least:
            lines.append(
                f"roofline, {precision}: convolutions {least['convolutions']:.3g} ms, "
                f"all passes {least['all_passes']:.3g} ms"
            )
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog=f"python -m {MODULE}", description="Time a training step.")
    parser.add_argument("--presets", nargs="+", default=DEFAULT_PRESETS, metavar="NAME")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", help="images (default: the preset's)"
    )
    parser.add_argument(
        "--lines",
        nargs="+",
        default=DEFAULT_LINES,
        metavar="LINE",
        help=f"what to compare (default: {' '.join(DEFAULT_LINES)})",
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="see where a step's time goes (default: yes)",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="cost against depth, width, resolution and batch size instead, of small ladders",
    )
    arguments = parser.parse_args(argv)
    for name in arguments.presets:
        if name not in PRESETS:
            raise UserError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
    if min(arguments.repeats, *(arguments.batch_sizes or [1])) < 1:
        raise UserError("--batch-sizes and --repeats must be at least 1")
    arguments.lines = [Line.named(name, KINDS) for name in arguments.lines]
    graphs = [line.name for line in arguments.lines if line.is_graph]
    if graphs and arguments.device == "cpu":
        raise UserError(f"{graphs[0]}: steps are recorded as graphs only on a GPU")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = choose_device(arguments.device)
    if arguments.scaling:
        from benchmarks import scaling

        return scaling.measure(arguments.repeats, device)
    known(RESULT)  # refused now, rather than when all is measured
    for preset, size in product(arguments.presets, arguments.batch_sizes or [None]):
        case = Case(preset, size or RunConfig.of(**PRESETS[preset]).batch_size, str(device))
        found = figures(case, arguments.lines, arguments.repeats, profiled=arguments.profile)
        print(table(found), flush=True)
        cases = merged(RESULT, found)
        write_json(RESULT, {"cases": cases})
        draw_profiles(PICTURE, cases)
    return 0


if __name__ == "__main__":
    run_command(main)
