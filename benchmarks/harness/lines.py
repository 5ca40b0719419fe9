"""Lines of a benchmark's table: ways to run the same training step, and its lower limit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

import datasets
from benchmarks.harness import plain
from benchmarks.harness.convolutions import Convolutions, recorded
from benchmarks.harness.operations import times_by_kind
from benchmarks.harness.processes import Timed
from benchmarks.harness.roofline import Counts, counted
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.networks.precision import PRECISIONS, Execution
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.training.cuda_graph import CudaRecorder
from ladder_vae.training.device_step import DeviceSVI
from ladder_vae.training.optimizers import make_optimizer
from ladder_vae.training.svi import SVI
from runtime.errors import UserError

_GRAPH = "+graph"


def execution_named(name: str) -> Execution:
    """The execution with a name such as `float32`, `bf16+channels_last` or `float32+compile`."""
    precision, *options = name.split("+")
    if precision not in PRECISIONS or not set(options) <= {"channels_last", "compile"}:
        raise UserError(
            f"there are no options {name!r}: give a precision ({', '.join(PRECISIONS)}), "
            "optionally followed by +channels_last and +compile"
        )
    return Execution(
        precision=precision,
        channels_last="channels_last" in options,
        compile="compile" in options,
    )


@dataclass(frozen=True)
class Line:
    """A kind of step and its options: those of `execution_named`, then +graph for a CUDA graph.

    The kind `plain` without options is PyTorch with all its defaults, and with the C library's
    default allocator settings. Raises `UserError` for an invalid combination.
    """

    kind: str
    options: str = ""

    def __post_init__(self) -> None:
        execution = self.execution  # raises for invalid options
        if self.kind == "convolutions" and execution.compile:
            raise UserError(f"{self.name}: convolutions alone cannot be compiled")
        if self.is_graph and self.kind != "ours":
            raise UserError(f"{self.name}: only the kind ours can be recorded as a CUDA graph")

    @classmethod
    def named(cls, name: str, kinds: tuple[str, ...]) -> Self:
        """The line called `KIND/OPTIONS`, or `plain`."""
        kind, slash, options = name.partition("/")
        if kind not in kinds or bool(options) == (name == "plain") or bool(slash) != bool(options):
            raise UserError(
                f"there is no line {name!r}: give plain, or one of "
                f"{', '.join(f'{kind}/OPTIONS' for kind in kinds)}"
            )
        return cls(kind, options)

    @property
    def name(self) -> str:
        """The name that `named` takes."""
        return f"{self.kind}/{self.options}" if self.options else self.kind

    @property
    def execution(self) -> Execution:
        """Precision, memory layout and compilation."""
        return execution_named(self.options.removesuffix(_GRAPH) or "float32")

    @property
    def is_graph(self) -> bool:
        """Whether steps are recorded once as a CUDA graph and replayed."""
        return self.options.endswith(_GRAPH)

    @property
    def keeps_memory(self) -> bool:
        """Whether the C library keeps freed memory, as in our scripts."""
        return bool(self.options)

    @property
    def floor(self) -> str:
        """The name of the line with the same step's convolutions alone."""
        eager = self.options.removesuffix(_GRAPH).removesuffix("+compile")
        return f"convolutions/{eager or 'float32'}"


def svi_on(
    device: torch.device,
    loss_fn: Any,
    optimizer: torch.optim.Optimizer,
    *,
    execution: Execution = Execution(),  # noqa: B008 (immutable)
    record: bool = False,
) -> SVI:
    """The SVI that training uses on this device."""
    if device.type == "cuda":
        recorder = CudaRecorder() if record else None
        return DeviceSVI(loss_fn, optimizer, execution=execution, recorder=recorder)
    return SVI(loss_fn, optimizer, execution=execution)


class Steps:
    """A ladder and its training steps on random images (N, C, H, W) of `shape` (C, H, W)."""

    def __init__(
        self,
        config: RunConfig,
        shape: tuple[int, int, int],
        batch_size: int,
        device: torch.device,
        execution: Execution,
        *,
        recorded: bool = False,
    ) -> None:
        torch.manual_seed(0)
        elbo = FreeBitsELBO(config.free_bits, analytic_kl=config.analytical_kl)
        self.loss_fn: Any = elbo(*build_ladder(config.ladder, shape)).to(device).train()
        self.device = device
        self.execution = execution
        self._x = torch.randint(0, 2, (batch_size, *shape), device=device).float()
        execution.prepare(self.loss_fn)
        self._optimizer = make_optimizer(config, self.loss_fn, execution.precision)
        self._recorded = recorded

    @cached_property
    def _svi(self) -> SVI:
        # Created only if used: on a GPU it changes how the optimizer counts its steps.
        return svi_on(
            self.device,
            self.loss_fn,
            self._optimizer,
            execution=self.execution,
            record=self._recorded,
        )

    def ours(self) -> Tensor:
        """A step by `SVI.step`."""
        return self._svi.step(self._x)

    def plain(self) -> Tensor:
        """The same step without Pyro and svi.py."""
        return plain.training_step(
            self.loss_fn.model,
            self.loss_fn.guide,
            self._optimizer,
            self._x,
            self.loss_fn.elbo.free_bits,
            autocast=self.execution.autocast(self.device),
        )

    def gradient(self) -> None:
        """A step without the optimizer's update."""
        free_bits = self.loss_fn.elbo.free_bits
        with self.execution.autocast(self.device):
            loss = plain.free_bits_loss(self.loss_fn.model, self.loss_fn.guide, self._x, free_bits)
        loss.backward()
        self._optimizer.zero_grad(set_to_none=True)

    def convolutions(self) -> Convolutions:
        """The convolutions of a step, to run alone."""
        with recorded() as calls:
            self.gradient()
        return Convolutions(calls, self.device)


@dataclass(frozen=True)
class Case:
    """A preset at a batch size on a device."""

    preset: str
    batch_size: int
    device: str

    @property
    def config(self) -> RunConfig:
        """The preset's configuration."""
        return RunConfig.of(**PRESETS[self.preset])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return datasets.image_shape(self.config.dataset)


class TimedSteps(Timed):
    """The training steps of a line."""

    def __init__(self, case: Case, line: Line) -> None:
        super().__init__(torch.device(case.device), keeps_memory=line.keeps_memory)
        self._steps = Steps(
            case.config,
            case.image_shape,
            case.batch_size,
            self.device,
            line.execution,
            recorded=line.is_graph,
        )
        self.run = {"ours": self._steps.ours, "plain": self._steps.plain}[line.kind]

    def by_kind(self) -> dict[str, float]:
        """Milliseconds per step by kind of operation."""
        compiled = self._steps.execution.compile
        steps = min(3, self._runs)
        return times_by_kind(self.run, self._steps.loss_fn, compiled=compiled, steps=steps)

    def counts(self) -> list[Counts]:
        """The operations of a step."""
        with counted() as counts:
            self.run()
        return counts


class TimedConvolutions(Timed):
    """A step's convolutions alone."""

    def __init__(self, case: Case, line: Line) -> None:
        super().__init__(torch.device(case.device), keeps_memory=line.keeps_memory)
        steps = Steps(case.config, case.image_shape, case.batch_size, self.device, line.execution)
        self.run: Callable[[], object] = steps.convolutions().run


TRAINING: dict[str, Callable[[Case, Line], Timed]] = {
    "ours": TimedSteps,
    "plain": TimedSteps,
    "convolutions": TimedConvolutions,
}
