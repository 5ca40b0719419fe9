"""Time and memory of importance-weighted bounds: our sampler, and the whole network per sample.

    python -m benchmarks.evaluation [--presets digits mnist-3] [--batch-sizes 16 64] [--lines ...]

The bottom-up pass depends on the image alone: our sampler runs it once for a group of images, the
straightforward way once for every image and sample. A line is a way to compute the same bounds,
KIND/OPTIONS:

    ours/bf16+channels_last     the sampler of importance.py; options are a precision (float32,
                                tf32, bf16), then optionally +channels_last and +compile
    whole/bf16+channels_last    the whole network for every image and sample (harness/plain.py)
    plain                       `whole` with all of PyTorch's defaults: eager, float32, and with the
                                C library's default allocator settings
    bottom_up/float32           the part of `whole` that our sampler runs only once

All lines draw the same noise in the same blocks, and the largest difference between their bounds is
reported. Each line runs in its own process, and the lines take turns. Results are medians over
--repeats turns with one group of images, per image and sample. Weights and images are random, which
does not affect the times. Peak memory is the largest resident set of the line's process on the CPU,
and PyTorch's allocations on a GPU.

Prints a table and writes results/benchmarks/evaluation.json, where results replace earlier ones of
the same preset, batch size and machine.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

import datasets
from benchmarks.harness import plain
from benchmarks.harness.arguments import (
    add_device,
    add_presets,
    add_repeats,
    benchmark_parser,
)
from benchmarks.harness.lines import Case, Line
from benchmarks.harness.memory import GIB
from benchmarks.harness.processes import Timed, median_seconds, processes
from benchmarks.harness.records import RESULTS, known_cases, machine_of, merged
from datasets import ImageSet
from datasets.images import ColourImages, PackedImages, Shape
from evaluate import at_least
from guide import LadderGuide, build_ladder
from ladder_vae.evaluation.batch_size import automatic_batch_size
from ladder_vae.evaluation.importance import Blocks, ImportanceSampler
from ladder_vae.networks.precision import Execution
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.runs.provenance import provenance
from model import LadderModel
from runtime.device import choose_device
from runtime.errors import run_command
from runtime.files import write_json
from runtime.random import torch_seed

RESULT = RESULTS / "evaluation.json"
KINDS = ("ours", "whole", "plain", "bottom_up")
DEFAULT_LINES = (
    "plain",
    "whole/float32+channels_last",
    "ours/float32+channels_last",
    "ours/float32+channels_last+compile",
    "whole/bf16+channels_last",
    "ours/bf16+channels_last",
    "bottom_up/float32+channels_last",
)


def random_images(config: RunConfig, shape: Shape, count: int) -> ImageSet:
    """Random images in place of a data set's."""
    random = np.random.default_rng(0)
    if datasets.is_binary(config.dataset):
        bits = random.integers(0, 2, (count, *shape), np.uint8)
        return PackedImages.pack(config.dataset, "test", bits)
    channels, height, width = shape
    levels = random.integers(0, 256, (count, height, width, channels), np.uint8)
    return ColourImages(config.dataset, "test", shape, torch.from_numpy(levels))


def sampler_of(
    case: Case, samples: int, execution: Execution
) -> tuple[LadderModel, LadderGuide, ImportanceSampler]:
    """A pair and its sampler for one group of images."""
    device = torch.device(case.device)
    torch.manual_seed(0)
    model, guide = build_ladder(case.config.ladder, case.image_shape)
    for module in (model, guide):
        execution.prepare(module.to(device).eval())
    count = Blocks.of(case.batch_size, samples).images
    images = random_images(case.config, case.image_shape, count).to(device)
    sampler = ImportanceSampler(
        model,
        guide,
        images,
        torch.arange(count),
        [samples],
        batch_size=case.batch_size,
        seed=0,
        execution=execution,
    )
    return model, guide, sampler


class Way(Timed):
    """One way to compute the bounds of a group of images."""

    def __init__(self, case: Case, line: Line, samples: int) -> None:
        super().__init__(torch.device(case.device), keeps_memory=line.keeps_memory)
        self._model, self._guide, self._sampler = sampler_of(case, samples, line.execution)
        self._execution = line.execution
        ways: dict[str, Callable[[], object]] = {
            "ours": self.ours,
            "whole": self.whole,
            "plain": self.whole,
            "bottom_up": self.bottom_up,
        }
        self.run = ways[line.kind]

    def ours(self) -> Tensor:
        """The bounds (N,) of the group by our sampler."""
        return self._sampler.group(0).importance_weighted[self._sampler.samples[-1]]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The bounds (N,) by the whole network for every image and sample."""
        sampler, x = self._sampler, self._images()
        log_w = []
        for chunk, k in enumerate(sampler.blocks.chunks(sampler.samples[-1])):
            torch.manual_seed(torch_seed(sampler.seed, 0, 0, chunk))  # the sampler's own noise
            with self._execution.autocast(self.device):
                log_likelihood, kl = plain.ladder_terms(
                    self._model, self._guide, x.repeat_interleave(k, 0)
                )
            log_w.append((log_likelihood - kl.sum(1)).view(len(x), k).cpu().double())
        return torch.cat(log_w, 1).logsumexp(1) - math.log(sampler.samples[-1])

    @torch.no_grad()
    def bottom_up(self) -> None:
        """The part of `whole` that our sampler runs only once."""
        x = self._images()
        for k in self._sampler.blocks.chunks(self._sampler.samples[-1]):
            with self._execution.autocast(self.device):
                self._guide.bottom_up(x.repeat_interleave(k, 0))

    def bounds(self) -> list[float]:
        """The bound of each image in nats; empty for `bottom_up`."""
        found = self.run()
        return found.tolist() if isinstance(found, Tensor) else []

    def _images(self) -> Tensor:
        index = self._sampler.index.to(self._sampler.images.index_device)
        return self._sampler.images.batch(index)


def measured(
    case: Case, lines: Sequence[Line], samples: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """The results of each line, by name; bounds are compared with those of the first line."""
    pairs = Blocks.of(case.batch_size, samples).images * samples
    makers = {line.name: partial(Way, case, line, samples) for line in lines}
    with processes(makers, torch.device(case.device)) as started:
        taken = median_seconds(started, repeats)
        found: dict[str, dict[str, Any]] = {}
        reference: list[float] = []
        for process in started:
            name, bounds = process.name, process.ask("bounds")
            reference = reference or bounds
            found[name] = {
                "ms_per_image_and_sample": 1000 * taken[name] / pairs,
                "image_samples_per_second": pairs / taken[name],
                "first_run_seconds": process.ask("first"),
                "peak_bytes": process.ask("peak"),
            }
            if bounds:
                apart = [abs(a - b) for a, b in zip(bounds, reference, strict=True)]
                found[name]["largest_difference_nats"] = max(apart)
    return found


def results(case: Case, lines: Sequence[Line], samples: int, repeats: int) -> dict[str, Any]:
    """All results of a case."""
    blocks = Blocks.of(case.batch_size, samples)
    return {
        "preset": case.preset,
        "batch_size": case.batch_size,
        "device": case.device,
        "blocks": {"images": blocks.images, "samples": blocks.samples},
        "samples": samples,
        "repeats": repeats,
        "weights": "random",
        "images": "random",
        "lines": measured(case, lines, samples, repeats),
        "provenance": provenance(torch.device(case.device)),
    }


def table(found: dict[str, Any]) -> str:
    """The results of one case, formatted."""
    lines = [
        f"{found['preset']}, batch {found['batch_size']}, {machine_of(found)}; "
        "ms per image and sample",
        f"{'line':38}{'per second':>11}{'ms':>9}{'gain':>7}{'nats apart':>12}"
        f"{'peak':>10}{'first':>8}",
    ]
    plainly = found["lines"].get("plain")
    for name, line in found["lines"].items():
        ms, apart = line["ms_per_image_and_sample"], line.get("largest_difference_nats")
        gain = "" if plainly is None else f"{plainly['ms_per_image_and_sample'] / ms:.2f}"
        lines.append(
            f"{name:38}{line['image_samples_per_second']:>11.4g}{ms:>9.3g}{gain:>7}"
            f"{'' if apart is None else f'{apart:.2g}':>12}"
            f"{line['peak_bytes'] / GIB:>6.2f} GiB{line['first_run_seconds']:>6.1f} s"
        )
    return "\n".join(lines)


def automatic_size(preset: str, device: torch.device) -> int:
    """The batch size that evaluate.py chooses."""
    config = RunConfig.of(**PRESETS[preset])
    shape = datasets.image_shape(config.dataset)
    _, guide = build_ladder(config.ladder, shape)
    x = torch.zeros(1, *shape, device=device)
    return automatic_batch_size(config.ladder, guide.to(device).eval(), x)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser("evaluation", "Time the importance-weighted bound.")
    add_presets(parser, ["digits", "mnist-3", "mnist-12"])
    parser.add_argument(
        "--batch-sizes",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="images times samples per pass (default: as evaluate.py chooses)",
    )
    parser.add_argument(
        "--lines",
        nargs="+",
        default=DEFAULT_LINES,
        metavar="LINE",
        help=f"what to compare (default: {' '.join(DEFAULT_LINES)})",
    )
    parser.add_argument(
        "--samples", type=at_least(1), default=64, help="samples per image (default: 64)"
    )
    add_repeats(parser, 5)
    add_device(parser)
    arguments = parser.parse_args(argv)
    arguments.lines = [Line.named(name, KINDS) for name in arguments.lines]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = choose_device(arguments.device)
    known_cases(RESULT)  # fails now rather than after the measurement
    for preset, size in product(arguments.presets, arguments.batch_sizes or [None]):
        case = Case(preset, size or automatic_size(preset, device), str(device))
        found = results(case, arguments.lines, arguments.samples, arguments.repeats)
        print(table(found), flush=True)
        write_json(RESULT, {"cases": merged(RESULT, found)})
    return 0


if __name__ == "__main__":
    run_command(main)
