"""Evaluate a trained ladder VAE: bounds on the log-likelihood, and pictures.

    python evaluate.py runs/mnist-12 --samples 1 100 1000
    torchrun --nproc-per-node 8 evaluate.py runs/mnist-12 --samples 1 100 1000

Prints a table of negative bounds (lower is better) and writes metrics, pictures and a report into
RUN/eval/STEP/, or into a folder beside it for other settings than the default. The same command
resumes an interrupted evaluation.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import datasets
from datasets import ImageSet
from datasets.folder import load_folder
from ladder import Ladder
from ladder_vae.evaluation.folders import check_replaceable, evaluation_folder
from ladder_vae.evaluation.importance import Blocks, Bounds, ImportanceSampler, random_index
from ladder_vae.evaluation.metrics import Metrics, curve_samples, metrics, write_per_image
from ladder_vae.evaluation.options import (
    add_bound_options,
    add_ladder_options,
    add_temperature_option,
    parse,
)
from ladder_vae.evaluation.sampling import check_temperature
from ladder_vae.evaluation.scoring import ProgressFile, fingerprint, score
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.networks.precision import Execution
from ladder_vae.reports.figures import draw_album, draw_charts
from ladder_vae.reports.html import weights_in_words, write_evaluation_report
from ladder_vae.reports.tables import summary
from ladder_vae.runs.command_line import OneLineParser, as_user_errors
from ladder_vae.runs.provenance import commit, provenance
from ladder_vae.runs.run import Run
from runtime.device import choose_device, enough_memory, keep_freed_memory
from runtime.distributed import Ranks, joined_ranks
from runtime.errors import UserError, run_command
from runtime.files import write_json

# What to do after an interruption, or after one of several processes has died.
ADVICE = "; the same command continues the evaluation"


class EvaluatedLadder(Ladder):
    """A ladder with its run's options and data."""

    @cached_property
    def run(self) -> Run:
        """The run that trained the ladder."""
        path = self.source.path
        file = path if path.is_file() else path / "config.json"
        return Run.from_description(path, self.source.description.content, file)

    def images(self, split: str, data_dir: str | Path, dataset: str | None = None) -> ImageSet:
        """A split of the run's data set, or of another one, on the ladder's device.

        Raises `UserError` if the ladder is not for such images.
        """
        data = dataset or self.run.config.data
        shape = datasets.image_shape(data)  # known without a download
        if shape != self.image_shape:
            raise UserError(
                f"{self.run.path} is a run on images {self.image_shape}, "
                f"but those of {dataset or self.run.config.dataset} are {shape}"
            )
        if self._is_binary and not datasets.is_binary(data):
            raise UserError(
                f"{self.run.path} is a run on binary images, but those of {dataset} have 256 levels"
            )
        return datasets.load(data, split, data_dir).to(self.device)

    def images_in(self, folder: Path) -> tuple[ImageSet, list[str]]:
        """The images in a folder, on the ladder's device, and the names of their files.

        Raises `UserError` if the ladder is not for such images.
        """
        images, names = load_folder(folder, self.image_shape, binary=self._is_binary)
        return images.to(self.device), names

    @property
    def _is_binary(self) -> bool:
        return datasets.is_binary(self.run.config.data)

    def score(
        self,
        images: ImageSet,
        index: Tensor,
        samples: Sequence[int],
        folder: Path,
        *,
        batch_size: int,
        seed: int,
        from_prior: int = 0,
        ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
        check: Callable[[], object] = lambda: None,
    ) -> tuple[Bounds, ProgressFile]:
        """The bounds of the images at `index`, for each K in `samples` (ascending).

        What is finished is kept in `folder`/.progress, from where an interrupted scoring resumes.
        Remove the returned progress file when the bounds are saved. `check` is called before each
        group of images, and may raise to interrupt the scoring.
        """
        sampler = ImportanceSampler(
            self.model,
            self.guide,
            images,
            index,
            samples,
            batch_size=batch_size,
            seed=seed,
            from_prior=from_prior,
            execution=self.execution,
        )
        origin = {
            "config": self.run.config.to_dict(),
            "code": commit(),
            "torch": torch.__version__,
            "device": self.device.type,
            "execution": asdict(self.execution),
        }
        key = fingerprint(nn.ModuleList([self.model, self.guide]), sampler, origin)
        progress = ProgressFile(folder / ".progress", key, sampler)
        return score(sampler, progress, ranks, check=check), progress

    def origin(self) -> dict[str, Any]:
        """What a file of metrics records about the ladder and this machine."""
        return {
            "step": self.step,
            "weights": self.source.weights,
            "precision": self.execution.precision,
            "layers": self.depth,
            "parameters": count_parameters(self.model, self.guide),
            "minutes": self.source.minutes,
            "training_seed": self.run.config.seed,
            "trained": self.run.provenance,
            "provenance": provenance(self.device),
        }


def evaluate(
    ladder: EvaluatedLadder,
    images: ImageSet,
    folder: Path,
    *,
    samples: Sequence[int] = (1, 100),
    batch_size: int | None = None,
    seed: int = 0,
    temperature: float | Sequence[float] = 1.0,
    limit: int | None = None,
    overwrite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    check: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Compute bounds, and write metrics.json, per_image.npz, pictures and report.html.

    Args:
        ladder: the ladder to evaluate.
        images: a split of a data set.
        folder: where to write.
        samples: the numbers K of importance samples, ascending.
        batch_size: images times samples per pass; None to choose it by network and device.
        seed: random seed of all noise, and of the images that `limit` chooses.
        temperature: factor on the prior's standard deviations in samples.png, for all layers or
            for each from the bottom.
        limit: number of random images to evaluate; None for all.
        overwrite: replace an evaluation with other settings in `folder`.
        ranks: the processes that share the work; the first one writes.
        check: called before each group of images; may raise to interrupt the evaluation, which
            the same call resumes.

    Returns the content of metrics.json, in every process. Raises `UserError` if the folder holds an
    evaluation with other settings.
    """
    check_temperature(temperature, ladder.depth)
    index = choose_images(images, limit, seed)
    size: int = batch_size or ranks.share(ladder.batch_size)
    settings = {
        **{"dataset": images.name, "split": images.split, "seed": seed, "limit": limit},
        **{"samples": list(samples), "temperature": temperature, "batch_size": size},
        "blocks": asdict(Blocks.of(size, samples[-1])),
        **ladder.origin(),
    }
    with ranks.together():
        if ranks.is_first and not overwrite:
            check_replaceable(folder, settings)
    options: dict[str, Any] = {"batch_size": size, "seed": seed, "ranks": ranks, "check": check}
    bounds, progress = ladder.score(images, index, curve_samples(samples), folder, **options)
    likelihood = ladder.run.config.ladder.likelihood
    results = (
        metrics(bounds, samples, images.shape, likelihood) | settings | {"levels": images.levels}
    )
    if ranks.is_first:
        draw_charts(folder, bounds, results)
        draw_pictures(ladder, images, folder, temperature, size, seed)
        write_per_image(folder / "per_image.npz", bounds, index)
        write_json(folder / "metrics.json", results)
        write_evaluation_report(folder, ladder.run, results)
        progress.remove()
    return results


def draw_pictures(
    ladder: EvaluatedLadder,
    images: ImageSet,
    folder: Path,
    temperature: float | Sequence[float],
    batch_size: int,
    seed: int,
) -> None:
    """Draw samples, reconstructions and what each layer encodes; see `evaluate`."""
    draw_album(
        folder,
        ladder.model,
        ladder.guide,
        ladder.config,
        images,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )


def choose_images(images: ImageSet, limit: int | None, seed: int) -> Tensor:
    """The indices of `limit` random images, or of all if None; `UserError` if there are fewer."""
    if limit is not None and limit > len(images):
        raise UserError(f"--limit is {limit} but {images.split} has only {len(images)} images")
    return random_index(len(images), limit or len(images), seed)


# --- The command line ---


def load_ladder(arguments: argparse.Namespace, local_rank: int = 0) -> EvaluatedLadder:
    """The ladder that the options of `add_ladder_options` choose."""
    device = choose_device(arguments.device, local_rank)
    precision = getattr(arguments, "precision", "float32")
    with as_user_errors():
        execution = Execution.choose(precision, arguments.compile, device)
    ladder = EvaluatedLadder.load(
        arguments.run,
        checkpoint=arguments.checkpoint,
        device=device,
        average=arguments.average,
        execution=execution,
    )
    if arguments.out is None and not ladder.source.path.is_dir():
        raise UserError(f"{arguments.run} is a file, so there is no folder for results: add --out")
    return ladder


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="evaluate.py",
        description="Compute bounds on the log-likelihood of a trained ladder VAE, and draw "
        "pictures of what it has learned.",
    )
    add_ladder_options(parser)
    add_bound_options(parser)
    add_temperature_option(parser, " in samples.png")
    return parse(parser, argv)


def print_results(ladder: EvaluatedLadder, results: dict[str, Any], folder: Path) -> None:
    """Print the table of bounds and the paths of the files."""
    split = results["split"]
    print(
        f"{results['dataset']}, {results['n_images']:,} {split} images, step {ladder.step:,}, "
        f"{weights_in_words(ladder.source.weights)}"
    )
    print(summary(Metrics.from_dict(results)))
    if results["warning"] is not None:
        print(f"warning   {results['warning']}")
    print(f"metrics   {folder / 'metrics.json'}, {folder / 'per_image.npz'}")
    print(f"report    {folder / 'report.html'}")
    if seen := set(split.split("+")) & set(ladder.run.config.train_split.split("+")):
        print(f"note      the run was trained on {' and '.join(sorted(seen))} images")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    keep_freed_memory()
    memory = enough_memory("give a smaller number to --batch-size")
    with pyro.validation_enabled(False), joined_ranks(ADVICE) as ranks, memory:
        ladder = load_ladder(arguments, ranks.local_rank)
        given = arguments.temperature
        temperature = given if len(given) > 1 else given[0]
        check_temperature(temperature, ladder.depth)  # before a possible download
        folder = arguments.out or evaluation_folder(
            ladder.source.path,
            ladder.step,
            arguments.split,
            limit=arguments.limit,
            seed=arguments.seed,
            samples=arguments.samples,
            temperature=given,
        )
        results = evaluate(
            ladder,
            ladder.images(arguments.split, arguments.data_dir),
            folder,
            samples=arguments.samples,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            temperature=temperature,
            limit=arguments.limit,
            overwrite=arguments.overwrite,
            ranks=ranks,
        )
        if ranks.is_first:
            print_results(ladder, results, folder)
    return 0


if __name__ == "__main__":
    run_command(main, ADVICE)
