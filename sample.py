"""Draw images from a trained ladder VAE.

    python sample.py runs/mnist-12 -n 1000 --temperature 0.7 --out samples.npz
    python sample.py runs/mnist-12 --keep-above 3 --from digit.png --mean --out variations.png
    python sample.py runs/mnist-12 --interpolate a.png b.png --out between

Writes an .npz file of an array `images`, float32 (N, C, H, W) in [0, 1], a .png picture of all
images in a grid, or a folder of .png files. Needs no data set.
"""

import argparse
import math
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor

from datasets.folder import load_picture
from ladder import Ladder
from ladder_vae.evaluation.folders import check_absent
from ladder_vae.evaluation.options import add_temperature_option, add_weights_options
from ladder_vae.reports.image_grids import sample_grid, write_images, write_png
from ladder_vae.runs.command_line import OneLineParser, at_least
from runtime.errors import UserError, run_command
from runtime.files import path_argument, write_atomically, writing

SAMPLES, STEPS = 64, 9


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="sample.py", description="Draw images from a trained ladder VAE, without its data."
    )
    add_weights_options(parser)
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="PATH",
        help="an .npz file, a .png file for a grid, or a folder for one .png file per image",
    )
    parser.add_argument(
        "-n",
        "--number",
        type=at_least(1),
        metavar="N",
        help=f"number of images (default: {SAMPLES}, or {STEPS} with --interpolate)",
    )
    add_temperature_option(parser, "")
    parser.add_argument(
        "--mean",
        action="store_true",
        help="means of p(x | z) instead of draws of x (default: draws; interpolations are means)",
    )
    parser.add_argument(
        "--keep-above",
        type=at_least(0),
        metavar="I",
        help="keep the layers above I as encoded from --from, and draw the others (default: draw "
        "all)",
    )
    parser.add_argument(
        "--from",
        dest="given",
        type=path_argument,
        metavar="IMAGE",
        help="the image of --keep-above",
    )
    parser.add_argument(
        "--interpolate",
        type=path_argument,
        nargs=2,
        metavar="IMAGE",
        help="images between two images, instead of samples",
    )
    parser.add_argument(
        "--layers",
        type=at_least(1),
        nargs="+",
        metavar="I",
        help="layers to interpolate; the others are at the mode of their prior (default: all)",
    )
    arguments = parser.parse_args(argv)
    check_options(arguments)
    return arguments


def check_options(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for options that do not belong together, or an --out of another kind."""
    if (arguments.keep_above is None) != (arguments.given is None):
        raise UserError("--keep-above and --from need each other: a layer, and an image")
    if arguments.interpolate is None and arguments.layers is not None:
        raise UserError("--layers has no effect without --interpolate")
    if arguments.interpolate is not None:
        if arguments.given is not None or set(arguments.temperature) != {1.0}:
            raise UserError("--interpolate cannot be combined with --keep-above or --temperature")
        if arguments.number == 1:
            raise UserError("--number is 1; with --interpolate it must be at least 2")
    out: Path = arguments.out
    if out.suffix not in ("", ".npz", ".png") and not out.is_dir():
        raise UserError(f"--out is {out}; it must end in .npz or .png, or be a folder")


def draw(ladder: Ladder, arguments: argparse.Namespace) -> Tensor:
    """The images that the command line asks for, (N, C, H, W) in [0, 1]."""
    if arguments.interpolate is not None:
        first, second = (read_image(path, ladder) for path in arguments.interpolate)
        steps = arguments.number or STEPS
        return ladder.interpolate(first, second, steps, arguments.layers)
    given = arguments.temperature
    return ladder.sample(
        arguments.number or SAMPLES,
        temperature=given if len(given) > 1 else given[0],
        above=arguments.keep_above,
        given=None if arguments.given is None else read_image(arguments.given, ladder),
        mean=arguments.mean,
    )


def read_image(path: Path, ladder: Ladder) -> np.ndarray:
    """An image file's levels, uint8 (C, H, W); raises `UserError` if the ladder is not for it."""
    binary = ladder.config.likelihood == "bernoulli"
    levels = load_picture(path, ladder.image_shape, binary=binary)
    return levels.transpose(2, 0, 1)


# --- Writing ---


def check_place(out: Path, *, overwrite: bool) -> None:
    """Raise `UserError` if writing to `out` would replace anything but, if allowed, samples."""
    if out.is_dir():
        names = [file.name for file in out.iterdir()]
        if not all(re.fullmatch(r"[0-9]{6,}\.png", name) for name in names):
            raise UserError(
                f"{out} holds other files than samples: choose another folder for --out"
            )
        if not names:
            return
    if not overwrite:
        check_absent(out)


def write(images: Tensor, out: Path) -> None:
    """Write images as an .npz file, a grid or a folder, in place of what is there."""
    if out.suffix == ".npz":
        array = images.cpu().numpy()
        write_atomically(out, lambda file: np.savez_compressed(file, images=array))
    elif out.suffix == ".png":
        write_png(out, sample_grid(images, math.ceil(math.sqrt(len(images)))))
    else:
        write_folder(images, out)


def write_folder(images: Tensor, folder: Path) -> None:
    """Write 000000.png, 000001.png, ...; the folder appears when it is complete."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        write_images(temporary, images)
        with writing(folder):
            if folder.is_dir():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    out: Path = arguments.out
    check_place(out, overwrite=arguments.overwrite)
    with pyro.validation_enabled(False):
        ladder = Ladder.load(
            arguments.run,
            checkpoint=arguments.checkpoint,
            device=arguments.device,
            average=arguments.average,
        )
        torch.manual_seed(arguments.seed)
        images = draw(ladder, arguments)
    write(images, out)
    print(f"{len(images):,} images of step {ladder.step:,}: {out}")
    return 0


if __name__ == "__main__":
    run_command(main)
