"""A trained ladder in Python: loading, sampling, encoding, bounds; from anywhere, and torch.hub."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import datasets
from ladder import Ladder
from ladder_vae.runs.published import published_weights, write_folder
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from tests.commands import ROOT, subprocess_environment


@pytest.fixture(scope="module")
def ladder(trained_run: Path) -> Ladder:
    """Two layers of binary 8x8 images."""
    return Ladder.load(trained_run, device="cpu")


@pytest.fixture(scope="module")
def published(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_folder(folder, *published_weights(Run.open(trained_run), None))
    return folder


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """All test images, (297, 1, 8, 8)."""
    images = datasets.load("digits", "test", ROOT)
    return images.batch(torch.arange(len(images)))


# --- Loading ---


def test_a_ladder_is_loaded_from_runs_and_published_files(
    trained_run: Path, published: Path
) -> None:
    """By str or Path, with the same weights."""
    paths: list[str | Path] = [
        trained_run,
        str(trained_run),
        published,
        str(published / "model.safetensors"),
    ]
    loaded = [Ladder.load(path, device="cpu") for path in paths]
    for ladder in loaded:
        assert (ladder.step, ladder.depth, ladder.source.weights) == (30, 2, "average")
        assert not ladder.model.training
        assert not ladder.guide.training
        pairs = zip(ladder.guide.parameters(), loaded[0].guide.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_checkpoint_and_its_weights_are_chosen(trained_run: Path) -> None:
    ladder = Ladder.load(trained_run, checkpoint=20, average=False, device="cpu")
    assert (ladder.step, ladder.source.weights) == (20, "last")
    with pytest.raises(UserError, match="no checkpoint"):
        Ladder.load(trained_run, checkpoint=7, device="cpu")


def test_published_weights_are_of_one_step_and_kind(published: Path) -> None:
    assert Ladder.load(published, checkpoint=30, device="cpu").step == 30
    with pytest.raises(UserError, match="has the weights of step 30 alone"):
        Ladder.load(published, checkpoint=20)
    with pytest.raises(UserError, match="has the moving average of the weights alone"):
        Ladder.load(published, average=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "there is no run folder and no published ladder"),
        ("absent.safetensors", "there is no file"),
        (".", "is not a run folder: it has no config.json"),
    ],
)
def test_other_places_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        Ladder.load(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_nothing_is_read_after_loading(trained_copy: Path) -> None:
    ladder = Ladder.load(trained_copy, device="cpu")
    shutil.rmtree(trained_copy)
    x = ladder.sample(2)
    assert ladder.reconstruct(x).shape == x.shape
    assert ladder.log_likelihood(x, 3).elbo.isfinite().all()


# --- Sampling ---


def test_samples_follow_the_seed(ladder: Ladder) -> None:
    """Draws of binary pixels, or means; also over several batches."""
    drawn = [(torch.manual_seed(1), ladder.sample(5))[1] for _ in range(2)]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (5, 1, 8, 8)
    assert set(drawn[0].unique().tolist()) == {0.0, 1.0}
    means = ladder.sample(ladder.batch_size + 3, mean=True)
    assert means.shape == (ladder.batch_size + 3, 1, 8, 8)
    assert ((means > 0) & (means < 1)).all()
    assert len(means.unique(dim=0)) == len(means)


def test_the_temperature_may_differ_by_layer(ladder: Ladder) -> None:
    """At temperature 0 a layer is at its mode: with all layers there, all means are equal."""
    at_mode = ladder.sample(4, temperature=0, mean=True)
    assert_close(at_mode, at_mode[:1].expand_as(at_mode))
    bottom_only = ladder.sample(4, temperature=[1, 0], mean=True)
    assert len(bottom_only.unique(dim=0)) == 4


def test_kept_layers_come_from_the_image(ladder: Ladder, digits: Tensor) -> None:
    """With the layers below at their mode, all samples share the image's upper layers."""
    shared = ladder.sample(3, above=1, given=digits[:1], temperature=0, mean=True)
    assert_close(shared, shared[:1].expand_as(shared))
    own = ladder.sample(3, above=1, given=digits[:3], temperature=0, mean=True)
    assert len(own.unique(dim=0)) == 3
    # All layers kept: a reconstruction.
    torch.manual_seed(3)
    kept = ladder.sample(3, above=0, given=digits[:3], mean=True)
    torch.manual_seed(3)
    assert_close(kept, ladder.reconstruct(digits[:3]))


# --- Encoding ---


def test_encodings_are_draws_from_the_posterior(ladder: Ladder, digits: Tensor) -> None:
    latents = ladder.encode(digits[:200])
    sizes = ladder.config.latent_sizes((8, 8))
    assert [z.sample.shape for z in latents] == [(200, 2, *size) for size in sizes]
    for z in latents:
        assert (z.std > 0).all()
        standardised = (z.sample - z.mean) / z.std
        assert standardised.mean().abs() < 0.2
        assert abs(standardised.std() - 1) < 0.2
    # The top layer's posterior depends on the image alone.
    assert_close(latents[-1].mean, ladder.encode(digits[:200])[-1].mean)


def test_an_interpolation_joins_two_images(ladder: Ladder, digits: Tensor) -> None:
    a, b = digits[0], digits[1]
    between = ladder.interpolate(a, b, steps=5)
    assert between.shape == (5, 1, 8, 8)
    assert_close(between.flip(0), ladder.interpolate(b, a, steps=5))
    same = ladder.interpolate(a, a, steps=3, layers=[2])
    assert_close(same, same[:1].expand_as(same))
    assert not torch.allclose(ladder.interpolate(a, b, 5, layers=[2]), between)


def test_bounds_are_those_of_an_evaluation(
    evaluated_run: Path, ladder: Ladder, digits: Tensor
) -> None:
    """Digit for digit, for the same images, samples and random seed."""
    with np.load(evaluated_run / "eval" / "30" / "per_image.npz") as arrays:
        expected = dict(arrays)
    order = np.argsort(expected["image"])
    bounds = ladder.log_likelihood(digits[expected["image"][order]], expected["samples"].tolist())
    assert bounds.elbo.tolist() == expected["elbo"][order].tolist()
    for column, k in enumerate(expected["samples"].tolist()):
        assert bounds.importance_weighted[k].tolist() == expected["bound"][order, column].tolist()
    assert bounds.effective_samples.tolist() == expected["effective_samples"][order].tolist()
    assert bounds.pareto_k.tolist() == expected["pareto_k"][order].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ladder, x: ladder.sample(0), "`n` is 0"),
        (lambda ladder, x: ladder.sample(2, temperature=[1, 1, 1]), "3 values but .* 2 layers"),
        (lambda ladder, x: ladder.sample(2, above=1), "need each other"),
        (lambda ladder, x: ladder.sample(2, given=x), "need each other"),
        (lambda ladder, x: ladder.sample(2, above=2, given=x), "`above` is 2; .* from 0 to 1"),
        (lambda ladder, x: ladder.sample(2, above=0, given=x), "`given` holds 3 images"),
        (lambda ladder, x: ladder.interpolate(x[0], x), "`a` and `b` must be one image each"),
        (lambda ladder, x: ladder.interpolate(x[0], x[1], 1), "`steps` is 1"),
        (lambda ladder, x: ladder.interpolate(x[0], x[1], layers=[3]), "`layers` is 3; .* to 2"),
        (lambda ladder, x: ladder.log_likelihood(x, 0), "`samples` is 0"),
        (lambda ladder, x: ladder.log_likelihood(x, [5, 1]), "ascend"),
        (lambda ladder, x: ladder.log_likelihood(x, method="hmc"), "`method` is 'hmc'; it must be"),
        (
            lambda ladder, x: ladder.log_likelihood(x, method="ais", temperatures=1),
            "`temperatures` is 1; it must be a whole number, at least 2",
        ),
        (
            lambda ladder, x: ladder.log_likelihood(x, method="ais", chains=0),
            "`chains` is 0; it must be a whole number, at least 1",
        ),
        (lambda ladder, x: ladder.encode(x / 2), "x has grey pixels, such as 0.5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    call: Any, message: str, ladder: Ladder, digits: Tensor
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        call(ladder, digits[:3])
    assert "\n" not in str(refusal.value)


# --- From anywhere ---

FOREIGN = """
import sys
import datasets
assert datasets.FOREIGN
{load}
x = ladder.sample(2)
ladder.encode(x), ladder.reconstruct(x), ladder.interpolate(x[0], x[1]), ladder.log_likelihood(x, 2)
assert datasets is sys.modules["datasets"]
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"tensorboard", "matplotlib", "PIL", "jinja2", "sklearn"}}, loaded
above = ("ladder_vae.training", "ladder_vae.reports", "ladder_vae.runs.options")
assert not any(name.startswith(above) for name in sys.modules)
print(*x.shape)
"""


@pytest.mark.parametrize(
    "load",
    [
        "sys.path.append({root!r})\nfrom ladder import Ladder\nladder = Ladder.load({path!r})",
        "import torch\n"
        "ladder = torch.hub.load({root!r}, 'ladder', {path!r}, source='local', device='cpu')",
    ],
    ids=["import", "torch.hub"],
)
def test_it_works_elsewhere_beside_a_foreign_package_called_datasets(
    load: str, published: Path, tmp_path: Path
) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("FOREIGN = True\n")
    program = FOREIGN.format(load=load.format(root=str(ROOT), path=str(published)))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2 1 8 8\n"


def test_a_ladder_of_the_hub_is_downloaded(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = ModuleType("huggingface_hub")
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        if name != "owner/name":
            raise OSError("404 Client Error.\nRepository Not Found")
        return str(published)

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    ladder = Ladder.from_pretrained("owner/name", revision="v1", device="cpu")
    assert ladder.step == 30
    files = ["model.safetensors", "config.json"]
    assert asked == [("owner/name", {"revision": "v1", "allow_patterns": files})]
    with pytest.raises(
        UserError, match=r"cannot download 'owner/other' .*: 404 Client Error\. Rep"
    ):
        Ladder.from_pretrained("owner/other")


def test_without_huggingface_hub_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        Ladder.from_pretrained("owner/name")
