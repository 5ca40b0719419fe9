"""The importance-weighted bound compared with direct sums and Pyro; what its digits depend on."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import RenyiELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.testing import assert_close

from datasets import ImageSet
from datasets.images import DynamicallyBinarizedImages, PackedImages
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.evaluation import importance
from ladder_vae.evaluation.importance import (
    Blocks,
    Bounds,
    ImportanceSampler,
    importance_weighted_bounds,
    random_index,
)
from ladder_vae.evaluation.kl import by_channel, mean_kl
from ladder_vae.networks import LadderConfig
from runtime.random import torch_seed

PIXELS = 64
SEED = 5


@pytest.fixture
def ladder() -> tuple[Any, Any]:
    """A small model and guide in evaluation mode, with their initial weights."""
    torch.manual_seed(0)
    config = LadderConfig(
        z_dims=[2, 3],
        downsample=[0, 1],
        n_filters=4,
        blocks_per_layer=1,
        initial_downscaling=False,
        skip=True,
    )
    model, guide = build_ladder(config, (1, 8, 8))
    return model.eval(), guide.eval()


def made_images(n: int) -> ImageSet:
    pixels = np.random.default_rng(1).integers(0, 2, (n, 1, 8, 8), np.uint8)
    return PackedImages.pack("made", "test", pixels)


def bounds_of(
    ladder: tuple[Any, Any],
    images: ImageSet,
    samples: Sequence[int],
    *,
    batch_size: int,
    seed: int = SEED,
    index: Tensor | None = None,
) -> Bounds:
    if index is None:
        index = torch.arange(len(images))
    return importance_weighted_bounds(
        *ladder, images, index, samples, batch_size=batch_size, seed=seed
    )


def all_tensors(bounds: Bounds) -> list[Tensor]:
    return [
        bounds.elbo,
        bounds.log_likelihood,
        bounds.kl,
        bounds.effective_samples,
        *bounds.importance_weighted.values(),
    ]


def set_to_zero(*modules: nn.Module) -> None:
    for module in modules:
        for p in module.parameters():
            nn.init.zeros_(p)


# batch_size, samples; images in a group and samples in a chunk
BLOCKS = [
    (6, [1, 2, 4], 1, 4),  # all samples of one image at once
    (2, [1, 3, 5], 1, 2),  # in chunks, the last one smaller
    (8, [1, 2], 4, 2),  # several images at once, the last group smaller
    (1, [2, 3], 1, 1),
    (100, [7], 14, 7),
]


@pytest.mark.parametrize(("batch_size", "samples", "group", "chunk"), BLOCKS)
def test_bounds_by_hand(
    ladder: tuple[Any, Any], batch_size: int, samples: list[int], group: int, chunk: int
) -> None:
    """The bound at K is the logsumexp of the first K log-weights minus log K, for all blocks."""
    model, guide = ladder
    images = made_images(6)
    bounds = bounds_of(ladder, images, samples, batch_size=batch_size)

    log_w, log_likelihood, kl = [], [], []  # by image
    for number, start in enumerate(range(0, 6, group)):
        x = images.batch(torch.arange(start, min(start + group, 6)))
        chunks = []
        for c, done in enumerate(range(0, samples[-1], chunk)):
            k = min(chunk, samples[-1] - done)
            torch.manual_seed(torch_seed(SEED, 0, number, c))
            with torch.no_grad():
                terms = FreeBitsELBO().compute_terms(model, guide, x.repeat_interleave(k, 0))
            chunks.append([t.double().unflatten(0, (len(x), k)) for t in (*terms, terms.elbo)])
        parts = [torch.cat(p, 1) for p in zip(*chunks, strict=True)]
        log_likelihood.append(parts[0].mean(1))
        kl.append(parts[1].mean(1))
        log_w.append(parts[2])
    w = torch.cat(log_w)
    assert w.shape == (6, samples[-1])
    assert list(bounds.importance_weighted) == samples
    for k in samples:
        expected = w[:, :k].logsumexp(1) - math.log(k)
        assert_close(bounds.importance_weighted[k], expected, rtol=1e-5, atol=1e-5)
    assert_close(bounds.elbo, w.mean(1), rtol=1e-5, atol=1e-5)
    assert_close(bounds.log_likelihood, torch.cat(log_likelihood), rtol=1e-5, atol=1e-5)
    assert_close(bounds.kl, torch.cat(kl), rtol=1e-4, atol=1e-5)
    assert {t.dtype for t in all_tensors(bounds)} == {torch.float64}


def test_sums_over_samples_are_of_double_precision(
    ladder: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For log-weights as large as those of colour images, which float32 rounds to 1e-3 nats."""
    log_likelihood = 3 * torch.randn(600) - 7000
    kl = 5 + torch.rand(600, 2)
    done = iter(range(0, 600, 50))

    def terms(guide: Any) -> tuple[Tensor, Tensor]:
        part = slice(first := next(done), first + 50)
        return log_likelihood[part], kl[part]

    monkeypatch.setattr(importance, "sampled_terms", terms)
    bounds = bounds_of(ladder, made_images(1), [7, 600], batch_size=50)
    log_w = log_likelihood.double() - kl.double().sum(1)
    exact: dict[str, Any] = {"rtol": 0, "atol": 1e-10}
    for k, bound in bounds.importance_weighted.items():
        assert_close(bound, (log_w[:k].logsumexp(0) - math.log(k)).view(1), **exact)
    assert_close(bounds.elbo, log_w.mean().view(1), **exact)
    assert_close(bounds.log_likelihood, log_likelihood.double().mean().view(1), **exact)
    assert_close(bounds.kl, kl.double().mean(0).view(1, 2), **exact)


def test_one_pass_gives_the_bound_at_every_smaller_k(ladder: tuple[Any, Any]) -> None:
    """The bound at a K does not depend on the other Ks."""
    images = made_images(3)
    alone = bounds_of(ladder, images, [6], batch_size=4)
    many = bounds_of(ladder, images, [1, 2, 3, 5, 6], batch_size=4)
    assert torch.equal(alone.importance_weighted[6], many.importance_weighted[6])
    assert torch.equal(alone.elbo, many.elbo)


def test_elbo_is_the_log_likelihood_minus_the_kl(ladder: tuple[Any, Any]) -> None:
    bounds = bounds_of(ladder, made_images(5), [3], batch_size=4)
    assert torch.equal(bounds.elbo, bounds.log_likelihood - bounds.kl.sum(1))


def test_the_same_blocks_give_the_same_digits(ladder: tuple[Any, Any]) -> None:
    """Bounds depend on the seed, not on the global random state, which does not change."""
    images = made_images(5)
    first = bounds_of(ladder, images, [1, 4], batch_size=6)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = bounds_of(ladder, images, [1, 4], batch_size=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, all_tensors(first), all_tensors(again)))
    other = bounds_of(ladder, images, [1, 4], batch_size=6, seed=SEED + 1)
    assert not any(map(torch.equal, all_tensors(first), all_tensors(other)))


def test_the_block_size_only_changes_the_noise(ladder: tuple[Any, Any]) -> None:
    """Means over seeds agree within four standard errors."""
    images = made_images(4)
    figures = []
    for batch_size in (3, 20):
        runs = [bounds_of(ladder, images, [1, 5], batch_size=batch_size, seed=s) for s in range(30)]
        figures.append(
            torch.stack([torch.stack([t.mean() for t in all_tensors(run)]) for run in runs])
        )
    assert not torch.equal(figures[0], figures[1])
    difference = figures[0].mean(0) - figures[1].mean(0)
    error = ((figures[0].var(0) + figures[1].var(0)) / 30).sqrt()
    assert (difference.abs() < 4 * error).all()


def test_bounds_are_in_the_order_of_the_index(ladder: tuple[Any, Any]) -> None:
    model, guide = ladder
    set_to_zero(guide.top_posterior, *(p.conv for p in guide.posteriors), *model.priors)
    nn.init.zeros_(model.likelihood.conv.weight)
    nn.init.ones_(model.likelihood.conv.bias)  # so that the score follows from the pixels
    images = made_images(9)
    index = torch.tensor([7, 0, 3, 3, 8])
    bounds = bounds_of(ladder, images, [2], batch_size=4, index=index)
    on = images.batch(index).sum((1, 2, 3)).double()
    expected = on - PIXELS * math.log(1 + math.e)  # log p(1) = 1 - log(1 + e)
    assert_close(bounds.importance_weighted[2], expected, rtol=1e-6, atol=1e-4)


def test_the_bottom_up_pass_runs_once_per_group(ladder: tuple[Any, Any]) -> None:
    _, guide = ladder
    sizes: list[int] = []
    guide.bottom_up.register_forward_hook(lambda module, inputs, y: sizes.append(len(inputs[0])))
    finished: list[int] = []
    importance_weighted_bounds(
        *ladder,
        made_images(7),
        torch.arange(7),
        [1, 3],
        batch_size=6,
        seed=0,
        on_images=finished.append,
    )
    assert sizes == finished == [2, 2, 2, 1]
    sizes.clear()
    bounds_of(ladder, made_images(3), [10], batch_size=4)
    assert sizes == [1, 1, 1]


# --- The same noise for every image and sample, whatever the blocks ---


Part = tuple[slice, slice]  # of the images, and of the samples


class Noise(Messenger):
    """Draws z_i = mean + scale * eps_i, with eps_i (N, K, Z, h, w) of the next part."""

    def __init__(self, noise: dict[str, Tensor], parts: Iterator[Part]) -> None:
        super().__init__()
        self.noise = noise
        self.parts = parts
        self.top = f"z_{len(noise)}"

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.noise:
            if msg["name"] == self.top:
                self.part = next(self.parts)
            normal = msg["fn"].base_dist
            eps = self.noise[msg["name"]][self.part].flatten(0, 1)  # samples side by side
            msg["value"] = normal.loc + normal.scale * eps
            msg["done"] = True


def parts_of(blocks: Blocks, images: int, samples: int) -> Iterator[Part]:
    """The images and samples of the sampler's passes."""
    for first in range(0, images, blocks.images):
        done = 0
        for k in blocks.chunks(samples):
            yield slice(first, min(first + blocks.images, images)), slice(done, done + k)
            done += k


def noise_of(images: int, samples: int) -> dict[str, Tensor]:
    """Noise for the two layers of the ladder in these tests."""
    generator = torch.Generator().manual_seed(11)
    return {
        "z_1": torch.randn(images, samples, 2, 8, 8, generator=generator),
        "z_2": torch.randn(images, samples, 3, 4, 4, generator=generator),
    }


def bounds_with_noise(
    ladder: tuple[Any, Any], images: ImageSet, samples: list[int], batch_size: int
) -> Bounds:
    n, most = len(images), samples[-1]
    parts = parts_of(Blocks.of(batch_size, most), n, most)
    with Noise(noise_of(n, most), parts):
        bounds = bounds_of(ladder, images, samples, batch_size=batch_size)
    assert next(parts, None) is None
    return bounds


@pytest.fixture(params=["plain", "batch norm and dropout"])
def any_ladder(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(0)
    special = request.param != "plain"
    config = LadderConfig(
        z_dims=[2, 3],
        downsample=[0, 1],
        n_filters=4,
        blocks_per_layer=1,
        initial_downscaling=False,
        skip=True,
        gated=True,
        batchnorm=special,
        dropout=0.5 if special else 0.0,
    )
    model, guide = build_ladder(config, (1, 8, 8))
    if special:  # statistics other than the initial ones
        guide(made_images(6).batch(torch.arange(6)))
    return model.eval(), guide.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12, 30, 1000])
def test_bounds_do_not_depend_on_the_block_size(
    any_ladder: tuple[Any, Any], batch_size: int
) -> None:
    """With the same noise: images alone or with others, samples in one chunk or in many."""
    images, samples = made_images(6), [1, 2, 5, 24]
    alone = bounds_with_noise(any_ladder, images, samples, 24)
    found = bounds_with_noise(any_ladder, images, samples, batch_size)
    for one, other in zip(all_tensors(alone), all_tensors(found), strict=True):
        assert_close(other, one, rtol=1e-5, atol=1e-4)
    assert_close(found.pareto_k, alone.pareto_k, rtol=0, atol=1e-3)
    assert found.pareto_k.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 7, 30])
def test_the_bound_is_pyro_s_renyi_elbo(ladder: tuple[Any, Any], k: int) -> None:
    """With alpha = 0 and K particles of the same noise, image by image."""
    images = made_images(4)
    bounds = bounds_with_noise(ladder, images, [k], 64)
    for i, bound in enumerate(bounds.importance_weighted[k]):
        particles = ((slice(i, i + 1), slice(j, j + 1)) for j in range(k))
        with torch.no_grad(), Noise(noise_of(4, k), particles):
            x = images.batch(torch.tensor([i]))
            loss = RenyiELBO(alpha=0, num_particles=k).loss(*ladder, x)
        assert -loss == pytest.approx(bound.item(), rel=1e-6)


# --- The same digits ---


def tables(sampler: ImportanceSampler, order: Sequence[int]) -> list[Tensor]:
    """The tables of all groups, computed in the given order."""
    found = {number: sampler.group(number).table() for number in order}
    return [found[number] for number in range(len(sampler))]


def test_groups_in_any_order_give_the_same_digits(ladder: tuple[Any, Any]) -> None:
    """Also when computed twice, or by another sampler: a group depends only on its number."""
    images = made_images(7)
    first, second = (
        ImportanceSampler(*ladder, images, torch.arange(7), [1, 3], batch_size=6, seed=SEED)
        for _ in range(2)
    )
    assert [first.size(number) for number in range(len(first))] == [2, 2, 2, 1]
    forwards, mixed = tables(first, [0, 1, 2, 3]), tables(second, [2, 3, 0, 1, 0, 2])
    assert_close(forwards, mixed, rtol=0, atol=0, equal_nan=True)
    assert forwards[0].shape == (2, first.columns)


def test_the_order_of_the_index_changes_no_digit(ladder: tuple[Any, Any]) -> None:
    images, index = made_images(9), torch.tensor([8, 1, 4, 0, 7, 3])
    bounds = bounds_of(ladder, images, [1, 30], batch_size=60, index=index)
    ordered = bounds_of(ladder, images, [1, 30], batch_size=60, index=index.sort().values)
    assert torch.equal(bounds.table(), ordered.table()[index.sort().indices.argsort()])
    assert len(set(bounds.elbo.tolist())) == 6


def test_images_binarized_at_each_reading_are_part_of_the_noise(ladder: tuple[Any, Any]) -> None:
    """Their bounds depend on the seed, and not on which images were read before."""
    grey = torch.randint(1, 255, (8, 1, 8, 8), dtype=torch.uint8)
    images = DynamicallyBinarizedImages("made", "train", (1, 8, 8), grey)
    read: list[Tensor] = []
    ladder[1].bottom_up.register_forward_hook(lambda module, inputs, y: read.append(inputs[0]))
    first = bounds_of(ladder, images, [1, 4], batch_size=32)
    images.batch(torch.arange(8))
    again = bounds_of(ladder, images, [1, 4], batch_size=32)
    bounds_of(ladder, images, [1, 4], batch_size=32, seed=SEED + 1)
    assert all(map(torch.equal, all_tensors(first), all_tensors(again)))
    assert [x.shape[0] for x in read] == [8, 8, 8]
    assert torch.equal(read[0], read[1])
    assert not torch.equal(read[0], read[2])


def test_a_table_holds_all_bounds(ladder: tuple[Any, Any]) -> None:
    bounds = bounds_of(ladder, made_images(3), [1, 2, 30], batch_size=60)
    again = Bounds.from_table(bounds.table(), [1, 2, 30])
    assert list(again.importance_weighted) == [1, 2, 30]
    assert all(map(torch.equal, all_tensors(bounds), all_tensors(again)))
    assert torch.equal(bounds.pareto_k, again.pareto_k)


@pytest.mark.parametrize(
    ("batch_size", "samples", "blocks", "chunks"),
    [
        (64, 1, (64, 1), [1]),
        (64, 64, (1, 64), [64]),
        (64, 30, (2, 30), [30]),
        (64, 100, (1, 64), [64, 36]),
        (1, 3, (1, 1), [1, 1, 1]),
    ],
)
def test_blocks(batch_size: int, samples: int, blocks: tuple[int, int], chunks: list[int]) -> None:
    """All samples of an image if they fit, and then as many images as fit."""
    made = Blocks.of(batch_size, samples)
    assert (made.images, made.samples) == blocks
    assert made.chunks(samples) == chunks
    assert made.images * made.samples <= batch_size


# --- Known evidence ---


def test_a_posterior_equal_to_the_prior_leaves_no_gap(ladder: tuple[Any, Any]) -> None:
    """With a zero output layer, log p(x) is -64 log 2, and so is the bound at every K."""
    model, guide = ladder
    set_to_zero(guide.top_posterior, *(p.conv for p in guide.posteriors), *model.priors)
    set_to_zero(model.likelihood)
    bounds = bounds_of(ladder, made_images(4), [1, 2, 7, 50], batch_size=20)
    evidence = torch.full((4,), -PIXELS * math.log(2), dtype=torch.float64)
    for bound in (*bounds.importance_weighted.values(), bounds.elbo, bounds.log_likelihood):
        assert_close(bound, evidence, rtol=0, atol=1e-4)
    assert_close(bounds.kl, torch.zeros(4, 2).double(), rtol=0, atol=0)


def test_importance_weights_are_unbiased_for_a_known_evidence(ladder: tuple[Any, Any]) -> None:
    """E[w] = p(x) for any posterior; with a zero output layer, log p(x) is -64 log 2."""
    model, guide = ladder
    set_to_zero(model.likelihood)
    with torch.no_grad():
        for conv in (guide.top_posterior.conv, *(p.conv for p in guide.posteriors)):
            conv.weight.mul_(0.2)
            conv.bias.mul_(0.2)
            conv.bias[: len(conv.bias) // 2].add_(0.1)  # other means than the prior
    set_to_zero(*model.priors)
    bounds = bounds_of(ladder, made_images(200), [1, 16], batch_size=400)
    evidence = -PIXELS * math.log(2)
    for bound in bounds.importance_weighted.values():
        w = (bound - evidence).exp()
        assert abs(w.mean() - 1) < 4 * w.std() / math.sqrt(len(w))
    gap = {k: evidence - bound.mean().item() for k, bound in bounds.importance_weighted.items()}
    assert bounds.kl.mean(0).min() > 0.1  # the posterior is not the prior
    assert gap[1] > 2 * gap[16] > 0  # and the bound approaches the evidence


def test_random_index() -> None:
    """Distinct numbers, fixed by the seed; all of them in order if none is skipped."""
    index = random_index(100, 30, seed=1)
    assert index.dtype == torch.int64
    assert len(set(index.tolist())) == 30
    assert set(index.tolist()) <= set(range(100))
    assert index.tolist() != sorted(index.tolist())
    assert torch.equal(index, random_index(100, 30, seed=1))
    assert torch.equal(index[:10], random_index(100, 10, seed=1))  # fewer are the first of more
    assert not torch.equal(index, random_index(100, 30, seed=2))
    for count in (100, 101):
        assert torch.equal(random_index(100, count, seed=1), torch.arange(100))


def test_channel_kl_sums_to_the_analytic_kl(ladder: tuple[Any, Any]) -> None:
    """Layer by layer, averaged over the images, with the same noise."""
    model, guide = ladder
    images = made_images(10)
    index = torch.tensor([9, 1, 2, 3, 4, 5, 8])
    torch.manual_seed(7)
    channels = by_channel(mean_kl(guide, images, index, batch_size=3))
    assert [c.shape for c in channels] == [(2,), (3,)]
    assert all((c > 0).all() for c in channels)
    torch.manual_seed(7)
    elbo = FreeBitsELBO(analytic_kl=True)
    with torch.no_grad():
        kl = [elbo.compute_terms(model, guide, images.batch(i)).kl for i in index.split(3)]
    expected = torch.cat(kl).mean(0)
    assert_close(torch.stack([c.sum() for c in channels]), expected, rtol=1e-4, atol=1e-5)
