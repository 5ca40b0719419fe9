"""Peak memory of a training step and of an evaluation pass, by preset and batch size.

    python -m benchmarks.memory [--presets cifar10-15 celeba-20] [--device cpu]

Each figure is taken in a process of its own: on the CPU the highest resident set, the process
itself included, on a GPU what PyTorch allocated. Batches grow until --batch-size, or until the
next would not fit into the memory; what was not measured is extrapolated from a straight line
through the two largest measured ones, and marked so. Prints a table and writes
results/benchmarks/memory.json.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch

import datasets
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.runs.provenance import provenance
from ladder_vae.training.svi import SVI
from runtime.device import choose_device, keep_freed_memory
from runtime.errors import UserError, run_command
from runtime.files import write_json

RESULT = Path(__file__).parent.parent / "results" / "benchmarks" / "memory.json"
MODULE = "benchmarks.memory"
GIB = 2**30
PASSES = ("training", "evaluation")


def peak_memory(preset: str, kind: str, batch_size: int, device: torch.device) -> int:
    """Bytes at the peak of two training steps, or one evaluation pass; in a fresh process."""
    config = RunConfig.of(**PRESETS[preset])
    shape = datasets.image_shape(config.dataset)
    loss_fn: Any = FreeBitsELBO(config.free_bits)(*build_ladder(config.ladder, shape)).to(device)
    x = torch.randint(0, 2, (batch_size, *shape), device=device).float()
    with pyro.validation_enabled(False):
        if kind == "training":
            svi = SVI(loss_fn, torch.optim.Adamax(loss_fn.parameters(), lr=1e-4))
            for _ in range(2):  # the optimiser's state is there from the second on
                svi.step(x)
        else:
            loss_fn.eval()
            loss_fn.elbo.loss(loss_fn.model, loss_fn.guide, x)
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held at once, of the device's memory or of the main one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory(device: torch.device) -> int:
    """Bytes that a process may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_own_process(module: str, device: torch.device, *one: object) -> int:
    """What a benchmark's hidden option --one prints, in a fresh process."""
    command = [sys.executable, "-m", module, "--device", str(device), "--one", *map(str, one)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return int(result.stdout)


def extrapolated(measured: dict[int, int], batch_size: int) -> int:
    """On the line through the two largest measured batches."""
    (a, at_a), (b, at_b) = sorted(measured.items())[-2:]
    return round(at_b + (at_b - at_a) * (batch_size - b) / (b - a))


def figures(preset: str, kind: str, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Peak bytes by batch size, and at `batch_size`."""
    measured: dict[int, int] = {}
    sizes = [n for n in (2, 4, 16, 64, 256, 1024) if n < batch_size] + [batch_size]
    for size in sizes:
        # Another process's needs, and the allocator's, come on top: a fifth is left free.
        fits = len(measured) < 2 or extrapolated(measured, size) < 0.8 * available_memory(device)
        if not fits:
            break
        measured[size] = in_own_process(MODULE, device, preset, kind, size)
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Measure peak memory."
    )
    parser.add_argument("--presets", nargs="+", default=["cifar10-15", "celeba-20"], metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--one", nargs=3, metavar=("PRESET", "PASS", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = choose_device(arguments.device)
    keep_freed_memory()  # as the scripts do
    if arguments.one:
        preset, kind, size = arguments.one
        print(peak_memory(preset, kind, int(size), device))
        return 0
    for name in arguments.presets:
        if name not in PRESETS:
            raise UserError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
    if arguments.batch_size < 8:
        raise UserError(f"--batch-size is {arguments.batch_size}; it must be at least 8")
    found = {
        name: {kind: figures(name, kind, arguments.batch_size, device) for kind in PASSES}
        for name in arguments.presets
    }
    result = {"figures": found, "provenance": provenance(device)}
    print(table(result))
    write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    run_command(main)
