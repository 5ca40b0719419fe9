"""The files of an evaluation: metrics, arrays, pictures and report."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from datasets import ImageSet
from ladder_vae.evaluation.annealed import Annealed
from ladder_vae.evaluation.importance import Bounds
from ladder_vae.evaluation.interfaces import Guide, Model
from ladder_vae.evaluation.metrics import write_per_image
from ladder_vae.evaluation.scoring import ProgressFile
from ladder_vae.reports.figures import draw_album, draw_charts
from ladder_vae.reports.html import write_evaluation_report
from ladder_vae.runs.run import Run
from runtime.files import write_json


class Evaluation(NamedTuple):
    """The results of an evaluation."""

    metrics: dict[str, Any]  # the content of metrics.json
    bounds: Bounds
    annealed: Annealed | None
    progress: list[ProgressFile]  # to remove when the results are saved


def write_evaluation(
    folder: Path,
    run: Run,
    model: Model,
    guide: Guide,
    images: ImageSet,
    index: Tensor,
    found: Evaluation,
) -> None:
    """Write the files of an evaluation of the images at `index`."""
    results = found.metrics
    draw_charts(folder, found.bounds, results)
    settings = {name: results[name] for name in ("temperature", "batch_size", "seed")}
    draw_album(folder, model, guide, run.config.ladder, images, **settings)
    write_per_image(folder / "per_image.npz", found.bounds, index, found.annealed)
    write_json(folder / "metrics.json", results)
    write_evaluation_report(folder, run, results)
