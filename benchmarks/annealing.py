"""Annealed importance sampling against importance sampling, in equal time.

    python -m benchmarks.annealing RUN [--samples 1000 5000] [--limit 500] [--data-dir data]

RUN is a run folder or published weights. For each number K of importance samples, the number of
temperatures is chosen so that the annealed bound takes about as long. Then the methods take turns
with the same random test images, a group at a time, so that other load affects all alike. Prints a
table and writes results/benchmarks/annealing.json.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.arguments import add_data_dir, benchmark_parser
from benchmarks.harness.records import RESULTS
from evaluate import EvaluatedLadder
from ladder_vae.evaluation.annealed import AnnealedSampler, Annealing
from ladder_vae.evaluation.annealing import pilot_temperatures
from ladder_vae.evaluation.groups import Sampler
from ladder_vae.evaluation.importance import ImportanceSampler
from ladder_vae.evaluation.metrics import standard_error
from ladder_vae.evaluation.options import choose_images
from ladder_vae.runs.command_line import at_least
from runtime.errors import run_command
from runtime.files import path_argument, write_json

RESULT = RESULTS / "annealing.json"
# Of the annealed bound that is timed first, to choose the number of temperatures.
TRIAL = 20


class Method:
    """A sampler that scores its images a few at a time, and the seconds that it takes."""

    def __init__(self, sampler: Sampler[Any]) -> None:
        self.sampler = sampler
        self.tables: list[Tensor] = []
        self.images = 0
        self.seconds = 0.0

    def advance(self, images: int) -> None:
        """Score groups until at least `images` images are scored."""
        while self.images < images:
            number = len(self.tables)
            began = time.monotonic()
            self.tables.append(self.sampler.group(number).table())
            self.seconds += time.monotonic() - began
            self.images += self.sampler.size(number)

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.images

    def bound(self) -> Tensor:
        """The bound (N,) of each image, in ascending order of `sampler.index`."""
        return torch.cat([self.sampler.bound(table) for table in self.tables])


class Comparison:
    """Makes the methods that score the same images by one ladder."""

    def __init__(self, ladder: EvaluatedLadder, data_dir: Path, limit: int, chains: int) -> None:
        self.ladder = ladder
        self.images = ladder.images("test", data_dir)
        self.index = choose_images(self.images, limit, 0)
        self.chains = chains

    def importance(self, samples: int) -> Method:
        """The bound with `samples` importance samples."""
        ladder = self.ladder
        return Method(
            ImportanceSampler(
                ladder.model,
                ladder.guide,
                self.images,
                self.index,
                [1, samples],
                batch_size=ladder.batch_size,
                seed=0,
                execution=ladder.execution,
            )
        )

    def annealed(self, temperatures: int) -> Method:
        """The annealed bound."""
        ladder = self.ladder
        return Method(
            AnnealedSampler(
                ladder.guide,
                self.images,
                self.index,
                Annealing(temperatures, self.chains),
                batch_size=ladder.annealing_batch_size,
                seed=0,
                execution=ladder.execution,
            )
        )

    def equal_temperatures(self, samples: int) -> int:
        """The number of temperatures that takes as long as `samples` importance samples."""
        importance, annealed = self.importance(samples), self.annealed(TRIAL)
        for method in (annealed, importance):
            method.advance(1)
        seconds = annealed.seconds_per_image / _transitions(TRIAL)
        return largest(lambda t: seconds * _transitions(t) <= importance.seconds_per_image)

    def rows(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """One row for each number of importance samples."""
        temperatures = [self.equal_temperatures(k) for k in samples]
        pairs = [
            (self.importance(k), self.annealed(t))
            for k, t in zip(samples, temperatures, strict=True)
        ]
        turn = pairs[0][1].sampler.size(0)
        for images in range(turn, len(self.index) + turn, turn):
            for method in (method for pair in pairs for method in pair):
                method.advance(min(images, len(self.index)))
        return [
            {"samples": k, "temperatures": t} | _row(*pair)
            for k, t, pair in zip(samples, temperatures, pairs, strict=True)
        ]


def _transitions(temperatures: int) -> int:
    return temperatures + pilot_temperatures(temperatures)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number of temperatures that fits, at least 2."""
    found = 2
    while fits(found + 1):
        found += 1
    return found


def _row(importance: Method, annealed: Method) -> dict[str, Any]:
    gain = annealed.bound() - importance.bound()
    return {
        "importance_weighted": importance.bound().mean().item(),
        "annealed": annealed.bound().mean().item(),
        "gain": gain.mean().item(),
        "standard_error": standard_error(gain),
        "share_gained": (gain > 0).double().mean().item(),
        "importance_seconds_per_image": importance.seconds_per_image,
        "annealed_seconds_per_image": annealed.seconds_per_image,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, formatted."""
    header = f"{'samples':>8}{'bound':>10}{'s/image':>9}{'T':>6}{'bound':>10}{'s/image':>9}  gain"
    lines = (
        f"{row['samples']:>8,}{row['importance_weighted']:>10.3f}"
        f"{row['importance_seconds_per_image']:>9.3g}{row['temperatures']:>6}"
        f"{row['annealed']:>10.3f}{row['annealed_seconds_per_image']:>9.3g}"
        f"  {row['gain']:.3f} ± {row['standard_error']:.3f}"
        for row in rows
    )
    return "\n".join([header, *lines])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser("annealing", "Compare annealed and importance-weighted bounds.")
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder, or weights")
    parser.add_argument(
        "--samples",
        type=at_least(2),
        nargs="+",
        default=[1000, 5000],
        metavar="K",
        help="numbers of importance samples (default: 1000 5000)",
    )
    parser.add_argument(
        "--limit", type=at_least(2), default=500, help="number of test images (default: 500)"
    )
    parser.add_argument(
        "--chains", type=at_least(1), default=4, help="chains for each image (default: 4)"
    )
    add_data_dir(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    ladder = EvaluatedLadder.load(arguments.run, device=torch.device("cpu"))
    comparison = Comparison(ladder, arguments.data_dir, arguments.limit, arguments.chains)
    rows = comparison.rows(arguments.samples)
    print(table(rows))
    content = {
        "dataset": comparison.images.name,
        "images": len(comparison.index),
        "chains": arguments.chains,
        "rows": rows,
        **ladder.origin(),
    }
    write_json(RESULT, content)
    return 0


if __name__ == "__main__":
    run_command(main)
