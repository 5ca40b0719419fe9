"""Execution of the networks: precision, memory layout and compilation.

These settings change results only by rounding. With "bf16", feature maps are in bfloat16, but the
parameters of priors, posteriors and likelihood come from convolutions in single precision
(`blocks.ParameterConv`). Latents, log-probabilities and KL are therefore in single precision too.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ladder_vae.networks.blocks import ResidualBlock
from runtime.device import bf16_instructions

PRECISIONS = ("float32", "tf32", "bf16")
COMPILE = ("auto", "yes", "no")
# The limit on recompilations: each shape of feature map needs one in training and in evaluation.
_SHAPES = 64


@dataclass(frozen=True)
class Execution:
    """Settings for passes through a network.

    Args:
        precision: "float32"; "tf32", with which a GPU's convolutions round their inputs to 10 bits
            of mantissa; or "bf16".
        channels_last: store the channels of a position next to each other, which the convolutions
            of oneDNN and cuDNN are optimised for.
        compile: compile the residual blocks, in place.
    """

    precision: str = "float32"
    channels_last: bool = True
    compile: bool = False

    @classmethod
    def choose(cls, precision: str, compile: str, device: torch.device) -> "Execution":
        """The settings for a device; `compile` is one of `COMPILE`.

        The precision "auto" is bf16 where the device has instructions for it, and otherwise
        float32. The compilation "auto" compiles on GPUs only: on the CPU compiled blocks are not
        faster than oneDNN's convolutions. Raises `ValueError` if the device does not support the
        precision.
        """
        if precision == "auto":
            precision = "bf16" if _computes_bf16(device) else "float32"
        if precision == "tf32" and device.type != "cuda":
            raise ValueError("`precision` tf32 needs a GPU; on the CPU use float32 or bf16")
        if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("`precision` bf16 is not supported by this GPU; use float32")
        wanted = compile == "yes" or (compile == "auto" and device.type == "cuda")
        return cls(precision, compile=wanted)

    def prepare(self, module: nn.Module) -> None:
        """Set the memory layout and compile, in place; the weights keep their names and values."""
        self.lay_out(module)
        self.compile_blocks(module)

    def lay_out(self, module: nn.Module) -> None:
        """Convert a network's weights to the memory layout."""
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        if self.channels_last:
            module.to(memory_format=torch.channels_last)

    def compile_blocks(self, module: nn.Module) -> None:
        """Compile the residual blocks at their next run, if `compile` is set.

        If PyTorch cannot compile, for example without a C++ compiler, warn and run them eagerly.
        """
        if self.compile and _can_compile(next(module.parameters()).device):
            torch._dynamo.config.recompile_limit = _SHAPES
            for block in module.modules():
                if isinstance(block, ResidualBlock):
                    block.compile(dynamic=False)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which to run a pass through the networks."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


def _computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; processors without them emulate it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16_instructions() is not None


def _can_compile(device: torch.device) -> bool:
    """Whether the compiler works for the device; warns if it does not."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # many kinds, for a compiler that is missing or fails
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"warning: blocks run without compilation ({reason})", file=sys.stderr)
        return False
    return True
