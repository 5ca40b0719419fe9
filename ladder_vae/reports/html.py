"""Interim."""
from pathlib import Path
from typing import Any
from ladder_vae.reports.report import evaluation_report, ladder_pictures
from ladder_vae.runs.run import Run

def weights_in_words(weights: str) -> str:
    return "moving average of the weights" if weights == "average" else "last weights"

def write_evaluation_report(folder: Path, run: Run, results: dict[str, Any]) -> Path:
    return evaluation_report(folder, run, results, ladder_pictures(len(run.config.ladder.z_dims)))
