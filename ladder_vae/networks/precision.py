"""How the networks are run: in what precision and memory layout, and whether their blocks compile.

None of it changes what is computed, but for rounding. In bfloat16 the convolutions and all between
them are: prior, posterior and likelihood parameters come out of convolutions in single precision
(`networks.ParameterConv`), and so latents, log-probabilities and KL are in single precision too.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ladder_vae.networks.blocks import ResidualBlock

# What --precision and --compile may be.
PRECISIONS = ("float32", "tf32", "bf16")
COMPILE = ("auto", "yes", "no")
# One compilation for each shape of feature maps, in training and evaluation, gated or not.
_SHAPES = 64


@dataclass(frozen=True)
class Execution:
    """How passes through a network are made.

    Args:
        precision: "float32"; "tf32", in which a GPU's convolutions round their factors to 10 bits;
            or "bf16".
        channels_last: keep the channels of a position together in memory, as fast kernels have it.
        compile: compile the residual blocks, in place.
    """

    precision: str = "float32"
    channels_last: bool = True
    compile: bool = False

    @classmethod
    def choose(cls, precision: str, compile: str, device: torch.device) -> "Execution":
        """What suits the device; `compile` is one of `COMPILE`.

        On the CPU compiled blocks are no faster than oneDNN's convolutions and the passes between
        them, so that "auto" compiles on GPUs only. Raises `ValueError` if the device lacks the
        precision.
        """
        if precision == "tf32" and device.type != "cuda":
            raise ValueError("`precision` tf32 needs a GPU; on the CPU use float32 or bf16")
        if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("`precision` is bf16, which this GPU lacks; use float32")
        wanted = compile == "yes" or (compile == "auto" and device.type == "cuda")
        return cls(precision, compile=wanted)

    def prepare(self, module: nn.Module) -> None:
        """Lay out and compile a network in place; names and values of its weights stay."""
        self.lay_out(module)
        self.compile_blocks(module)

    def lay_out(self, module: nn.Module) -> None:
        """Bring a network's weights into the memory layout."""
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        if self.channels_last:
            module.to(memory_format=torch.channels_last)

    def compile_blocks(self, module: nn.Module) -> None:
        """Have the residual blocks compiled when they run next, if they are to be.

        Where PyTorch cannot compile, for lack of a compiler, one line says so and they stay as they
        are.
        """
        if self.compile and _can_compile(next(module.parameters()).device):
            torch._dynamo.config.recompile_limit = _SHAPES
            for block in module.modules():
                if isinstance(block, ResidualBlock):
                    block.compile(dynamic=False)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of a pass through the networks."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


def _can_compile(device: torch.device) -> bool:
    """Whether the compiler works for the device; tells of it where it does not."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds: a compiler that is missing, or fails
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"warning: blocks are not compiled ({reason}); goes on without", file=sys.stderr)
        return False
    return True
