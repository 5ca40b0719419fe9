"""Complete images with missing pixels.

    python -m tools.inpaint RUN --mask bottom
    python -m tools.inpaint RUN --mask mask.png --chains 4 --sweeps 200

Writes inpainting.png and inpainting.npz into RUN/eval/STEP/, and adds the picture to the report
there. The method is described in `ladder_vae.evaluation.inpainting`.
"""

import argparse
import sys
from collections.abc import Sequence

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from evaluate import EvaluatedLadder, load_ladder
from ladder_vae.evaluation.folders import check_absent, evaluation_folder
from ladder_vae.evaluation.inpainting import (
    MASKS,
    Completions,
    inpaint,
    read_mask,
    write_completions,
)
from ladder_vae.evaluation.options import add_ladder_options, choose_images
from ladder_vae.reports.figures import draw_completions
from ladder_vae.reports.html import update_evaluation_report
from ladder_vae.runs.command_line import OneLineParser, at_least
from runtime.device import enough_memory, keep_freed_memory
from runtime.errors import run_command
from runtime.files import writing


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.inpaint",
        description="Hide a part of images, and complete them by draws from p(x_mis | x_obs).",
    )
    add_ladder_options(parser)
    parser.add_argument(
        "--mask",
        required=True,
        help=f"the part to hide: {', '.join(MASKS)}, or an image file whose white pixels mark it",
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        default=8,
        metavar="N",
        help="complete N random images (default: 8)",
    )
    parser.add_argument(
        "--chains",
        type=at_least(1),
        default=6,
        metavar="N",
        help="completions of each image (default: 6)",
    )
    parser.add_argument(
        "--sweeps",
        type=at_least(2),
        default=100,
        metavar="N",
        help="sweeps of each chain, a fifth of which are warm-up (default: 100)",
    )
    return parser.parse_args(argv)


def complete(
    ladder: EvaluatedLadder,
    x: Tensor,
    missing: Tensor,
    *,
    chains: int,
    sweeps: int,
    batch_size: int,
    seed: int,
) -> Completions:
    """Complete images x (N, C, H, W) where `missing` (H, W) is true, with a progress bar."""
    total = len(x) * chains * sweeps
    with tqdm(total=total, unit="sweep", disable=not sys.stderr.isatty()) as bar:
        return inpaint(
            ladder.model,
            ladder.guide,
            x,
            missing,
            chains=chains,
            sweeps=sweeps,
            warmup=max(1, sweeps // 5),
            batch_size=batch_size,
            seed=seed,
            on_sweep=bar.update,
        )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    keep_freed_memory()
    memory = enough_memory("give a smaller number to --batch-size")
    with pyro.validation_enabled(False), memory:
        ladder = load_ladder(arguments)
        folder = arguments.out or evaluation_folder(
            ladder.source.path, ladder.step, arguments.split
        )
        if not arguments.overwrite:
            check_absent(folder / "inpainting.npz", folder / "inpainting.png")
        _, height, width = ladder.image_shape
        missing = read_mask(arguments.mask, (height, width)).to(ladder.device)
        images = ladder.images(arguments.split, arguments.data_dir)
        index = choose_images(images, arguments.limit, arguments.seed)
        # Images that are binarized each time they are read need the seed, too.
        generator = torch.Generator(images.device).manual_seed(arguments.seed)
        x = images.batch(index.to(images.index_device), generator)
        with writing(folder):  # fail now rather than after the chains, which take a while
            folder.mkdir(parents=True, exist_ok=True)
        completions = complete(
            ladder,
            x,
            missing,
            chains=arguments.chains,
            sweeps=arguments.sweeps,
            batch_size=arguments.batch_size or ladder.batch_size,
            seed=arguments.seed,
        )
    draw_completions(folder / "inpainting.png", x, missing, completions)
    write_completions(folder / "inpainting.npz", index, missing, completions)
    update_evaluation_report(folder, ladder.run)
    print(
        f"{images.name}, {len(x):,} {images.split} images, {int(missing.sum()):,} of "
        f"{missing.numel():,} pixels completed by {arguments.chains} chains of "
        f"{arguments.sweeps} sweeps"
    )
    print(f"accepted  {completions.acceptance.mean().item():.1%} of the proposals")
    print(f"picture   {folder / 'inpainting.png'}")
    print(f"arrays    {folder / 'inpainting.npz'}")
    return 0


if __name__ == "__main__":
    run_command(main)
