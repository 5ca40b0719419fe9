"""Tables of results as Markdown."""

from typing import Any

from ladder_vae.evaluation.metrics import Metrics
from ladder_vae.reports.tables import Column, layer_name, markdown, markdown_rows, summary


def test_a_markdown_table_is_aligned() -> None:
    columns = [
        Column("name", ["a|b\nc", "d"], is_number=False),
        Column("n", ["1", "1,000"], best=frozenset([1])),
    ]
    assert markdown(columns).splitlines() == [
        "| name   |         n |",
        "| ------ | --------: |",
        "| a\\|b c |         1 |",
        "| d      | **1,000** |",
    ]
    rows = markdown_rows(["name", "n"], [["a", "1"], ["b", "10"]], numbers=[1])
    assert rows.splitlines() == [
        "| name |   n |",
        "| ---- | --: |",
        "| a    |   1 |",
        "| b    |  10 |",
    ]


def test_layers_are_named_from_both_ends() -> None:
    assert [layer_name(i, 3) for i in (1, 2, 3)] == ["layer 1 (bottom)", "layer 2", "layer 3 (top)"]
    assert layer_name(1, 1) == "layer 1 (top)"


def test_the_summary_of_an_evaluation() -> None:
    content: dict[str, Any] = {
        "elbo": 6.0,
        "iw": {"1": 6.0, "1000": 5.0},
        "standard_error": {"elbo": 1.15, "1": None, "1000": 1.15},
        "bits_per_dim": {"elbo": 2.164, "1": 2.164, "1000": 1.803},
        "kl_per_layer": [3.0, 1.0],
        "n_images": 3,
        "dataset": "digits",
        "split": "test",
        "step": 1,
        "effective_samples": {"median": 20.0},
        "pareto_k": {"threshold": 0.667, "share_above": 1 / 3},
        "pareto_smoothed": {"nats": 4.5, "standard_error": 1.2},
    }
    assert summary(Metrics.from_dict(content)).splitlines() == [
        "digits, 3 test images, step 1, last weights",
        "| negative bound                            | nats | std. error | bits/dim |",
        "| ----------------------------------------- | ---: | ---------: | -------: |",
        "| ELBO                                      | 6.00 |       1.15 |    2.164 |",
        "| 1 importance sample                       | 6.00 |            |    2.164 |",
        "| 1,000 importance samples                  | 5.00 |       1.15 |    1.803 |",
        "| 1,000 samples, Pareto-smoothed (no bound) | 4.50 |       1.20 |          |",
        "KL by layer, bottom to top: 3.00  1.00 nats",
        "effective samples: 20.0 of 1,000 (median); Pareto k-hat above 0.67 for 33.3% of the "
        "images",
    ]
    assert "k-hat" not in summary(Metrics.from_dict(content | {"pareto_k": None}))
    density = {"likelihood": "gaussian", "likelihood_kind": "density", "bits_per_dim": {}}
    lines = summary(Metrics.from_dict(content | density)).splitlines()
    assert lines[1] == "| negative bound                            | nats | std. error |"
    assert lines[-1].startswith("note      The likelihood, gaussian, is a density")
