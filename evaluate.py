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
from ladder_vae.evaluation.annealed import Annealed, AnnealedSampler, Annealer, Annealing
from ladder_vae.evaluation.folders import check_replaceable, evaluation_folder
from ladder_vae.evaluation.groups import Found, Sampler
from ladder_vae.evaluation.importance import Blocks, Bounds, ImportanceSampler
from ladder_vae.evaluation.metrics import Metrics, annealed_metrics, curve_samples, metrics
from ladder_vae.evaluation.options import (
    add_annealing_options,
    add_bound_options,
    add_ladder_options,
    add_temperature_option,
    annealing_of,
    choose_images,
    parse,
)
from ladder_vae.evaluation.sampling import check_temperature
from ladder_vae.evaluation.sandwich import sandwiched
from ladder_vae.evaluation.scoring import ProgressFile, fingerprint, score
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.networks.precision import Execution
from ladder_vae.reports.evaluation_files import Evaluation, write_evaluation
from ladder_vae.reports.tables import summary
from ladder_vae.runs.command_line import OneLineParser, as_user_errors
from ladder_vae.runs.provenance import commit, provenance
from ladder_vae.runs.run import Run
from runtime.device import choose_device, enough_memory, keep_freed_memory
from runtime.distributed import Ranks, joined_ranks
from runtime.errors import UserError, run_command

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
        return self._scored(sampler, folder, ranks, check)

    def anneal(
        self,
        images: ImageSet,
        index: Tensor,
        annealing: Annealing,
        folder: Path,
        *,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        check: Callable[[], object],
    ) -> tuple[Annealed, dict[str, Any], list[ProgressFile]]:
        """Annealed bounds of the images at `index`, with their entries of metrics.json."""
        finished: list[ProgressFile] = []

        def scored(sampler: AnnealedSampler) -> Annealed:
            found, progress = self._scored(sampler, folder, ranks, check)
            finished.append(progress)
            return found

        annealer = Annealer(self.model, self.guide, batch_size, seed, self.execution, scored)
        annealed = annealer.bounds(images, index, annealing)
        ais = annealed_metrics(annealed, annealing, images.shape, self.config.likelihood)
        entries = {"ais": ais}
        if annealing.generated is not None:
            entries["sandwich"] = sandwiched(annealer, annealing)
        return annealed, entries, finished

    def _scored(
        self, sampler: Sampler[Found], folder: Path, ranks: Ranks, check: Callable[[], object]
    ) -> tuple[Found, ProgressFile]:
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
    annealing: Annealing | None = None,
    overwrite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    check: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Compute bounds, and write metrics.json, per_image.npz, pictures and report.html.

    Args:
        images: a split of a data set.
        samples: the numbers K of importance samples, ascending.
        batch_size: images times samples per pass; None to choose it by network and device.
        seed: random seed of all noise, and of the images that `limit` chooses.
        temperature: factor on the prior's standard deviations in samples.png (`Ladder.sample`).
        limit: number of random images to evaluate; None for all.
        annealing: also compute annealed bounds.
        overwrite: replace an evaluation with other settings in `folder`.
        ranks: the processes that share the work; the first one writes.
        check: called before each group of images; may raise, and the same call then resumes.

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
        "annealing": annealing
        and asdict(annealing)
        | {"batch_size": batch_size or ranks.share(ladder.annealing_batch_size)},
        **ladder.origin(),
    }
    with ranks.together():
        if ranks.is_first and not overwrite:
            check_replaceable(folder, settings)
    found = computed(ladder, images, index, settings, annealing, folder, ranks, check)
    if ranks.is_first:
        write_evaluation(folder, ladder.run, ladder.model, ladder.guide, images, index, found)
        for progress in found.progress:
            progress.remove()
    return found.metrics


def computed(
    ladder: EvaluatedLadder,
    images: ImageSet,
    index: Tensor,
    settings: dict[str, Any],
    annealing: Annealing | None,
    folder: Path,
    ranks: Ranks,
    check: Callable[[], object],
) -> Evaluation:
    """All bounds of the images at `index`."""
    options: dict[str, Any] = {"seed": settings["seed"], "ranks": ranks, "check": check}
    size, samples = settings["batch_size"], settings["samples"]
    curve = curve_samples(samples)
    bounds, progress = ladder.score(images, index, curve, folder, batch_size=size, **options)
    results = metrics(bounds, samples, images.shape, ladder.config.likelihood)
    results |= settings | {"levels": images.levels}
    if annealing is None:
        return Evaluation(results, bounds, None, [progress])
    size = settings["annealing"]["batch_size"]
    annealed, entries, more = ladder.anneal(
        images, index, annealing, folder, batch_size=size, **options
    )
    return Evaluation(results | entries, bounds, annealed, [progress, *more])


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
    add_annealing_options(parser)
    add_temperature_option(parser, " in samples.png")
    return parse(parser, argv)


def print_results(ladder: EvaluatedLadder, results: dict[str, Any], folder: Path) -> None:
    """Print the table of bounds and the paths of the files."""
    print(summary(Metrics.from_dict(results)))
    print(f"metrics   {folder / 'metrics.json'}, {folder / 'per_image.npz'}")
    print(f"report    {folder / 'report.html'}")
    if seen := set(results["split"].split("+")) & set(ladder.run.config.train_split.split("+")):
        print(f"note      the run was trained on {' and '.join(sorted(seen))} images")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    annealing = annealing_of(arguments)
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
            annealing=annealing,
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
            annealing=annealing,
            overwrite=arguments.overwrite,
            ranks=ranks,
        )
        if ranks.is_first:
            print_results(ladder, results, folder)
    return 0


if __name__ == "__main__":
    run_command(main, ADVICE)
