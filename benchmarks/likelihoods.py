"""How fast the discretized logistics are, beside a straightforward way to write them.

    python -m benchmarks.likelihoods [--device cpu] [--batch-size 16] [--repeats 30]

times `log_prob` of images (N, 3, 32, 32) from the likelihood head's channels, alone and with the
gradient of the channels, prints the medians and writes results/benchmarks/likelihoods.json. Both
ways take turns, so that whatever else the machine does slows both alike. The straightforward way
is the formulas as they are commonly written down, differences of sigmoids with one tensor for each
colour; that it gives the same values is checked first.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ladder_vae.networks.discretized_logistic import DiscretizedLogistic
from ladder_vae.networks.discretized_logistic_mixture import DiscretizedLogisticMixture
from ladder_vae.runs.provenance import provenance
from runtime.device import choose_device
from runtime.errors import UserError, run_command
from runtime.files import write_json

RESULT = Path(__file__).parent.parent / "results" / "benchmarks" / "likelihoods.json"

LogProb = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[LogProb, Tensor, Tensor], None]


def logistic(channels: Tensor, x: Tensor) -> Tensor:
    """(N,) from channels (N, 6, H, W) and images (N, 3, H, W)."""
    loc, log_scale = channels.chunk(2, dim=1)
    log_scale = log_scale.clamp(min=-7)
    return DiscretizedLogistic(loc, log_scale, validate_args=False).to_event(3).log_prob(x)


def straightforward_logistic(channels: Tensor, x: Tensor) -> Tensor:
    loc, log_scale = channels.chunk(2, dim=1)
    scale = log_scale.clamp(min=-7).exp()
    centre = x * 255 / 256 + 1 / 512
    upper = torch.sigmoid((centre + 1 / 512 - loc) / scale)
    lower = torch.sigmoid((centre - 1 / 512 - loc) / scale)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < 0.001, torch.zeros_like(lower), lower)
    return torch.log(upper - lower + 1e-7).sum((1, 2, 3))


def mixture(channels: Tensor, x: Tensor) -> Tensor:
    """(N,) from channels (N, 100, H, W) and images (N, 3, H, W)."""
    return DiscretizedLogisticMixture.from_channels(channels, validate_args=False).log_prob(x)


def straightforward_mixture(channels: Tensor, x: Tensor) -> Tensor:
    n, _, height, width = channels.shape
    x = (2 * x - 1).permute(0, 2, 3, 1).unsqueeze(-1).expand(n, height, width, 3, 10)
    channels = channels.permute(0, 2, 3, 1)
    logits = channels[..., :10]
    by_colour = channels[..., 10:].reshape(n, height, width, 3, 30)
    means = by_colour[..., :10]
    log_scales = by_colour[..., 10:20].clamp(min=-7)
    coefficients = by_colour[..., 20:].tanh()
    red = means[..., 0, :]
    green = means[..., 1, :] + coefficients[..., 0, :] * x[..., 0, :]
    blue = means[..., 2, :] + coefficients[..., 1, :] * x[..., 0, :]
    blue = blue + coefficients[..., 2, :] * x[..., 1, :]
    centred = x - torch.stack([red, green, blue], dim=-2)
    inverse_scale = torch.exp(-log_scales)
    upper, lower = inverse_scale * (centred + 1 / 255), inverse_scale * (centred - 1 / 255)
    mass = torch.sigmoid(upper) - torch.sigmoid(lower)
    middle = inverse_scale * centred
    log_density = middle - log_scales - 2 * F.softplus(middle)
    inner = torch.where(
        mass > 1e-5, torch.log(mass.clamp(min=1e-12)), log_density - math.log(127.5)
    )
    log_mass = torch.where(x > 0.999, -F.softplus(lower), inner)
    log_mass = torch.where(x < -0.999, upper - F.softplus(upper), log_mass)
    joint = log_mass.sum(-2) + F.log_softmax(logits, dim=-1)
    return torch.logsumexp(joint, dim=-1).sum((1, 2))


# The two ways to write each, and the channels of its head.
PAIRS: dict[str, tuple[LogProb, LogProb, int]] = {
    "discretized logistic": (logistic, straightforward_logistic, 6),
    "mixture of discretized logistics": (mixture, straightforward_mixture, 100),
}


def seconds(run: Run, log_prob: LogProb, channels: Tensor, x: Tensor) -> float:
    """Of one run, with all that it starts on the device finished."""
    start = time.perf_counter()
    run(log_prob, channels, x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def forward(log_prob: LogProb, channels: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        log_prob(channels, x)


def forward_and_backward(log_prob: LogProb, channels: Tensor, x: Tensor) -> None:
    torch.autograd.grad(log_prob(channels, x).sum(), channels)


def compare(
    ways: Sequence[LogProb], channels: Tensor, x: Tensor, repeats: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds of both ways, in turn, by pass."""
    result = {}
    for name, run in {"forward": forward, "forward + backward": forward_and_backward}.items():
        times: list[list[float]] = [[], []]
        for repeat in range(repeats + 2):
            for taken, log_prob in zip(times, ways, strict=True):
                elapsed = seconds(run, log_prob, channels, x)
                if repeat >= 2:  # the first ones warm up
                    taken.append(elapsed)
        ours, straightforward = (1000 * statistics.median(taken) for taken in times)
        result[name] = {"ours_ms": ours, "straightforward_ms": straightforward}
    return result


def check(ours: LogProb, straightforward: LogProb, channels: Tensor, x: Tensor) -> None:
    """Both give the same; in double precision, for in single the differences of sigmoids do not."""
    torch.testing.assert_close(ours(channels, x), straightforward(channels, x), rtol=1e-6, atol=0)


def benchmark(device: torch.device, batch_size: int, repeats: int) -> dict[str, Any]:
    """All figures and where they come from."""
    torch.manual_seed(0)
    x = (torch.randint(256, (batch_size, 3, 32, 32)) / 255).to(device)
    figures = {}
    for name, (ours, straightforward, n_channels) in PAIRS.items():
        channels = torch.randn(batch_size, n_channels, 32, 32).to(device).requires_grad_()
        check(ours, straightforward, channels.double(), x.double())
        figures[name] = compare((ours, straightforward), channels, x, repeats)
    return {
        "batch_size": batch_size,
        "image_shape": [3, 32, 32],
        "repeats": repeats,
        "median_ms": figures,
        "provenance": provenance(device),
    }


def table(result: dict[str, Any]) -> str:
    title = f"log_prob, {result['batch_size']} images (3, 32, 32)"
    lines = [f"{title:35}{'pass':20}{'ours':>10}{'plain':>10}{'ratio':>8}"]
    for name, passes in result["median_ms"].items():
        for kind, figures in passes.items():
            ours, plain = figures["ours_ms"], figures["straightforward_ms"]
            lines.append(f"{name:35}{kind:20}{ours:7.2f} ms{plain:7.2f} ms{plain / ours:8.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.likelihoods", description="Time the discretized logistics."
    )
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--batch-size", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--repeats", type=int, default=30, help="runs of each (default: 30)")
    arguments = parser.parse_args(argv)
    if min(arguments.batch_size, arguments.repeats) < 1:
        raise UserError("--batch-size and --repeats must be at least 1")
    result = benchmark(choose_device(arguments.device), arguments.batch_size, arguments.repeats)
    print(table(result))
    write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    run_command(main)
