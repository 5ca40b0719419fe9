"""From options to the network, the objective, the optimizer and the length of a run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train_svi
from benchmarks.durability import differences
from elbo import FreeBitsELBO, ImportanceWeightedELBO
from ladder_vae.networks.blocks import Merge, ResidualBlock
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.run import Run
from ladder_vae.training.trainer import Trainer
from tests.commands import refusal, run, words
from tests.tiny_runs import LADDER, RESUME, stopping, train, training_entries

pytestmark = pytest.mark.usefixtures("own_folder")


def prepared(*options: str) -> Trainer:
    """A run that is ready to train, without a folder."""
    arguments = train_svi.parse_arguments([*LADDER, "--steps", "1", "--dry-run", *options])
    trainer, folder = train_svi.prepare(arguments)
    assert folder is None
    return trainer


# --- The network ---


def test_the_first_batch_sets_the_initial_weights() -> None:
    """With --data-dep-init each channel of a convolution has mean 0 and deviation 0.1."""

    def first_convolution(option: str) -> torch.Tensor:
        trainer = prepared(option)
        with torch.no_grad():
            y = trainer.loss_fn.guide.bottom_up.stem[0](trainer.batches(0))
        return torch.stack([y.mean((0, 2, 3)), y.std((0, 2, 3))])

    expected = torch.tensor([[0.0], [0.1]]).expand(2, 4)
    assert_close(first_convolution("--data-dep-init"), expected, rtol=1e-2, atol=1e-4)
    difference = first_convolution("--no-data-dep-init") - expected
    assert (difference.abs() > 0.05).any(1).all()


def test_options_of_the_network_shape_it() -> None:
    plain: Any = prepared().loss_fn
    assert any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert plain.guide.bottom_up.stem[0].stride == (1, 1)
    assert type(plain.guide.posteriors[0].merge.residual) is ResidualBlock

    bare: Any = prepared(
        *words("--no-bn --dropout 0 --merge-layers linear --no-gated --no-skip"),
        *words("--initial-downscaling --nonlin selu --residual-type cabdcabd"),
    ).loss_fn
    kinds = {type(m) for m in bare.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.Dropout2d, nn.ELU}
    assert type(bare.guide.posteriors[0].merge.residual) is nn.Identity
    assert len([m for m in bare.model.modules() if isinstance(m, Merge)]) == 0
    assert bare.guide.bottom_up.stem[0].stride == (2, 2)
    block = bare.model.layers[0].blocks[0].block
    assert [type(m) for m in block] == [nn.Conv2d, nn.SELU, nn.Conv2d, nn.SELU]

    asymmetric: Any = prepared("--residual-type", "bacdbac", "--no-gated").loss_fn
    first, second = ([nn.BatchNorm2d, nn.ELU, nn.Conv2d, *d] for d in ([nn.Dropout2d], []))
    assert [type(m) for m in asymmetric.model.layers[0].blocks[0].block] == first + second


@pytest.mark.parametrize(
    ("option", "learned"), [("--learn-top-prior", True), ("--no-learn-top-prior", False)]
)
def test_the_top_prior_is_learned_or_fixed(option: str, learned: bool) -> None:
    trainer = prepared(option)
    prior: Any = trainer.loss_fn.model.top_prior.mean_log_variance
    assert prior.requires_grad is learned
    trained = [p for group in trainer.svi.optimizer.param_groups for p in group["params"]]
    assert any(p is prior for p in trained) is learned


# --- Objective and optimizer ---


def test_options_of_the_objective_and_the_optimizer_reach_them() -> None:
    trainer = prepared(
        *words("--wd 0.25 --lr 0.5 --analytical-kl --freebits 0.75 --grad-clip 2 --grad-skip 3"),
        *words("--ema 0.5"),
    )
    (group,) = trainer.svi.optimizer.param_groups
    assert (group["weight_decay"], group["lr"]) == (0.25, 0.5)
    assert trainer.svi.elbo.analytic_kl
    assert trainer.svi.elbo.free_bits == 0.75
    assert (trainer.svi.clip_norm, trainer.svi.guard.skip_norm) == (2, 3)
    assert trainer.average is not None
    assert trainer.average.decay == 0.5
    assert trainer.evaluated_module() is trainer.average.module
    assert prepared("--ema", "0").average is None


def test_the_kl_weight_is_annealed() -> None:
    """From 0 over --beta-anneal steps; the loss is weighted with it."""
    options = words("--steps 6 --beta-anneal 4 --freebits 0 --tr-log-interv 1 --ts-log-interv 0")
    assert train(*LADDER, *options, "--out", "run") == 0
    logged = training_entries("run")
    weights = [entry["train/kl_weight"] for entry in logged]
    assert weights == [0, 0.25, 0.5, 0.75, 1, 1]
    for entry, weight in zip(logged, weights, strict=True):
        expected = entry["train/reconstruction"] + weight * entry["train/kl"]
        assert entry["train/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_training_with_particles(objective: str) -> None:
    """The objective reaches the step, and the loss falls; log entries average over particles."""
    options = words(f"--objective {objective} --particles 3 --freebits 0 --beta-anneal 0 --lr 1e-2")
    trainer = prepared(*options)
    assert type(trainer.svi.elbo) is (
        ImportanceWeightedELBO if objective == "iwae" else FreeBitsELBO
    )
    assert trainer.svi.elbo.num_particles == 3
    more = words("--steps 40 --tr-log-interv 10 --ts-log-interv 0 --ll-interv 0 --lr-warmup 0")
    assert train(*LADDER, *options, *more, "--out", "run") == 0
    logged = training_entries("run")
    assert logged[-1]["train/loss"] < 0.9 * logged[0]["train/loss"]
    for entry in logged:
        negative_elbo = entry["train/reconstruction"] + entry["train/kl"]
        if objective == "elbo":
            assert entry["train/loss"] == pytest.approx(negative_elbo, rel=1e-5)
        else:  # a tighter bound
            assert entry["train/loss"] < negative_elbo


def test_options_that_iwae_ignores_are_refused() -> None:
    """The preset's free bits too: its objective has no KL term."""
    iwae = [*LADDER, "--steps", "1", "--dry-run", *words("--objective iwae --beta-anneal 0")]
    assert "--particles is 1; iwae needs at least 2" in refusal(train_svi.main, *iwae)
    line = refusal(train_svi.main, *iwae, *words("--particles 2"))
    assert "--freebits has no effect with iwae, whose bound has no KL term" in line


ELBO_THEN_BOUND = words("--objective iwae --particles 3 --elbo-share 0.5 --freebits 0.75")


def test_the_bound_replaces_the_elbo_within_a_run() -> None:
    """After `elbo_share` of the steps; until then the ELBO has one sample, and its own options."""
    trainer = prepared(*ELBO_THEN_BOUND, *words("--steps 4 --analytical-kl --beta-anneal 2"))
    trainer.loss_fn.train()
    objectives = []
    for _ in range(4):
        trainer.take_step()
        assert trainer.loss_fn.elbo is trainer.svi.elbo
        objectives.append(trainer.svi.elbo)
    assert [type(o) for o in objectives] == [FreeBitsELBO] * 2 + [ImportanceWeightedELBO] * 2
    first, last = objectives[0], objectives[-1]
    assert (first.num_particles, first.free_bits, first.analytic_kl) == (1, 0.75, True)
    assert last.num_particles == 3


def test_the_loss_becomes_that_of_the_bound() -> None:
    """Free bits raise the ELBO's loss; the bound is tighter than the ELBO."""
    options = words("--steps 6 --beta-anneal 0 --tr-log-interv 1 --ts-log-interv 0 --ll-interv 0")
    result = run(train_svi.main, *LADDER, *ELBO_THEN_BOUND, *options, *words("--out run"))
    assert (
        "maximises the ELBO for 50% of the run, and then the importance-weighted bound with 3 "
        "samples, whose steps take longer\n"
    ) in result.out
    logged = training_entries("run")
    assert all(e["train/loss"] >= e["train/negative_elbo"] for e in logged[:3])
    assert all(e["train/loss"] < e["train/negative_elbo"] for e in logged[3:])


@pytest.mark.parametrize("stop", [2, 4])
def test_the_bound_resumes_to_the_same_result(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, from either side of the change of objective."""
    options = (*LADDER, *ELBO_THEN_BOUND, "--steps", 6)
    assert train(*options, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stopping(patch, lambda step: step == stop)
        assert train(*options, "--out", "run") == 143
    assert train(*RESUME) == 0
    assert differences(Path("whole"), Path("run")) == []


def test_a_share_for_the_elbo_needs_the_bound_and_a_length() -> None:
    dry = [*LADDER, "--dry-run", "--elbo-share", "0.5"]
    line = refusal(train_svi.main, *dry, "--steps", "1")
    assert "--elbo-share has no effect without iwae: set it to 0, or --objective to iwae" in line
    iwae = words("--objective iwae --particles 2 --steps 0 --lr-decay none")
    line = refusal(train_svi.main, *dry, *iwae)
    assert "--elbo-share needs the run's length: give --steps, --epochs or --max-minutes" in line


def test_free_bits_only_increase_the_loss() -> None:
    options = words("--steps 6 --beta-anneal 0 --freebits 2 --tr-log-interv 1 --ts-log-interv 0")
    assert train(*LADDER, *options, "--out", "run") == 0
    assert all(e["train/loss"] >= e["train/negative_elbo"] for e in training_entries("run"))


# --- Data ---


def test_a_validation_set_keeps_the_test_set_unseen() -> None:
    result = run(train_svi.main, *LADDER, *words("--train-split train --steps 2 --out run"))
    assert "1,200 images of digits (train)" in result.out
    assert "step 2: valid ELBO" in result.err
    (entry,) = read_entries(Path("run/metrics.jsonl"))
    assert {tag.partition("/")[0] for tag in entry} - {"step", "time"} == {
        "valid",
        "valid_kl",
        "valid_active_channels",
    }


# --- The length of a run ---


def test_epochs_are_counted_in_whole_batches() -> None:
    """1,500 images make two batches of 700; the rest is dropped."""
    options = words("--batch-size 700 --steps 0 --epochs 3 --ts-log-interv 0 --ll-interv 0")
    assert train(*LADDER, *options, "--out", "run") == 0
    assert Run.open(Path("run")).checkpoint_steps() == [6]


def test_minutes_limit_a_run() -> None:
    assert train(*LADDER, *words("--steps 0 --max-minutes 0.01 --tr-log-interv 1 --out run")) == 0
    found = Run.open(Path("run"))
    step = found.checkpoint_steps()[-1]
    assert found.load_checkpoint(step, torch.device("cpu"))["minutes"] >= 0.01
    last = [e for e in read_entries(Path("run/metrics.jsonl")) if "test/negative_elbo" in e][-1]
    assert last["step"] == step >= 1


def test_a_run_is_described_before_it_starts() -> None:
    result = run(train_svi.main, *LADDER, *words("--steps 1 --ts-log-interv 0 --out run"))
    assert re.search(r"2 layers, [\d,]+ parameters, on cpu; 1,500 images of digits", result.out)
    assert "run folder run; to monitor it: tensorboard --logdir run" in result.out
