"""Time of the discretized logistics: ours, and a straightforward implementation.

    python -m benchmarks.likelihoods [--batch-size 16] [--repeats 30] [--device cpu]

Times `log_prob` of images (N, 3, 32, 32) given the channels of the likelihood head, alone and with
the gradient of the channels. The straightforward implementation follows the formulas as they are
usually written, with differences of sigmoids and one tensor per colour. First checks that both give
the same values. Then they take turns, and results are medians. Prints a table and writes
results/benchmarks/likelihoods.json.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.arguments import add_device, add_repeats, benchmark_parser
from benchmarks.harness.records import RESULTS
from benchmarks.harness.timing import medians, seconds
from evaluate import at_least
from ladder_vae.networks.discretized_logistic import DiscretizedLogistic
from ladder_vae.networks.discretized_logistic_mixture import DiscretizedLogisticMixture
from ladder_vae.runs.provenance import provenance
from runtime.device import choose_device
from runtime.errors import run_command
from runtime.files import write_json

RESULT = RESULTS / "likelihoods.json"

LogProb = Callable[[Tensor, Tensor], Tensor]


def logistic(channels: Tensor, x: Tensor) -> Tensor:
    """log p (N,) from channels (N, 6, H, W) and images (N, 3, H, W)."""
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
    """log p (N,) from channels (N, 100, H, W) and images (N, 3, H, W)."""
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


# Both implementations, and the number of channels of the head.
PAIRS: dict[str, tuple[LogProb, LogProb, int]] = {
    "discretized logistic": (logistic, straightforward_logistic, 6),
    "mixture of discretized logistics": (mixture, straightforward_mixture, 100),
}


def forward(log_prob: LogProb, channels: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        log_prob(channels, x)


def forward_and_backward(log_prob: LogProb, channels: Tensor, x: Tensor) -> None:
    torch.autograd.grad(log_prob(channels, x).sum(), channels)


def compare(
    ours: LogProb, straightforward: LogProb, channels: Tensor, x: Tensor, repeats: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds of both implementations, by pass."""
    result = {}
    for name, run in {"forward": forward, "forward + backward": forward_and_backward}.items():
        ways = {
            "ours_ms": partial(seconds, partial(run, ours, channels, x), x.device),
            "straightforward_ms": partial(
                seconds, partial(run, straightforward, channels, x), x.device
            ),
        }
        medians(ways, 2)  # warm-up
        result[name] = {way: 1000 * taken for way, taken in medians(ways, repeats).items()}
    return result


def check(ours: LogProb, straightforward: LogProb, channels: Tensor, x: Tensor) -> None:
    """Assert that both give the same values.

    In double precision: in single precision the differences of sigmoids are inaccurate.
    """
    torch.testing.assert_close(ours(channels, x), straightforward(channels, x), rtol=1e-6, atol=0)


def results(device: torch.device, batch_size: int, repeats: int) -> dict[str, Any]:
    """All results and their provenance."""
    torch.manual_seed(0)
    x = (torch.randint(256, (batch_size, 3, 32, 32)) / 255).to(device)
    median_ms = {}
    for name, (ours, straightforward, n_channels) in PAIRS.items():
        channels = torch.randn(batch_size, n_channels, 32, 32).to(device).requires_grad_()
        check(ours, straightforward, channels.double(), x.double())
        median_ms[name] = compare(ours, straightforward, channels, x, repeats)
    return {
        "batch_size": batch_size,
        "image_shape": [3, 32, 32],
        "repeats": repeats,
        "median_ms": median_ms,
        "provenance": provenance(device),
    }


def table(result: dict[str, Any]) -> str:
    title = f"log_prob, {result['batch_size']} images (3, 32, 32)"
    lines = [f"{title:35}{'pass':20}{'ours':>10}{'plain':>10}{'ratio':>8}"]
    for name, passes in result["median_ms"].items():
        for kind, found in passes.items():
            ours, plain = found["ours_ms"], found["straightforward_ms"]
            lines.append(f"{name:35}{kind:20}{ours:7.2f} ms{plain:7.2f} ms{plain / ours:8.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("likelihoods", "Time the discretized logistics.")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=16, metavar="N", help="images (default: 16)"
    )
    add_repeats(parser, 30)
    add_device(parser)
    arguments = parser.parse_args(argv)
    result = results(choose_device(arguments.device), arguments.batch_size, arguments.repeats)
    print(table(result))
    write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    run_command(main)
