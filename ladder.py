"""A trained ladder: its model and guide with the weights of a checkpoint.

    ladder = Ladder.load("runs/mnist-12")
    images = ladder.images("test", "data")

`Ladder.score` computes bounds on the log-likelihood of such images.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import datasets
from datasets import ImageSet
from datasets.folder import load_folder
from elbo import FreeBitsELBO
from guide import LadderGuide, build_ladder
from ladder_vae.evaluation.batch_size import automatic_batch_size
from ladder_vae.evaluation.importance import Bounds, ImportanceSampler
from ladder_vae.evaluation.scoring import ProgressFile, fingerprint, score
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.networks.precision import Execution
from ladder_vae.runs.checkpoint import load_weights
from ladder_vae.runs.provenance import commit, provenance
from ladder_vae.runs.run import Run
from model import LadderModel
from runtime.device import choose_device
from runtime.distributed import Ranks
from runtime.errors import UserError


@dataclass(frozen=True)
class Ladder:
    """A trained model and guide, in evaluation mode."""

    run: Run
    model: LadderModel
    guide: LadderGuide
    step: int
    weights: str  # "average" or "last"
    minutes: float | None  # of training; None for imported weights
    device: torch.device
    execution: Execution

    @classmethod
    def load(
        cls,
        run: Run | str | os.PathLike[str],
        *,
        checkpoint: int | str = "last",
        device: torch.device | str = "auto",
        average: bool = True,
        execution: Execution = Execution(),  # noqa: B008 (immutable)
    ) -> "Ladder":
        """Load a checkpoint of a run.

        Args:
            run: a run or its folder.
            checkpoint: a step, "best" or "last".
            device: a device, or the name of one; "auto" prefers a GPU.
            average: use the moving average of the weights, if the checkpoint has one.
            execution: how the networks are run.

        Raises:
            UserError: there is no such run, checkpoint or device, or the file is damaged.
        """
        run = run if isinstance(run, Run) else Run.open(Path(run))
        device = choose_device(device) if isinstance(device, str) else device
        state = run.load_checkpoint(run.step_called(str(checkpoint)), device)
        model, guide = build_ladder(run.config.ladder, run.image_shape)
        module: Any = FreeBitsELBO()(model, guide).to(device).eval()
        use_average = average and state["average"] is not None
        load_weights(module, state["average"]["weights"] if use_average else state["weights"])
        if not all(tensor.isfinite().all() for tensor in module.state_dict().values()):
            raise UserError(
                f"the weights of step {state['step']} are not all finite, because the training "
                "diverged: give an earlier step to --checkpoint"
            )
        execution.prepare(module)
        weights = "average" if use_average else "last"
        return cls(run, model, guide, state["step"], weights, state["minutes"], device, execution)

    @property
    def depth(self) -> int:
        """The number of stochastic layers."""
        return len(self.run.config.ladder.z_dims)

    def images(self, split: str, data_dir: str | Path, dataset: str | None = None) -> ImageSet:
        """A split of the run's data set, or of another one, on the ladder's device.

        Raises `UserError` if the ladder is not for such images.
        """
        data = dataset or self.run.config.data
        shape = datasets.image_shape(data)  # known without a download
        if shape != self.run.image_shape:
            raise UserError(
                f"{self.run.path} is a run on images {self.run.image_shape}, "
                f"but those of {dataset} are {shape}"
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
        images, names = load_folder(folder, self.run.image_shape, binary=self._is_binary)
        return images.to(self.device), names

    @property
    def _is_binary(self) -> bool:
        return datasets.is_binary(self.run.config.data)

    def batch_size(self) -> int:
        """The automatic batch size (images times samples per pass) for network and device."""
        x = torch.zeros(1, *self.run.image_shape, device=self.device)
        return automatic_batch_size(self.run.config.ladder, self.guide, x)

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

        Finished groups of images are kept in `folder`/.progress, and the same call resumes an
        interrupted scoring from there. Remove the returned progress file when the bounds are saved.
        `check` is called before each group and may raise to interrupt the scoring.
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
        """The entries of a metrics file that describe the ladder and this machine."""
        return {
            "step": self.step,
            "weights": self.weights,
            "precision": self.execution.precision,
            "layers": self.depth,
            "parameters": count_parameters(self.model, self.guide),
            "minutes": self.minutes,
            "training_seed": self.run.config.seed,
            "trained": self.run.provenance,
            "provenance": provenance(self.device),
        }
