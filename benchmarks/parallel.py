"""Training by two processes on one machine, and estimates for more.

    python -m benchmarks.parallel [--presets digits mnist-3] [--repeats 3] [--steps 3]

Throughput: training steps at the same global batch by one process with two threads, and by two
processes with one thread each, joined by gloo. They take turns, each time in fresh processes, and
results are medians over all steps. Weights and images are random, which does not affect the times.

Estimates: the bytes of gradients that the processes average at each step, and the multiply-adds per
image of the forward and backward pass, counted by PyTorch. Batch normalisation: the difference in
gradient and loss when each process normalises by its own part of the batch instead of the whole
batch, with the same noise. Prints tables and writes results/benchmarks/parallel.json.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pyro
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import datasets
from benchmarks.harness.arguments import add_presets, add_repeats, benchmark_parser
from benchmarks.harness.processes import in_fresh_processes
from benchmarks.harness.records import RESULTS
from elbo import FreeBitsELBO
from evaluate import at_least
from guide import build_ladder
from ladder_vae.networks.initialization import data_dependent_init
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.runs.provenance import provenance
from ladder_vae.training.data_parallel import Replicas
from ladder_vae.training.signals import Clock
from ladder_vae.training.svi import SVI
from runtime.device import keep_freed_memory
from runtime.distributed import Ranks, joined_ranks
from runtime.errors import run_command
from runtime.files import write_json

RESULT = RESULTS / "parallel.json"
CPU = torch.device("cpu")
THREADS = 2  # of all processes together
PARTS = (2, 4, 8)  # into which a batch is divided for batch normalisation
# Assumptions of the tables, not measured: bytes per second that a process sends and receives
# simultaneously in an all-reduce, and a GPU's multiply-adds per second on these networks, whose
# convolutions have few channels.
ASSUMED_RATES = {"NVLink": 300e9, "100 Gbit/s": 12.5e9, "10 Gbit/s": 1.25e9}
ASSUMED_MULTIPLY_ADDS = 20e12


def ladder(config: RunConfig, shape: Sequence[int]) -> Any:
    """The ELBO module of a preset, in training mode."""
    torch.manual_seed(0)
    size = (shape[0], shape[1], shape[2])
    return FreeBitsELBO(config.free_bits)(*build_ladder(config.ladder, size)).train()


def random_images(config: RunConfig, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, *datasets.image_shape(config.dataset), generator=generator)
    return x.round() if datasets.is_binary(config.dataset) else x


def _step_seconds(ranks: Ranks, preset: str, steps: int) -> list[float]:
    """Seconds of each of `steps` steps after a first one."""
    config = RunConfig.of(**PRESETS[preset])
    x = random_images(config, config.batch_size).chunk(ranks.size)[ranks.rank]
    loss_fn = ladder(config, x.shape[1:])
    parameters = [p for p in loss_fn.parameters() if p.requires_grad]
    svi = SVI(loss_fn, torch.optim.Adamax(parameters, lr=1e-4), spike=100.0)
    clock = Clock(ranks)
    if ranks.size > 1:
        replicas = Replicas(loss_fn, ranks, CPU)
        replicas.warm_up(x)
        replicas.attach(svi)
    taken = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        svi.step(x)
        if ranks.size > 1:
            clock.agree(0)
        taken.append(time.perf_counter() - start)
    return taken[1:]


def step_seconds(preset: str, steps: int, threads: int) -> list[float]:
    """Seconds of each step, as one of the processes that share each batch."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as in our scripts
    with joined_ranks() as ranks, pyro.validation_enabled(False):
        return _step_seconds(ranks, preset, steps)


def throughput(preset: str, steps: int, repeats: int) -> dict[str, Any]:
    """Images per second of one process and of two, which take turns."""
    taken: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for count in taken:
            found = in_fresh_processes(count, step_seconds, preset, steps, THREADS // count)
            taken[count] += found[0]
            shown = " ".join(f"{t:.3f}" for t in found[0])
            print(f"{preset}, {count} processes: {shown} s per step", flush=True)
    batch = RunConfig.of(**PRESETS[preset]).batch_size
    rates = {str(n): batch / statistics.median(times) for n, times in taken.items()}
    return {"batch_size": batch, "images_per_second": rates}


def counted(preset: str) -> dict[str, int]:
    """Bytes of gradients per step, and multiply-adds per image of the forward and backward pass."""
    config = RunConfig.of(**PRESETS[preset])
    shape = datasets.image_shape(config.dataset)
    with torch.device("meta"):
        loss_fn = ladder(config, shape)
        x = torch.zeros(2, *shape)  # batch normalisation needs two if the top feature map is 1x1
        with FlopCounterMode(display=False) as forward:
            loss = loss_fn(x)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    trained = [p for p in loss_fn.parameters() if p.requires_grad]
    return {
        "gradient_bytes": sum(p.numel() * p.element_size() for p in trained),
        # A multiply-add counts as two operations.
        "forward_multiply_adds": forward.get_total_flops() // 2 // len(x),
        "backward_multiply_adds": backward.get_total_flops() // 2 // len(x),
    }


def batch_norm_difference(preset: str) -> dict[str, dict[str, float]]:
    """The effect of normalising by parts of the batch instead of the whole, by number of parts.

    The norm of the gradients' difference relative to the whole batch's gradient, and the losses'
    difference in nats; at the initial weights, without dropout, with the same noise.
    """
    config = RunConfig.of(**(PRESETS[preset] | {"dropout": 0.0}))
    x = random_images(config, config.batch_size)
    loss_fn = ladder(config, x.shape[1:])
    with data_dependent_init(loss_fn):
        loss_fn.guide(x)
    whole, loss = gradient(loss_fn, x, 1)
    found = {}
    for parts in PARTS:
        other, other_loss = gradient(loss_fn, x, parts)
        relative = (other - whole).norm() / whole.norm()
        found[str(parts)] = {"gradient": relative.item(), "loss_nats": other_loss - loss}
    return found


def gradient(loss_fn: Any, x: Tensor, parts: int) -> tuple[Tensor, float]:
    """Gradient and loss per image of a batch that is normalised by parts."""
    loss_fn.zero_grad()
    total = 0.0
    for number, part in enumerate(x.chunk(parts)):
        with part_of_the_noise(len(x), number, parts):
            loss = loss_fn(part) / len(x)
        loss.backward()
        total += loss.item()
    gradients = [p.grad.flatten() for p in loss_fn.parameters() if p.grad is not None]
    return torch.cat(gradients), total


@contextmanager
def part_of_the_noise(size: int, number: int, parts: int) -> Iterator[None]:
    """Draw latents with one of equal parts of the noise of a batch of `size`."""
    generator = torch.Generator().manual_seed(2)

    def draw(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        whole = torch.randn(size, *shape[1:], generator=generator, dtype=dtype)
        return whole.chunk(parts)[number]

    with patch("torch.distributions.normal._standard_normal", draw):
        yield


def table(result: dict[str, Any]) -> str:
    lines = [f"{'preset':18}{'batch':>6}{'1 process':>14}{'2 processes':>13}{'ratio':>7}"]
    for preset, found in result["throughput"].items():
        one, two = (found["images_per_second"][n] for n in "12")
        lines.append(
            f"{preset:18}{found['batch_size']:>6}{one:>10.1f}/s{two:>11.1f}/s{two / one:>7.2f}"
        )
    lines += ["", f"{'preset':18}{'gradients':>12}{'forward':>12}{'backward':>12}"]
    for preset, found in result["counted"].items():
        lines.append(
            f"{preset:18}{found['gradient_bytes'] / 1e6:>9.1f} MB"
            f"{found['forward_multiply_adds'] / 1e6:>10.0f} M"
            f"{found['backward_multiply_adds'] / 1e6:>10.0f} M"
        )
    for preset, parts in result["batch_norm"].items():
        for number, found in parts.items():
            lines.append(
                f"{preset}, normalised in {number} parts: gradient differs by "
                f"{found['gradient']:.1%}, loss by {found['loss_nats']:+.3f} nats"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("parallel", "Measure training by two processes.")
    add_presets(parser, ["digits", "mnist-3"])
    add_repeats(parser, 3)
    parser.add_argument(
        "--steps", type=at_least(1), default=3, metavar="N", help="steps per turn (default: 3)"
    )
    arguments = parser.parse_args(argv)
    measured = {
        name: throughput(name, arguments.steps, arguments.repeats) for name in arguments.presets
    }
    torch.set_num_threads(THREADS)
    with pyro.validation_enabled(False):
        result: dict[str, Any] = {
            "repeats": arguments.repeats,
            "steps": arguments.steps,
            "weights": "random",
            "images": "random",
            "throughput": measured,
            "counted": {name: counted(name) for name in PRESETS},
            "batch_norm": {name: batch_norm_difference(name) for name in arguments.presets},
            "assumed": {
                "bytes_per_second": ASSUMED_RATES,
                "multiply_adds_per_second": ASSUMED_MULTIPLY_ADDS,
            },
        }
    print(table(result))
    write_json(RESULT, result | {"provenance": provenance(CPU)})
    return 0


if __name__ == "__main__":
    run_command(main)
