"""docs/tutorial.ipynb: its code runs, its outputs are committed, and it learns."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent.parent / "docs"
NOTEBOOK = DOCS / "tutorial.ipynb"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures shown, without a window, in the notebook's folder."""
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    figures: list[Figure] = []

    def show() -> None:
        figures.append(plt.gcf())
        plt.close("all")

    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", show)
    yield figures
    plt.switch_backend(backend)


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_tutorial_runs(shown: list[Figure]) -> None:
    """All code cells, one after another, with the numbers that its text relies on."""
    found: dict[str, Any] = {}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), "docs/tutorial.ipynb", "exec"), found)
    assert len(shown) == sum(
        output["output_type"] == "display_data"
        for cell in cells("code")
        for output in cell["outputs"]
    )
    losses, elbos = found["losses"], found["elbos"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5
    assert sum(elbos[-20:]) / 20 < sum(losses[-5:]) / 5
    assert (found["terms"].kl.mean(0) > 0.5).all()  # each layer is used
    # HMC moved the latents, and the known pixels stayed.
    samples, known = found["samples"], found["known"]
    assert not torch.equal(samples["z_1"][0], samples["z_1"][-1])
    assert torch.equal(found["filled"] * known, found["digit"] * known)
    assert found["sampler"].get_ESS() > 2


def test_the_committed_outputs_are_complete_and_small() -> None:
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) - 2
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 300_000
    assert not any(
        word in NOTEBOOK.read_text() for word in ("/home/", "/root/", "/tmp/", "/Users/")
    )
