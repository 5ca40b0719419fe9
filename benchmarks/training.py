"""Time and memory of a training step: ours, in plain PyTorch, and its convolutions alone.

    python -m benchmarks.training [--presets digits mnist-3] [--batch-sizes 64] [--lines ...]

A line is a way to run the same step, KIND/OPTIONS:

    ours/bf16+channels_last     the step of svi.py; options are a precision (float32, tf32, bf16),
                                then optionally +channels_last, +compile and, on a GPU, +graph for
                                a step recorded as a CUDA graph
    plain/bf16+channels_last    a loop over the same networks without Pyro (harness/plain.py)
    plain                       that loop with all of PyTorch's defaults: eager, float32, and with
                                the C library's default allocator settings
    convolutions/float32        the step's convolutions alone, forward and backward: the lower limit

Each line runs in its own process, and the lines take turns. Results are medians over --repeats
turns after a warm-up. Weights and images are random, which does not affect the times. Peak memory
is the largest resident set of the line's process on the CPU, and PyTorch's allocations on a GPU.
Then one step of each line is profiled by kind of operation; on a GPU its operations and bytes are
counted for the roofline.

Prints a table, writes results/benchmarks/training.json, where results replace earlier ones of the
same preset, batch size and machine, and draws training_profile.png beside it.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.harness.arguments import (
    add_device,
    add_presets,
    add_repeats,
    benchmark_parser,
)
from benchmarks.harness.charts import draw_profiles
from benchmarks.harness.lines import TRAINING, Case, Line, TimedSteps
from benchmarks.harness.memory import GIB
from benchmarks.harness.processes import Process, median_seconds, processes
from benchmarks.harness.records import RESULTS, known_cases, machine_of, merged
from benchmarks.harness.roofline import PEAKS, least_milliseconds, totals
from evaluate import at_least
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.runs.provenance import provenance
from runtime.device import choose_device
from runtime.errors import UserError, run_command
from runtime.files import write_json

RESULT = RESULTS / "training.json"
PICTURE = RESULT.with_name("training_profile.png")
KINDS = tuple(TRAINING)
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
    """The results of each line, by name."""
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
            if line.kind != "convolutions":  # its process has run the whole step once
                found[line.name]["peak_bytes"] = process.ask("peak")
                if profiled and not line.is_graph:  # a graph shows no operations
                    found[line.name]["profile_ms"] = process.ask("by_kind")
    return found


def roofline(case: Case, lines: Sequence[Line]) -> dict[str, Any]:
    """By precision, a step's operations and bytes, and the least time that a GPU can take for them.

    Empty on a CPU; without the least time for a GPU whose peak rates are not known.
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


def results(
    case: Case, lines: Sequence[Line], repeats: int, *, profiled: bool = True
) -> dict[str, Any]:
    """All results of a case."""
    return {
        "preset": case.preset,
        "batch_size": case.batch_size,
        "device": case.device,
        "repeats": repeats,
        "weights": "random",
        "images": "random",
        "lines": measured(case, lines, repeats, profiled=profiled),
        "roofline": roofline(case, lines),
        "provenance": provenance(torch.device(case.device)),
    }


def ratio(found: dict[str, Any], name: str, other: str) -> float | None:
    """The time of line `name` divided by that of `other`; None if `other` was not measured."""
    lines = found["lines"]
    return lines[name]["ms_per_step"] / lines[other]["ms_per_step"] if other in lines else None


def table(found: dict[str, Any]) -> str:
    """The results of one case, formatted."""
    lines = [
        f"{found['preset']}, batch {found['batch_size']}, {machine_of(found)}",
        f"{'line':38}{'images/s':>10}{'ms/step':>11}{'gain':>7}{'/floor':>8}"
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
    parser = benchmark_parser("training", "Time a training step.")
    add_presets(parser, ["digits", "mnist-3"])
    parser.add_argument(
        "--batch-sizes",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="images per step (default: the preset's)",
    )
    parser.add_argument(
        "--lines",
        nargs="+",
        default=DEFAULT_LINES,
        metavar="LINE",
        help=f"what to compare (default: {' '.join(DEFAULT_LINES)})",
    )
    add_repeats(parser, 5)
    add_device(parser)
    parser.add_argument(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="profile a step by kind of operation (default: yes)",
    )
    arguments = parser.parse_args(argv)
    arguments.lines = [Line.named(name, KINDS) for name in arguments.lines]
    graphs = [line.name for line in arguments.lines if line.is_graph]
    if graphs and arguments.device == "cpu":
        raise UserError(f"{graphs[0]}: CUDA graphs need a GPU; give --device cuda")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = choose_device(arguments.device)
    known_cases(RESULT)  # fails now rather than after the measurement
    for preset, size in product(arguments.presets, arguments.batch_sizes or [None]):
        case = Case(preset, size or RunConfig.of(**PRESETS[preset]).batch_size, str(device))
        found = results(case, arguments.lines, arguments.repeats, profiled=arguments.profile)
        print(table(found), flush=True)
        cases = merged(RESULT, found)
        write_json(RESULT, {"cases": cases})
        draw_profiles(PICTURE, cases)
    return 0


if __name__ == "__main__":
    run_command(main)
