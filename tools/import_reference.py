"""Import weights that were trained with the original implementation (the "reference").

    python -m tools.import_reference WEIGHTS --out RUN [the options it was trained with]

WEIGHTS is the reference's state dict, saved by `torch.save` (.pt) or as arrays under `state/NAME`
(.npz). Writes a run folder that evaluate.py can evaluate; training cannot be resumed from it.
"""

import argparse
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import datasets
from elbo import FreeBitsELBO
from guide import LadderGuide, build_ladder
from ladder_vae.networks import LadderConfig
from ladder_vae.networks.blocks import ResidualBlock
from ladder_vae.runs.checkpoint import load_tensors, weights_only
from ladder_vae.runs.command_line import OneLineParser, add_options, at_least
from ladder_vae.runs.config_file import config_from
from ladder_vae.runs.run import Run
from model import LadderModel
from runtime.errors import UserError, run_command
from runtime.files import path_argument, reading

# The reference's constructor arguments, and our names for them.
_NAMES = {
    "z_dims": "z_dims",
    "blocks_per_layer": "blocks_per_layer",
    "downsample": "downsample",
    "nonlin": "nonlin",
    "batchnorm": "batchnorm",
    "n_filters": "n_filters",
    "learn_top_prior": "learn_top_prior",
    "gated": "gated",
    "merge_type": "merge_layers",
    "stochastic_skip": "skip",
    "res_block_type": "residual_type",
    "likelihood_form": "likelihood",
}
_ADVICE = "give the options that it was trained with"
_PREFIX = "state/"  # of the weights' names in an .npz file
# DataParallel and torch.compile put these before the names of a module that they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(module\.|_orig_mod\.)+")


def config_from_case(case: Mapping[str, Any]) -> LadderConfig:
    """The configuration that corresponds to the reference's constructor arguments."""
    values = {ours: case[theirs] for theirs, ours in _NAMES.items() if theirs in case}
    values["dropout"] = case.get("dropout") or 0.0
    values["initial_downscaling"] = not case.get("no_initial_downscaling", False)
    return LadderConfig(**values)


def from_reference(
    case: Mapping[str, Any], state_dict: Mapping[str, Any]
) -> tuple[LadderModel, LadderGuide]:
    """A model and guide with the reference's weights.

    Args:
        case: the reference's constructor arguments (`color_ch`, `z_dims`, `img_shape`, ...).
        state_dict: its parameters and batch-norm statistics, by its names.

    Raises `UserError` if they do not fit together.
    """
    model, guide = build_ladder(config_from_case(case), (case["color_ch"], *case["img_shape"]))
    load_reference_state(model, guide, state_dict)
    return model, guide


def load_reference_state(
    model: LadderModel, guide: LadderGuide, state_dict: Mapping[str, Any]
) -> None:
    """Copy the reference's state dict into a model and guide of the same architecture."""
    for name, tensor in reference_tensors(model, guide, state_dict.keys()).items():
        value = torch.as_tensor(state_dict[name])
        if value.shape != tensor.shape:
            raise UserError(
                f"{name} has shape {tuple(value.shape)} in the reference's weights but "
                f"{tuple(tensor.shape)} with these options; {_ADVICE}"
            )
        with torch.no_grad():
            tensor.copy_(value)


def reference_tensors(
    model: LadderModel, guide: LadderGuide, names: Collection[str]
) -> dict[str, Tensor]:
    """Our parameters and statistics, by their names in the reference's state dict.

    Raises `UserError` unless these are exactly `names`.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in _modules(model, guide):
        tensors |= _named_tensors(prefix, module, names)
    top = f"top_down_layers.{len(model.layers) - 1}.top_prior_params"
    tensors[top] = model.top_prior.mean_log_variance
    for name in sorted(tensors.keys() - set(names)):
        raise UserError(f"the reference's weights lack {name}; {_ADVICE}")
    for name in sorted(set(names) - tensors.keys()):
        raise UserError(f"the network with these options has no weights {name}; {_ADVICE}")
    return tensors


def _modules(model: Any, guide: Any) -> Iterable[tuple[str, nn.Module]]:
    """The modules that hold the parameters, each with its prefix in the reference's names."""
    yield "first_bottom_up.0", guide.bottom_up.stem[0]
    yield "first_bottom_up.2.res", guide.bottom_up.stem[2]
    for i, blocks in enumerate(guide.bottom_up.layers):
        yield from _blocks(f"bottom_up_layers.{i}.net", blocks)
    posteriors = [*guide.posteriors, guide.top_posterior]
    for i, (layer, posterior) in enumerate(zip(model.layers, posteriors, strict=True)):
        prefix = f"top_down_layers.{i}"
        yield f"{prefix}.stochastic.conv_in_q", posterior.conv
        yield f"{prefix}.stochastic.conv_out", layer.expand
        yield from _blocks(f"{prefix}.deterministic_block", layer.blocks)
        if posterior is not guide.top_posterior:
            yield f"{prefix}.stochastic.conv_in_p", model.priors[i].conv
            yield from _merge(f"{prefix}.merge.layer", posterior.merge)
        if layer.skip is not None:
            yield from _merge(f"{prefix}.skip_connection_merger.layer", layer.skip)
    # In the reference, bilinear upsampling counts as the first block, if there is any.
    offset = 0 if isinstance(model.decoder.upsample, nn.Identity) else 1
    yield from _blocks("final_top_down", model.decoder.blocks, offset)
    yield "likelihood.parameter_net", model.likelihood.conv


def _blocks(prefix: str, blocks: nn.Sequential, offset: int = 0) -> Iterable[tuple[str, nn.Module]]:
    # In the reference, a resampling convolution has the number of the next residual block.
    i = offset
    for module in blocks:
        if isinstance(module, ResidualBlock):
            yield f"{prefix}.{i}.res", module
            i += 1
        else:
            yield f"{prefix}.{i}.pre_conv", module


def _merge(prefix: str, merge: Any) -> Iterable[tuple[str, nn.Module]]:
    if isinstance(merge.residual, nn.Identity):
        yield prefix, merge.conv
    else:
        yield f"{prefix}.0", merge.conv
        yield f"{prefix}.1", merge.residual


def _named_tensors(prefix: str, module: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of `module` by the reference's names, which begin with `prefix`."""
    if not isinstance(module, ResidualBlock):
        state = module.state_dict(keep_vars=True)
        return {f"{prefix}.{name}": tensor for name, tensor in state.items()}
    # Match the layers of a residual block in order: their numbers in the reference also count
    # layers without parameters.
    pattern = re.compile(re.escape(prefix) + r"\.block\.(\d+)\.")
    numbers = sorted({int(match[1]) for name in names if (match := pattern.match(name))})
    layers = [layer for layer in module.block if layer.state_dict()]
    if len(numbers) != len(layers):
        raise UserError(
            f"the reference's weights have {len(numbers)} layers in {prefix} but the network with "
            f"these options has {len(layers)}; {_ADVICE}"
        )
    tensors: dict[str, Tensor] = {}
    for number, layer in zip(numbers, layers, strict=True):
        tensors |= _named_tensors(f"{prefix}.block.{number}", layer, names)
    return tensors


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; raises `UserError` if there is none."""
    if path.suffix == ".npz":
        content = _read_arrays(path)
    else:
        content = load_tensors(path, path, torch.device("cpu"))
    values = content.values() if isinstance(content, dict) else ()
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise UserError(f"{path} does not hold the reference's weights: it is not a state dict")
    return _unwrapped(path, content)


def _unwrapped(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their names in the network itself, without those of wrappers around it."""
    names = {name: _WRAPPERS.sub("", name) for name in weights}
    if len(set(names.values())) < len(names):
        raise UserError(
            f"{path} holds some weights twice, with and without the prefix of a wrapper such as "
            "DataParallel: save one state dict"
        )
    return {names[name]: weight for name, weight in weights.items()}


def _read_arrays(path: Path) -> dict[str, Tensor]:
    with reading(path):
        file = path.open("rb")
    try:
        with file, np.load(file, allow_pickle=False) as arrays:
            return {
                name.removeprefix(_PREFIX): torch.from_numpy(arrays[name])
                for name in arrays.files
                if name.startswith(_PREFIX)
            }
    except Exception as error:  # numpy raises many types
        raise UserError(f"{path} is damaged or not an .npz file of arrays") from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.import_reference",
        description="Make a run folder from weights trained with the original implementation.",
    )
    parser.add_argument(
        "weights", type=path_argument, metavar="WEIGHTS", help="state dict, .pt or .npz"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="RUN", required=True, help="run folder to make"
    )
    parser.add_argument(
        "--step",
        type=at_least(0),
        default=0,
        metavar="N",
        help="number of steps that the weights were trained for (default: 0)",
    )
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if "train_split" not in arguments:
        arguments.train_split = "train+valid"  # what the original implementation trains on
    config = config_from(arguments)
    image_shape = datasets.image_shape(config.dataset)
    model, guide = build_ladder(config.ladder, image_shape)
    load_reference_state(model, guide, read_weights(arguments.weights))
    run = Run.create(arguments.out, config, image_shape, {"imported_from": arguments.weights.name})
    run.save_checkpoint(arguments.step, weights_only(FreeBitsELBO()(model, guide).state_dict()))
    print(f"run folder {run.path}; to evaluate it: python evaluate.py {run.path}")
    return 0


if __name__ == "__main__":
    run_command(main)
