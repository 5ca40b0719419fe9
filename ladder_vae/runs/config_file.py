"""Options of a run from a file: the config.json of another run, JSON, YAML or TOML."""

import argparse
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets.own_images import UNKNOWN, is_path, prepare
from ladder_vae.runs.command_line import OPTIONS, config_of, flag, given_options, with_lengths
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from runtime.errors import UserError, did_you_mean
from runtime.files import read_json, reading

# The names of options without `--`, as users may write them.
_NAMES = {flag(name).removeprefix("--"): name for name in OPTIONS} | {
    name: name for name in OPTIONS
}


def config_from(arguments: argparse.Namespace) -> RunConfig:
    """The defaults, overridden by the requested options.

    If --dataset is a path, its images are prepared in --data-dir.
    """
    data_dir = getattr(arguments, "data_dir", Path("data"))
    return config_for(requested_options(arguments), data_dir)


def requested_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the preset, overridden by --config and by the given options, in turn.

    A length replaces all lengths that it overrides.
    """
    preset = PRESETS[arguments.preset] if arguments.preset else {}
    from_file = read_options(arguments.config) if arguments.config else {}
    return preset | with_lengths(from_file) | with_lengths(given_options(arguments))


def config_for(options: dict[str, Any], data_dir: Path) -> RunConfig:
    """The configuration with these options; prepares the images if the data set is a path."""
    dataset = options.get("dataset", RunConfig.dataset)
    if not isinstance(dataset, str) or dataset in datasets.NAMES or not is_path(dataset):
        return config_of(options)
    config = config_of(options, UNKNOWN)  # check the other options before a long preparation
    size = config.image_size if any(config.image_size) else []
    return config_of(options, prepare(dataset, size, data_dir))


def read_options(path: Path) -> dict[str, Any]:
    """The options in a file, by name.

    A file maps names (`n_filters`, `nfilters`) to values. A run's config.json has the same options,
    some under `config` and `ladder`.

    Raises `UserError` if the file cannot be read or has other content.
    """
    content = _READERS.get(path.suffix, _unknown_format)(path)
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]  # of a run
    if not isinstance(content, dict):
        raise UserError(f"{path} is no configuration: it must map names of options to values")
    ladder = content.get("ladder")
    given = {name: value for name, value in content.items() if name not in ("ladder", "own")}
    given |= ladder if isinstance(ladder, dict) else {}
    options = {}
    for written, value in given.items():
        known = str(written).replace("-", "_"), str(written)
        name = next((_NAMES[word] for word in known if word in _NAMES), None)
        if name is None:
            advice = did_you_mean(str(written), _NAMES)
            raise UserError(f"{path} has {written!r}, which is no option{advice}")
        options[name] = _number(value) if OPTIONS[name].type is float else value
    return options


def _number(value: Any) -> Any:
    """YAML reads 1e-3, which has no point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # refused with the other options


def _read_yaml(path: Path) -> Any:
    import yaml

    with reading(path):
        content = path.read_bytes()
    try:
        return yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def _read_toml(path: Path) -> Any:
    with reading(path):
        content = path.read_bytes()
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def _unknown_format(path: Path) -> Any:
    raise UserError(f"{path} must end in .json, .yaml, .yml or .toml")


_READERS: dict[str, Callable[[Path], Any]] = {
    ".json": read_json,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".toml": _read_toml,
}
