"""How fast the importance-weighted bound is, beside running the whole network for every sample.

    python -m benchmarks.evaluation [--presets digits mnist-3] [--batch-sizes 16 32 64 128 256]

The bottom-up pass depends on the image alone: the sampler runs it once for a group of images, the
straightforward way once for every image and sample. Both draw the same noise in the same blocks;
that they give the same bounds is checked first. Weights and images are random, which changes no
time. The ways take turns, so that whatever else the machine does slows all alike. Figures are
medians over --repeats, of one group of images, per image and sample. Peak memory is that of a
process that does nothing else: on the CPU the highest resident set, the process itself included,
on a GPU what PyTorch allocated. Prints a table and writes results/benchmarks/evaluation.json.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

import datasets
from allocator import keep_freed_memory
from benchmarks.memory import GIB, in_own_process, peak_bytes
from checkpoint import write_json
from config import PRESETS, Config
from datasets import ImageSet
from datasets.images import ColourImages, PackedImages, Shape
from devices import choose_device
from draws import torch_seed
from elbo import FreeBitsELBO
from errors import UserError, run_command
from guide import build_ladder
from importance import Blocks, ImportanceSampler
from memory import automatic_batch_size
from provenance import provenance

MODULE = "benchmarks.evaluation"
AUTOMATIC = "automatic"  # in the place of a batch size
RESULT = Path(__file__).parent.parent / "results" / "benchmarks" / "evaluation.json"
DEFAULT_PRESETS = ("digits", "mnist-3", "mnist-12", "cifar10-15")


def random_images(config: Config, shape: Shape, count: int) -> ImageSet:
    """Noise in the place of a data set's images."""
    random = np.random.default_rng(0)
    if datasets.is_binary(config.dataset):
        bits = random.integers(0, 2, (count, *shape), np.uint8)
        return PackedImages.pack(config.dataset, "test", bits)
    channels, height, width = shape
    levels = random.integers(0, 256, (count, height, width, channels), np.uint8)
    return ColourImages(config.dataset, "test", shape, torch.from_numpy(levels))


def prepare(
    preset: str, batch_size: int | None, samples: int, device: torch.device
) -> tuple[ImportanceSampler, int]:
    """A sampler of one group of images, and the batch size: the automatic one for None."""
    config = Config(**PRESETS[preset])
    shape = datasets.image_shape(config.dataset)
    torch.manual_seed(0)
    model, guide = build_ladder(config, shape)
    model.to(device).eval()
    guide.to(device).eval()
    if batch_size is None:
        batch_size = automatic_batch_size(config, guide, torch.zeros(1, *shape, device=device))
    count = Blocks.of(batch_size, samples).images
    images = random_images(config, shape, count).to(device)
    index = torch.arange(count)
    sampler = ImportanceSampler(
        model, guide, images, index, [samples], batch_size=batch_size, seed=0
    )
    return sampler, batch_size


def ours(sampler: ImportanceSampler) -> Tensor:
    """(N,), the bounds of the group."""
    return sampler.group(0).importance_weighted[sampler.samples[-1]]


@torch.no_grad()
def straightforward(sampler: ImportanceSampler) -> Tensor:
    """(N,), with the whole network for every image and sample."""
    elbo, x = FreeBitsELBO(), sampler.images.batch(sampler.index.to(sampler.images.index_device))
    log_w = []
    for chunk, k in enumerate(sampler.blocks.chunks(sampler.samples[-1])):
        torch.manual_seed(torch_seed(sampler.seed, 0, 0, chunk))  # the sampler's own noise
        terms = elbo.compute_terms(sampler.model, sampler.guide, x.repeat_interleave(k, 0))
        log_w.append(terms.elbo.view(len(x), k).cpu().double())
    return torch.cat(log_w, 1).logsumexp(1) - math.log(sampler.samples[-1])


@torch.no_grad()
def bottom_up(sampler: ImportanceSampler) -> None:
    """The part of `straightforward` that our sampler does once."""
    x = sampler.images.batch(sampler.index.to(sampler.images.index_device))
    for k in sampler.blocks.chunks(sampler.samples[-1]):
        sampler.guide.bottom_up(x.repeat_interleave(k, 0))


WAYS: dict[str, Callable[[ImportanceSampler], object]] = {
    "ours": ours,
    "straightforward": straightforward,
    "bottom_up": bottom_up,
}


def seconds(way: Callable[[ImportanceSampler], object], sampler: ImportanceSampler) -> float:
    """Of one run, with all that it starts on the device finished."""
    start = time.perf_counter()
    way(sampler)
    if sampler.images.device.type == "cuda":
        torch.cuda.synchronize(sampler.images.device)
    return time.perf_counter() - start


def medians(sampler: ImportanceSampler, repeats: int) -> dict[str, float]:
    """Milliseconds per image and sample, by way."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(repeats + 1):
        for name, way in WAYS.items():
            elapsed = seconds(way, sampler)
            if repeat > 0:  # the first one warms up
                times[name].append(elapsed)
    pairs = len(sampler.index) * sampler.samples[-1]
    return {name: 1000 * statistics.median(taken) / pairs for name, taken in times.items()}


def times(
    preset: str, batch_size: int | None, samples: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Of one batch size, once the bounds are known to be the same."""
    sampler, size = prepare(preset, batch_size, samples, device)
    torch.testing.assert_close(ours(sampler), straightforward(sampler), rtol=1e-5, atol=1e-3)
    milliseconds = medians(sampler, repeats)
    return {
        "batch_size": size,
        "automatic": batch_size is None,
        "blocks": {"images": sampler.blocks.images, "samples": sampler.blocks.samples},
        "median_ms_per_image_and_sample": milliseconds,
        "bottom_up_share": milliseconds["bottom_up"] / milliseconds["straightforward"],
    }


def peaks(
    preset: str, batch_size: int | None, samples: int, device: torch.device
) -> dict[str, int]:
    """Bytes, by way."""
    return {
        way: in_own_process(MODULE, device, preset, way, batch_size or AUTOMATIC, samples)
        for way in ("ours", "straightforward")
    }


def figures(arguments: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Times and memory by preset, for each batch size."""
    cases = [
        (preset, size) for preset in arguments.presets for size in arguments.batch_sizes or [None]
    ]
    # Memory first: a new process begins with the peak of the one that starts it.
    memory = [peaks(*case, arguments.samples, device) for case in cases]
    found: dict[str, list[dict[str, Any]]] = {preset: [] for preset in arguments.presets}
    for (preset, size), peak in zip(cases, memory, strict=True):
        taken = times(preset, size, arguments.samples, arguments.repeats, device)
        found[preset].append(taken | {"peak_bytes": peak})
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'preset':14}{'batch':>7}{'ours':>12}{'plain':>12}{'ratio':>7}"
        f"{'bottom-up':>11}{'peak, ours':>12}{'plain':>10}"
    ]
    for preset, sizes in result["figures"].items():
        for found in sizes:
            ms, peak = found["median_ms_per_image_and_sample"], found["peak_bytes"]
            lines.append(
                f"{preset:14}{found['batch_size']:>6}{'*' if found['automatic'] else ' '}"
                f"{ms['ours']:9.3f} ms{ms['straightforward']:9.3f} ms"
                f"{ms['straightforward'] / ms['ours']:7.2f}{found['bottom_up_share']:11.0%}"
                f"{peak['ours'] / GIB:8.2f} GiB{peak['straightforward'] / GIB:6.2f} GiB"
            )
    return "\n".join([*lines, "* chosen by memory.py; times are per image and sample"])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description="Time the importance-weighted bound."
    )
    parser.add_argument("--presets", nargs="+", default=DEFAULT_PRESETS, metavar="NAME")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="images times samples per pass (default: the automatic size)",
    )
    parser.add_argument("--samples", type=int, default=64, help="of each image (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--one", nargs=4, metavar=("PRESET", "WAY", "N", "K"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(argv)
    for name in arguments.presets:
        if name not in PRESETS:
            raise UserError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
    if min(arguments.samples, arguments.repeats, *(arguments.batch_sizes or [1])) < 1:
        raise UserError("--batch-sizes, --samples and --repeats must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = choose_device(arguments.device)
    keep_freed_memory()  # as the scripts do
    with pyro.validation_enabled(False):
        if arguments.one:
            preset, way, size, samples = arguments.one
            batch_size = None if size == AUTOMATIC else int(size)
            WAYS[way](prepare(preset, batch_size, int(samples), device)[0])
            print(peak_bytes(device))
            return 0
        found = figures(arguments, device)
    result = {
        "samples": arguments.samples,
        "repeats": arguments.repeats,
        "weights": "random",
        "images": "random",
        "figures": found,
        "provenance": provenance(device),
    }
    print(table(result))
    write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    run_command(main)
