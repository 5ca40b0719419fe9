"""The options of a run as command-line flags."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, get_args, get_origin

from datasets.own_images import OwnImages
from ladder_vae.networks import LadderConfig
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from runtime.errors import UserError, did_you_mean
from runtime.files import path_argument

# Flags of the original implementation that differ from the option's name.
_FLAGS = {
    "dataset": ("-d", "--dataset"),
    "z_dims": ("--zdims",),
    "n_filters": ("--nfilters",),
    "batchnorm": ("--bn",),
    "free_bits": ("--freebits",),
    "weight_decay": ("--wd",),
}
_LENGTHS: dict[str, Any] = {"steps": 0, "epochs": 0, "max_minutes": 0.0}
_LIKELIHOOD_HELP = (
    "distribution of x given z; auto is bernoulli for binary images, discr_log_mix for 8-bit RGB "
    "ones and discr_log for 8-bit grey ones"
)
OPTIONS: dict[str, dataclasses.Field[Any]] = {
    field.name: field
    for config in (LadderConfig, RunConfig)
    for field in dataclasses.fields(config)
    if "help" in field.metadata
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`: one line, without the usage."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        advice = ""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            advice = did_you_mean(choice[1], re.findall(r"[^\s',]+", choice[2]))
        elif unknown := re.search(r"unrecognized arguments: (?:.* )?(--[^\s=]+)", message):
            advice = did_you_mean(unknown[1], self._option_string_actions)
        raise UserError(f"{message}{advice} (see --help)")


def flag(name: str) -> str:
    """The long command-line flag of an option."""
    return _flags(name)[-1]


def _flags(name: str) -> tuple[str, ...]:
    return _FLAGS.get(name, ("--" + name.replace("_", "-"),))


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn a `ValueError` into a `UserError`, and option names in backticks into flags."""
    try:
        yield
    except ValueError as error:
        message = re.sub("`(.+?)`", lambda m: flag(m[1]) if m[1] in OPTIONS else m[0], str(error))
        raise UserError(message) from error


def at_least(least: int) -> Callable[[str], int]:
    """The argparse type of a whole number of at least `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {least}")
        return value

    return integer


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--preset`, `--config` and all options of `RunConfig`.

    The namespace holds only the options that are given.
    """
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="a named configuration; other options override it, and a length replaces its length",
    )
    parser.add_argument(
        "--config",
        type=path_argument,
        metavar="FILE",
        help="options from a file, .json (such as a run's config.json), .yaml or .toml; they "
        "override the preset, and other options override them",
    )
    parser.add_argument(
        "--minutes",
        dest="max_minutes",
        type=float,
        default=argparse.SUPPRESS,
        metavar="N",
        help="same as --max-minutes (default: 0)",
    )
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `RunConfig`, in groups; the namespace holds only those given."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in OPTIONS.items():
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], name, field)


def _add_option(group: argparse._ArgumentGroup, name: str, field: dataclasses.Field[Any]) -> None:
    help, choices = field.metadata["help"], field.metadata["choices"]
    default = field.default_factory() if callable(field.default_factory) else field.default
    if name == "likelihood":
        help, choices, default = _LIKELIHOOD_HELP, ("auto", *choices), "auto"
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    settings: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": f"{help} (default: {shown!s})".replace("%", "%%"),
    }
    if field.type is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif get_origin(field.type) is list:
        settings |= {"nargs": "+", "type": get_args(field.type)[0], "metavar": "N"}
    elif choices:
        settings["choices"] = choices
    else:
        settings |= {"type": field.type, "metavar": "TEXT" if field.type is str else "N"}
    group.add_argument(*_flags(name), **settings)


def with_lengths(options: dict[str, Any]) -> dict[str, Any]:
    """The given options; a length among them switches off the lengths that are not."""
    if options.keys() & _LENGTHS.keys():
        return _LENGTHS | options
    return options


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that the command line sets, by name."""
    return {name: value for name, value in vars(arguments).items() if name in OPTIONS}


def config_of(options: dict[str, Any], own: OwnImages | None = None) -> RunConfig:
    """Like `RunConfig.of`, but raises `UserError`, which names the flag."""
    with as_user_errors():
        return RunConfig.of(**options, own=own)
