"""Pyro's handlers act on model and guide as on any Pyro program."""

import pytest
import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations, render_model
from torch import Tensor
from torch.testing import assert_close

from tests.story.by_hand import (
    LATENTS,
    MakePair,
    double_pair,
    log_joint,
    log_posterior,
    log_probs,
    prior_draw,
    row,
)


@row("`poutine.trace`", "`poutine.replay`")
def test_trace_and_replay(make_pair: MakePair, x: Tensor) -> None:
    """The guide's trace holds latents alone; the model replays them and scores the image."""
    model, guide = double_pair(make_pair, skip=True)
    x = x.double()
    q = poutine.trace(guide).get_trace(x)
    assert q.stochastic_nodes == ["images", *LATENTS[::-1]]
    assert q.observation_nodes == []
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
    z = {name: q.nodes[name]["value"] for name in LATENTS}
    for name in LATENTS:
        assert torch.equal(p.nodes[name]["value"], z[name])
    assert_close(q.log_prob_sum(), log_posterior(model, guide, z, x).sum())
    assert_close(p.log_prob_sum(), log_joint(model, z, x).sum())


@row("`poutine.condition`")
@pytest.mark.parametrize("skip", [False, True])
def test_conditioned_model(make_pair: MakePair, x: Tensor, skip: bool) -> None:
    """With all latents and x given, the model's log-probabilities are those of its networks."""
    model, _ = make_pair(skip=skip)
    model.double().eval()
    x = x.double()
    z = prior_draw(model, len(x))
    trace = poutine.trace(poutine.condition(model, z | {"x": x})).get_trace(n=len(x))
    expected = log_probs(model, z, x)
    for name, log_prob in expected.items():
        assert torch.equal(trace.nodes[name]["value"], z.get(name, x))
        assert_close(trace.nodes[name]["fn"].log_prob(z.get(name, x)), log_prob)
    assert_close(trace.log_prob_sum(), sum(value.sum() for value in expected.values()))
    # The same with x as the model's own argument.
    again = poutine.trace(poutine.condition(model, z)).get_trace(x)
    assert_close(again.log_prob_sum(), trace.log_prob_sum())


@row("`poutine.do`")
def test_intervened_model(make_pair: MakePair, x: Tensor) -> None:
    """A latent that is set acts on the layers below, and is not scored."""
    model, _ = double_pair(make_pair)  # without skip connections: z_3 acts through z_2 alone
    x = x.double()
    z = prior_draw(model, len(x))
    given = poutine.condition(model, {"z_3": z["z_3"], "z_1": z["z_1"]})
    trace = poutine.trace(poutine.do(given, {"z_2": z["z_2"]})).get_trace(x)
    assert_close(trace.nodes["h_2"]["value"], model.layers[1](z["z_2"]))
    own = trace.nodes["z_2"]["value"]  # what the model draws, which acts on nothing
    assert not torch.equal(own, z["z_2"])
    trace.compute_log_prob()
    expected = log_probs(model, z, x)
    for name in ("z_3", "z_1", "x"):
        assert_close(trace.nodes[name]["log_prob"], expected[name])
    assert_close(trace.nodes["z_2"]["log_prob"], log_probs(model, z | {"z_2": own}, x)["z_2"])


@row("`poutine.uncondition`")
def test_unconditioned_model(make_pair: MakePair, x: Tensor) -> None:
    """Called with images, it draws as many new ones as the model draws without images."""
    model, _ = double_pair(make_pair)
    torch.manual_seed(1)
    expected = model(n=len(x))
    torch.manual_seed(1)
    assert torch.equal(poutine.uncondition(model)(x.double()), expected)


@row("`poutine.block`")
def test_hidden_sites(make_pair: MakePair, x: Tensor) -> None:
    """Hidden latents leave the trace and its log-probability."""
    model, _ = double_pair(make_pair)
    x = x.double()
    z = prior_draw(model, len(x))
    hidden = poutine.block(poutine.condition(model, z), hide=["z_1", "h_2"])
    trace = poutine.trace(hidden).get_trace(x)
    assert {"z_1", "h_2"}.isdisjoint(trace.nodes)
    found = log_probs(model, z, x)
    assert_close(trace.log_prob_sum(), (found["z_3"] + found["z_2"] + found["x"]).sum())


@row("`poutine.scale`", "`poutine.mask`")
def test_scale_and_mask(make_pair: MakePair, x: Tensor) -> None:
    """Log-probabilities are multiplied, and those of masked images are zero."""
    model, _ = double_pair(make_pair)
    x = x.double()
    z = prior_draw(model, len(x))
    given = poutine.condition(model, z)
    expected = log_joint(model, z, x)
    scaled = poutine.trace(poutine.scale(given, scale=0.3)).get_trace(x)
    assert_close(scaled.log_prob_sum(), 0.3 * expected.sum())
    mask = torch.tensor([True, False, True, True, False])
    masked = poutine.trace(poutine.mask(given, mask=mask)).get_trace(x)
    assert_close(masked.log_prob_sum(), expected[mask].sum())


def test_training_mode_of_the_guide_is_that_of_the_model(make_pair: MakePair, x: Tensor) -> None:
    """The shared top-down pass of both has one mode, with a handler around the model, too."""
    model, guide = make_pair()
    assert model.training
    guide.eval()
    assert not any(module.training for module in (*model.modules(), *guide.modules()))
    guide.train()
    assert all(module.training for module in (*model.modules(), *guide.modules()))
    # In evaluation mode a pass leaves no trace in the batch statistics.
    guide.eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    guide(x)
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


@row("`render_model`", "`get_model_relations`")
@pytest.mark.parametrize(
    ("skip", "parents"),
    [
        (False, {"z_3": [], "z_2": ["z_3"], "z_1": ["z_2"], "x": ["z_1"]}),
        (
            True,
            {
                "z_3": [],
                "z_2": ["z_3"],
                "z_1": ["z_3", "z_2"],
                "x": ["z_3", "z_2", "z_1"],
            },
        ),
    ],
)
def test_rendered_model(
    make_pair: MakePair, x: Tensor, skip: bool, parents: dict[str, list[str]]
) -> None:
    """The model's graph: a chain from the top to x, with skip edges from all layers above."""
    model, _ = make_pair(skip=skip)
    model.eval()
    relations = get_model_relations(model, (x,))
    assert {name: relations["sample_sample"][name] for name in parents} == parents
    assert relations["plate_sample"] == {"images": ["z_3", "h_3", "z_2", "h_2", "z_1", "x"]}
    assert relations["observed"] == ["h_3", "h_2", "x"]
    kinds = dict.fromkeys(LATENTS, "Normal") | dict.fromkeys(("h_3", "h_2"), "Deterministic")
    assert relations["sample_dist"] == kinds | {"x": "Bernoulli"}

    source = render_model(model, model_args=(x,)).source
    lines = [line.strip() for line in source.splitlines()]
    assert "subgraph cluster_images {" in lines
    edges = {tuple(line.split(" -> ")) for line in lines if " -> " in line}
    random = {(a, b) for a, b in edges if not b.startswith("h_")}
    assert random == {(above, name) for name, all_above in parents.items() for above in all_above}
    for name in parents:
        color = "gray" if name == "x" else "white"
        assert f"{name} [label={name} fillcolor={color} shape=ellipse style=filled]" in lines


@row("`Trace.format_shapes`")
def test_format_shapes(make_pair: MakePair, x: Tensor) -> None:
    """Every site has the images as its batch and one log-probability per image."""
    model, _ = make_pair()
    trace = poutine.trace(model.eval()).get_trace(x)
    trace.compute_log_prob()
    rows = [" ".join(line.split()) for line in trace.format_shapes().splitlines()]
    assert rows == [
        "Trace Shapes:",
        "Param Sites:",
        "Sample Sites:",
        "images dist |",
        "value 5 |",
        "log_prob |",
        "z_3 dist 5 | 2 1 2",
        "value 5 | 2 1 2",
        "log_prob 5 |",
        "h_3 dist 5 | 4 2 4",
        "value 5 | 4 2 4",
        "log_prob 5 |",
        "z_2 dist 5 | 3 2 4",
        "value 5 | 3 2 4",
        "log_prob 5 |",
        "h_2 dist 5 | 4 4 8",
        "value 5 | 4 4 8",
        "log_prob 5 |",
        "z_1 dist 5 | 2 4 8",
        "value 5 | 2 4 8",
        "log_prob 5 |",
        "x dist 5 | 1 8 10",
        "value 5 | 1 8 10",
        "log_prob 5 |",
    ]
