"""Peak memory of a training step and of an evaluation pass, by preset and batch size.

    python -m benchmarks.memory [--presets cifar10-15 celeba-20] [--batch-size 64] [--device cpu]

Each value is measured in its own process: the largest resident set on the CPU, the process itself
included, and PyTorch's allocations on a GPU. Batches grow up to --batch-size, or until the next
would not fit into memory; then the value at --batch-size is extrapolated by a straight line through
the two largest measured batches, and marked. Prints a table and writes
results/benchmarks/memory.json.
"""

from collections.abc import Sequence
from typing import Any

import pyro
import torch

import datasets
from benchmarks.harness.arguments import add_device, add_presets, benchmark_parser
from benchmarks.harness.lines import svi_on
from benchmarks.harness.memory import GIB, available_memory, peak_bytes
from benchmarks.harness.processes import in_fresh_processes
from benchmarks.harness.records import RESULTS
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.runs.command_line import at_least
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.runs.provenance import provenance
from runtime.device import choose_device, keep_freed_memory
from runtime.errors import run_command
from runtime.files import write_json

RESULT = RESULTS / "memory.json"
PASSES = ("training", "evaluation")


def peak_memory(preset: str, kind: str, batch_size: int, device: torch.device) -> int:
    """Peak bytes of two training steps or one evaluation pass; to be called in a fresh process."""
    keep_freed_memory()  # as in our scripts
    config = RunConfig.of(**PRESETS[preset])
    shape = datasets.image_shape(config.dataset)
    loss_fn: Any = FreeBitsELBO(config.free_bits)(*build_ladder(config.ladder, shape)).to(device)
    x = torch.randint(0, 2, (batch_size, *shape), device=device).float()
    with pyro.validation_enabled(False):
        if kind == "training":
            svi = svi_on(device, loss_fn, torch.optim.Adamax(loss_fn.parameters(), lr=1e-4))
            for _ in range(2):  # the optimizer allocates its state in the first
                svi.step(x)
        else:
            loss_fn.eval()
            loss_fn.elbo.loss(loss_fn.model, loss_fn.guide, x)
    return peak_bytes(device)


def extrapolated(measured: dict[int, int], batch_size: int) -> int:
    """The value on the line through the two largest measured batches."""
    (a, at_a), (b, at_b) = sorted(measured.items())[-2:]
    return round(at_b + (at_b - at_a) * (batch_size - b) / (b - a))


def results(preset: str, kind: str, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Peak bytes by batch size, and at `batch_size`."""
    measured: dict[int, int] = {}
    sizes = [n for n in (2, 4, 16, 64, 256, 1024) if n < batch_size] + [batch_size]
    for size in sizes:
        # A fifth stays free for other processes and the allocator.
        fits = len(measured) < 2 or extrapolated(measured, size) < 0.8 * available_memory(device)
        if not fits:
            break
        (measured[size],) = in_fresh_processes(1, peak_memory, preset, kind, size, device)
    known = batch_size in measured
    return {
        "peak_bytes": {str(size): peak for size, peak in measured.items()},
        "batch_size": batch_size,
        "at_batch_size": measured[batch_size] if known else extrapolated(measured, batch_size),
        "extrapolated": not known,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'preset':20}{'pass':12}{'batch':>6}{'peak':>12}"]
    for preset, passes in result["figures"].items():
        for kind, found in passes.items():
            note = "  (extrapolated)" if found["extrapolated"] else ""
            peak = f"{found['at_batch_size'] / GIB:.1f} GiB"
            lines.append(f"{preset:20}{kind:12}{found['batch_size']:>6}{peak:>12}{note}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("memory", "Measure peak memory.")
    add_presets(parser, ["cifar10-15", "celeba-20"])
    parser.add_argument(
        "--batch-size", type=at_least(8), default=64, metavar="N", help="images (default: 64)"
    )
    add_device(parser)
    arguments = parser.parse_args(argv)
    device = choose_device(arguments.device)
    found = {
        name: {kind: results(name, kind, arguments.batch_size, device) for kind in PASSES}
        for name in arguments.presets
    }
    result = {"figures": found, "provenance": provenance(device)}
    print(table(result))
    write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    run_command(main)
