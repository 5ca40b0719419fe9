"""The folder of an evaluation, named after what differs from the default settings.

RUN/eval/30                                  all test images, with the default settings
RUN/eval/30-valid-limit-10-samples-1-1000    10 validation images, with 1 and 1,000 samples
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from ladder_vae.evaluation.annealed import Annealing
from runtime.errors import UserError
from runtime.files import exists, names_in, read_json

SPLIT, SAMPLES = "test", (1, 100)
_OTHER_SPLITS = "|".join(re.escape(split) for split in datasets.SPLITS if split != SPLIT)
_NAME = re.compile(
    r"(?P<step>0|[1-9][0-9]{0,17})"
    rf"(?:-(?P<split>{_OTHER_SPLITS}))?"
    r"(?:-limit-(?P<limit>[0-9]{1,18}))?"
    r"(?:-seed-(?P<seed>[0-9]{1,19}))?"
    r"(?:-samples-(?P<samples>[0-9]{1,18}(?:-[0-9]{1,18})*))?"
    r"(?:-temperature-(?P<temperature>[0-9.e+-]+))?"
    r"(?P<annealed>(?:-ais-[0-9]{1,18}-[0-9]{1,18})?(?:-sandwich-[0-9]{1,18})?)"
)
# The entries of a metrics.json that must agree before another evaluation replaces it.
_SETTINGS = (
    *("dataset", "split", "limit", "seed", "samples", "temperature", "batch_size", "annealing"),
    *("step", "weights", "precision", "training_seed", "trained"),
)


def evaluation_folder(
    run: Path,
    step: int,
    split: str = SPLIT,
    *,
    limit: int | None = None,
    seed: int = 0,
    samples: Sequence[int] = SAMPLES,
    temperature: Sequence[float] = (1.0,),
    annealing: Annealing | None = None,
) -> Path:
    """The folder of a run's evaluation."""
    words: list[object] = [step]
    words += [split] * (split != SPLIT)
    words += ["limit", limit] * (limit is not None)
    words += ["seed", seed] * (seed != 0)
    words += ["samples", *samples] * (tuple(samples) != SAMPLES)
    words += ["temperature", *temperature] * (set(temperature) != {1.0})
    if annealing is not None:
        words += ["ais", annealing.temperatures, annealing.chains]
        words += ["sandwich", annealing.generated] * (annealing.generated is not None)
    return run / "eval" / "-".join(map(str, words))


def evaluation_folders(run: Path) -> list[Path]:
    """The folders of a run's evaluations, by ascending step.

    Of a step, those of more general interest come later: the test set, the whole set, more samples,
    the default random seed and temperature.
    """
    found = []
    for folder in names_in(run / "eval"):
        name = _NAME.fullmatch(folder)
        if name and exists(run / "eval" / folder / "metrics.json"):
            split, limit, seed, temperature = name.group("split", "limit", "seed", "temperature")
            most = int((name["samples"] or str(SAMPLES[-1])).rpartition("-")[2])
            whole = (limit is None, int(limit or 0))
            rank = (split is None, split or "", whole, most, seed is None, temperature is None)
            found.append((int(name["step"]), rank, run / "eval" / folder))
    return [folder for *_, folder in sorted(found)]


def check_replaceable(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` if a folder holds an evaluation with other settings.

    `settings` is what the metrics.json of the new evaluation will hold. A damaged one may go.
    """
    try:
        found = read_json(folder / "metrics.json")
        differing = [name for name in _SETTINGS if found.get(name) != settings[name]]
    except (UserError, AttributeError):
        return
    for name in differing:
        values = "" if name == "trained" else f" ({found.get(name)} instead of {settings[name]})"
        raise UserError(
            f"{folder} holds an evaluation with another {name.replace('_', ' ')}{values}: choose "
            "another folder with --out, or replace the evaluation with --overwrite"
        )


def check_absent(*files: Path) -> None:
    """Raise `UserError` for the first file that exists."""
    for file in files:
        if exists(file):
            raise UserError(
                f"{file} exists: choose another place with --out, or replace it with --overwrite"
            )
