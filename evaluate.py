"""Score a trained ladder VAE by importance sampling, and draw what it has learned.

    python evaluate.py runs/mnist-12 --samples 1 100 1000
    torchrun --nproc-per-node 8 evaluate.py runs/mnist-12 --samples 1 100 1000
    python evaluate.py runs/mnist-12 --inpaint bottom
    python evaluate.py runs/mnist-12 --score static_mnist --against my/pictures
    python evaluate.py --compare runs/mnist-3 runs/mnist-12

Prints a table of negative bounds on the log-likelihood (lower is better) and writes figures,
pictures and a report into RUN/eval/STEP/. Broken off, the same command continues.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

import datasets
from datasets import ImageSet
from datasets.folder import load_folder
from elbo import FreeBitsELBO
from guide import LadderGuide, build_ladder
from ladder_vae.evaluation.batch_size import automatic_batch_size
from ladder_vae.evaluation.importance import Blocks, Bounds, ImportanceSampler, random_index
from ladder_vae.evaluation.inpainting import MASKS, inpaint, read_mask, write_completions
from ladder_vae.evaluation.metrics import curve_samples, metrics, table, write_per_image
from ladder_vae.evaluation.ood import (
    Roc,
    bound_columns,
    is_ratio,
    outlier_scores,
    roc,
    write_scores,
)
from ladder_vae.evaluation.sampling import check_temperature
from ladder_vae.evaluation.scoring import Ledger, fingerprint, score
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.networks.precision import COMPILE, PRECISIONS, Execution
from ladder_vae.reports.charts import draw_roc
from ladder_vae.reports.comparison import Scored, compare, evaluation_folder
from ladder_vae.reports.figures import draw_album, draw_charts, draw_completions
from ladder_vae.reports.report import evaluation_report, ladder_pictures
from ladder_vae.runs.checkpoint import load_weights
from ladder_vae.runs.command_line import OneLineParser
from ladder_vae.runs.provenance import commit, provenance
from ladder_vae.runs.run import Run
from model import LadderModel
from runtime.device import choose_device, keep_freed_memory
from runtime.distributed import Ranks, joined_ranks
from runtime.errors import UserError, run_command
from runtime.files import write_json, writing

# Of --inpaint: images, chains of each, and sweeps of each chain, a fifth of them warm-up.
INPAINTED, CHAINS, SWEEPS = 8, 6, 100
# The modes that make use of an option; of one not listed, all but --compare.
_USERS = {
    "samples": ("evaluate", "score"),
    "precision": ("evaluate", "score"),
    "temperature": ("evaluate",),
    "sweeps": ("inpaint",),
    "chains": ("inpaint",),
    "against": ("score",),
    "prior_layers": ("score",),
}


@dataclass(frozen=True)
class Trained:
    """A model and guide in evaluation mode, with the weights of a checkpoint."""

    model: LadderModel
    guide: LadderGuide
    step: int
    weights: str  # "average" or "last"
    minutes: float | None  # of training; None for imported weights

    @classmethod
    def load(
        cls,
        run: Run,
        step: int | None,
        device: torch.device,
        *,
        average: bool,
        execution: Execution = Execution(),  # noqa: B008 (cannot change)
    ) -> "Trained":
        """From the checkpoint of `step`, or the newest; its moving average where there is one."""
        state = run.load_checkpoint(step, device)
        model, guide = build_ladder(run.config.ladder, run.image_shape)
        module: Any = FreeBitsELBO()(model, guide).to(device).eval()
        use_average = average and state["average"] is not None
        load_weights(module, state["average"]["weights"] if use_average else state["weights"])
        if not all(tensor.isfinite().all() for tensor in module.state_dict().values()):
            raise UserError(
                f"the weights of step {state['step']} are not all finite, the training diverged: "
                "give an earlier step to --checkpoint"
            )
        execution.prepare(module)
        weights = "average" if use_average else "last"
        return cls(model, guide, state["step"], weights, state["minutes"])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="evaluate.py",
        description="Score a trained ladder VAE by importance sampling.",
    )
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help="run folder of train_svi.py"
    )
    parser.add_argument("--checkpoint", metavar="STEP", help="step, best or last (default: last)")
    parser.add_argument(
        "--average",
        action=argparse.BooleanOptionalAction,
        help="use the moving average of the weights where the run has one (default: yes)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        metavar="K",
        help="numbers of importance samples, rising (default: 1 100)",
    )
    parser.add_argument("--split", choices=datasets.SPLITS, help="images to score (default: test)")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"take N random images (default: the whole split; {INPAINTED} to --inpaint)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        help="factor on the standard deviations of the prior in samples.png, one for all layers "
        "or one for each, bottom to top (default: 1)",
    )
    modes = parser.add_argument_group("instead of scoring the run's own images")
    modes.add_argument(
        "--inpaint",
        metavar="MASK",
        help=f"complete images: {', '.join(MASKS)}, or an image file, white where to complete",
    )
    modes.add_argument("--sweeps", type=int, metavar="N", help=f"of --inpaint (default: {SWEEPS})")
    modes.add_argument(
        "--chains", type=int, metavar="N", help=f"completions of an image (default: {CHAINS})"
    )
    modes.add_argument(
        "--score", metavar="IMAGES", help="write the bounds of a data set, or of a folder of images"
    )
    modes.add_argument(
        "--against",
        metavar="IMAGES",
        help="score these too, and tell how well the scores tell them from those of --score",
    )
    modes.add_argument(
        "--prior-layers",
        type=int,
        nargs="+",
        metavar="K",
        help="score also with the lowest K layers drawn from their priors, and give the "
        "difference (default: half of the layers)",
    )
    modes.add_argument(
        "--compare", type=Path, nargs="+", metavar="RUN", help="print one table of several runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: RUN/eval/STEP, or STEP-SPLIT for another split than test; "
        "the current folder for --compare)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images times samples per pass (default: by the network and the memory)",
    )
    parser.add_argument(
        "--seed", type=int, help="of all noise and of --limit's choice (default: 0)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the networks; tf32 (on a GPU) and bf16 are faster, and bf16 changes bounds of "
        "digits by up to a tenth of a nat (default: float32)",
    )
    parser.add_argument(
        "--compile",
        choices=COMPILE,
        help="compile the residual blocks, which takes a minute at the start; auto: on a GPU "
        "(default: auto)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="where the data sets are kept (default: LVAE_DATA in the environment, or data/)",
    )
    arguments = parser.parse_args(argv)
    arguments.mode = mode_of(arguments)
    for name, default in defaults().items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    check_arguments(arguments)
    return arguments


def defaults() -> dict[str, Any]:
    """Of the options that have one; while parsing, what was not given is None."""
    return {
        "checkpoint": "last",
        "average": True,
        "samples": [1, 100],
        "split": "test",
        "temperature": [1.0],
        "sweeps": SWEEPS,
        "chains": CHAINS,
        "seed": 0,
        "device": "auto",
        "precision": "float32",
        "compile": "auto",
        "data_dir": Path(os.environ.get("LVAE_DATA", "data")),
    }


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for values that make no sense."""
    samples = arguments.samples
    if samples[0] < 1 or any(a >= b for a, b in itertools.pairwise(samples)):
        raise UserError(
            f"--samples is {' '.join(map(str, samples))}; it must be positive numbers that rise"
        )
    for name, least in {"limit": 1, "batch_size": 1, "chains": 1, "sweeps": 2}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}; it must be at least 0 and below 2**63")


def mode_of(arguments: argparse.Namespace) -> str:
    """What is asked for: "evaluate", "inpaint", "score" or "compare".

    Raises `UserError` for two things at a time, and for options that would do nothing.
    """
    modes = ("inpaint", "score", "compare")
    asked = [mode for mode in modes if getattr(arguments, mode) is not None]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two things; ask for one at a time")
    mode = asked[0] if asked else "evaluate"
    if mode == "compare" and arguments.run is not None:
        raise UserError(f"give all runs behind --compare, {arguments.run} too")
    if mode != "compare" and arguments.run is None:
        raise UserError("RUN is missing: give the run folder of train_svi.py (see --help)")
    from_folders = mode == "score" and {arguments.score, arguments.against}.isdisjoint(
        datasets.NAMES
    )
    if from_folders and arguments.split is not None:
        raise UserError("--split does nothing with images of a folder; leave it out")
    images = "give a data set or a folder of images"
    for name, wanted in {"inpaint": "give a mask", "score": images, "against": images}.items():
        if getattr(arguments, name) == "":
            raise UserError(f"--{name} is empty; {wanted}")
    for name, value in vars(arguments).items():
        users = _USERS.get(name, ("evaluate", "inpaint", "score"))
        if value is None or name in ("run", "out", *asked) or mode in users:
            continue
        option = f"--{name.replace('_', '-')}"
        if mode == "evaluate":
            raise UserError(f"{option} goes with --{users[0]}, which is not given")
        raise UserError(f"{option} does nothing with --{mode}; leave it out")
    return mode


class Evaluation:
    """The checkpoint that the command line names, and how it is to be evaluated.

    `check` is called now and then while images are scored, and may raise to break off.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        ranks: Ranks,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self.arguments = arguments
        self.ranks = ranks
        self.check = check
        self.device = choose_device(arguments.device, ranks.local_rank)
        self.run = Run.open(arguments.run)
        step = self.run.step_called(arguments.checkpoint)
        self.execution = Execution.choose(arguments.precision, arguments.compile, self.device)
        self.trained = Trained.load(
            self.run, step, self.device, average=arguments.average, execution=self.execution
        )
        self.folder: Path = arguments.out or evaluation_folder(
            self.run.path, self.trained.step, arguments.split
        )
        # How many image-sample pairs go through the network at a time, on every rank.
        self.batch_size: int = arguments.batch_size or ranks.share(
            automatic_batch_size(
                self.run.config.ladder,
                self.trained.guide,
                torch.zeros(1, *self.run.image_shape, device=self.device),
            )
        )

    def load(self, name: str) -> tuple[ImageSet, Sequence[str] | None]:
        """A data set's split or the images of a folder, and the names of the latter's files.

        Raises `UserError` for images that the model is not of.
        """
        run, arguments = self.run, self.arguments
        binary = datasets.is_binary(run.config.dataset)
        if name not in datasets.NAMES:
            images, names = load_folder(Path(name), run.image_shape, binary=binary)
            return images.to(self.device), names
        shape = datasets.image_shape(name)  # known before anything is downloaded
        if shape != run.image_shape:
            raise UserError(f"{run.path} is of images {run.image_shape}, {name} has {shape}")
        if binary and not datasets.is_binary(name):
            raise UserError(f"{run.path} is of binary images, those of {name} have 256 levels")
        return datasets.load(name, arguments.split, arguments.data_dir).to(self.device), None

    def index(self, images: ImageSet, default: int | None = None) -> Tensor:
        """The images that are asked for: all, or a random few."""
        limit = self.arguments.limit or default or len(images)
        if self.arguments.limit and limit > len(images):
            raise UserError(f"--limit is {limit} but {images.split} has {len(images)} images")
        return random_index(len(images), limit, self.arguments.seed)

    def score(
        self, images: ImageSet, samples: Sequence[int], from_prior: int = 0
    ) -> tuple[Bounds, Ledger]:
        """The bounds of the images, and the ledger to remove once they are written."""
        sampler = ImportanceSampler(
            self.trained.model,
            self.trained.guide,
            images,
            self.index(images),
            samples,
            batch_size=self.batch_size,
            seed=self.arguments.seed,
            from_prior=from_prior,
            execution=self.execution,
        )
        modules = nn.ModuleList([self.trained.model, self.trained.guide])
        origin = {
            "config": self.run.config.to_dict(),
            "code": commit(),
            "torch": torch.__version__,
            "device": self.device.type,
            "execution": asdict(self.execution),
        }
        ledger = Ledger(self.folder / ".progress", fingerprint(modules, sampler, origin), sampler)
        return score(sampler, ledger, self.ranks, check=self.check), ledger

    def origin(self) -> dict[str, Any]:
        """What a file of figures says of the weights and of how they were scored."""
        return {
            "step": self.trained.step,
            "weights": self.trained.weights,
            "seed": self.arguments.seed,
            "limit": self.arguments.limit,
            "batch_size": self.batch_size,
            "precision": self.execution.precision,
            "layers": len(self.run.config.ladder.z_dims),
            "parameters": count_parameters(self.trained.model, self.trained.guide),
            "minutes": self.trained.minutes,
            "training_seed": self.run.config.seed,
            "trained": self.run.provenance,
            "provenance": provenance(self.device),
        }


def evaluate(evaluation: Evaluation) -> None:
    """Score the run's images, draw its pictures, write a report, and print what was found."""
    arguments, run, trained = evaluation.arguments, evaluation.run, evaluation.trained
    depth, folder = len(run.config.ladder.z_dims), evaluation.folder
    temperature = (
        arguments.temperature if len(arguments.temperature) > 1 else arguments.temperature[0]
    )
    check_temperature(temperature, depth)
    images, _ = evaluation.load(run.config.dataset)
    bounds, ledger = evaluation.score(images, curve_samples(arguments.samples))
    if not evaluation.ranks.is_first:
        return
    blocks = Blocks.of(evaluation.batch_size, arguments.samples[-1])
    results = metrics(bounds, arguments.samples, images.shape) | {
        "dataset": images.name,
        "split": arguments.split,
        "blocks": {"images": blocks.images, "samples": blocks.samples},
        **evaluation.origin(),
    }
    draw_album(
        folder,
        trained.model,
        trained.guide,
        run.config.ladder,
        images,
        temperature=temperature,
        batch_size=evaluation.batch_size,
        seed=arguments.seed,
    )
    draw_charts(folder, bounds, results)
    write_per_image(folder / "per_image.npz", bounds, evaluation.index(images))
    write_json(folder / "metrics.json", results)
    report = evaluation_report(folder, run, results, ladder_pictures(depth))
    ledger.remove()
    weights = "moving average of the weights" if trained.weights == "average" else "last weights"
    print(
        f"{images.name}, {results['n_images']:,} {arguments.split} images, "
        f"step {trained.step:,}, {weights}"
    )
    print(table(results))
    if results["warning"] is not None:
        print(f"warning   {results['warning']}")
    print(f"figures   {folder / 'metrics.json'}, {folder / 'per_image.npz'}")
    print(f"pictures  {report}")
    seen = set(arguments.split.split("+")) & set(run.config.train_split.split("+"))
    if seen:
        print(f"note      the run was trained on {' and '.join(sorted(seen))} images")


def update_report(evaluation: Evaluation) -> None:
    """Write the report anew where there is one, with the pictures there are now."""
    folder, run = evaluation.folder, evaluation.run
    if (folder / "metrics.json").exists():
        figures = Scored.read(folder).figures
        evaluation_report(folder, run, figures, ladder_pictures(len(run.config.ladder.z_dims)))


def inpaint_images(evaluation: Evaluation) -> None:
    """Complete images of the split, and draw what was found."""
    arguments, trained = evaluation.arguments, evaluation.trained
    if not evaluation.ranks.is_first:
        return
    folder = evaluation.folder
    _, height, width = evaluation.run.image_shape
    missing = read_mask(arguments.inpaint, (height, width)).to(evaluation.device)
    images, _ = evaluation.load(evaluation.run.config.dataset)
    index = evaluation.index(images, INPAINTED)
    # Images that are binarized anew at each reading are part of the noise.
    generator = torch.Generator(images.device).manual_seed(arguments.seed)
    x = images.batch(index.to(images.index_device), generator)
    with writing(folder):  # before the chains, which take their time
        folder.mkdir(parents=True, exist_ok=True)
    chains, sweeps = arguments.chains, arguments.sweeps
    total = len(x) * chains * sweeps
    with tqdm(total=total, unit="sweep", disable=not sys.stderr.isatty()) as bar:
        completions = inpaint(
            trained.model,
            trained.guide,
            x,
            missing,
            chains=chains,
            sweeps=sweeps,
            warmup=max(1, sweeps // 5),
            batch_size=evaluation.batch_size,
            seed=arguments.seed,
            on_sweep=bar.update,
        )
    draw_completions(folder / "inpainting.png", x, missing, completions)
    write_completions(folder / "inpainting.npz", index, missing, completions)
    update_report(evaluation)
    print(
        f"{images.name}, {len(x):,} {images.split} images, {int(missing.sum()):,} of "
        f"{missing.numel():,} pixels completed by {chains} chains of {sweeps} sweeps"
    )
    print(f"accepted  {completions.acceptance.mean().item():.1%} of the proposals")
    print(f"pictures  {folder / 'inpainting.png'}")
    print(f"images    {folder / 'inpainting.npz'}")


def prior_layers(given: Sequence[int] | None, depth: int) -> list[int]:
    """How many layers to draw from their priors: as `given`, or half of them where there are more.

    Raises `UserError` for numbers that leave no layer out, or no layer above.
    """
    if given is None:
        return [depth // 2] if depth > 1 else []
    if depth == 1:
        raise UserError("--prior-layers needs a layer above them, and the ladder has but one")
    if wrong := [k for k in given if not 1 <= k < depth]:
        raise UserError(f"--prior-layers is {wrong[0]}; it must be from 1 to {depth - 1}")
    return list(given)


def score_images(evaluation: Evaluation) -> None:
    """Write the bounds of given images and, of two sets, how well they are told apart."""
    arguments, folder = evaluation.arguments, evaluation.folder
    layers = prior_layers(arguments.prior_layers, len(evaluation.run.config.ladder.z_dims))
    names = [name for name in (arguments.score, arguments.against) if name is not None]
    sets = [evaluation.load(name) for name in names]
    if len({images.name for images, _ in sets}) < len(sets):
        raise UserError(f"both sets are called {sets[0][0].name}; give --against another one")
    found, ledgers = [], []
    for images, _ in sets:
        scored = {k: evaluation.score(images, arguments.samples, k) for k in (0, *layers)}
        ledgers += [ledger for _, ledger in scored.values()]
        bounds = {k: bounds for k, (bounds, _) in scored.items()}
        found.append(bound_columns(bounds.pop(0), bounds))
    if not evaluation.ranks.is_first:
        return
    for (images, files), columns in zip(sets, found, strict=True):
        index = evaluation.index(images).tolist()
        labels = index if files is None else [files[i] for i in index]
        path = folder / f"scores-{images.name}.csv"
        write_scores(path, labels, columns)
        print(f"{images.name}, {len(index):,} {images.split} images: {path}")
        for name, values in columns.items():
            print(f"  {name:<24}{values.mean():>12.2f} nats (mean)")
    if len(sets) == 2:
        tell_apart(evaluation, [images.name for images, _ in sets], found)
    for ledger in ledgers:
        ledger.remove()


def tell_apart(
    evaluation: Evaluation, names: Sequence[str], found: Sequence[Mapping[str, np.ndarray]]
) -> None:
    """Print, draw and write how well each score tells the second set from the first."""
    folder = evaluation.folder
    inliers, outliers = (outlier_scores(columns) for columns in found)
    curves = {name: roc(inliers[name], outliers[name]) for name in inliers}
    drawn = [f"bound_{evaluation.arguments.samples[-1]}", *(n for n in curves if is_ratio(n))]
    title = f"Telling {names[1]} from {names[0]}"
    draw_roc(
        folder / "roc.png",
        {name: _points(curves[name]) for name in drawn},
        title=title,
    )
    results = {
        "inliers": names[0],
        "outliers": names[1],
        "split": evaluation.arguments.split,
        "auroc": {name: curve.auroc for name, curve in curves.items()},
        "standard_error": {name: curve.standard_error for name, curve in curves.items()},
        **evaluation.origin(),
    }
    write_json(folder / "auroc.json", results)
    update_report(evaluation)
    print(f"{title}: AUROC")
    for name, curve in curves.items():
        error = "" if curve.standard_error is None else f" ± {curve.standard_error:.4f}"
        print(f"  {name:<24}{curve.auroc:>12.4f}{error}")
    print(f"figures   {folder / 'auroc.json'}, {folder / 'roc.png'}")


def _points(curve: Roc) -> tuple[np.ndarray, np.ndarray, float]:
    return curve.false_positive_rate, curve.true_positive_rate, curve.auroc


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.mode == "compare":
        print(compare(arguments.compare, arguments.out or Path()), end="")
        return 0
    keep_freed_memory()
    advice = "; the same command continues"
    with pyro.validation_enabled(False), joined_ranks(advice) as ranks:
        evaluation = Evaluation(arguments, ranks)
        if arguments.mode == "inpaint":
            inpaint_images(evaluation)
        elif arguments.mode == "score":
            score_images(evaluation)
        else:
            evaluate(evaluation)
    return 0


if __name__ == "__main__":
    run_command(main)
