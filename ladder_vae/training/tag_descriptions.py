"""What TensorBoard says about each tag: one line, with the unit."""

import re

from ladder_vae.evaluation.kl import ACTIVE_KL

# By the end of the tag, after the split; the first match counts. {n} is a number in the tag.
_DESCRIPTIONS = (
    (r"/negative_elbo", "Negative ELBO, in nats per image; lower is better."),
    (
        r"/negative_bound_(?P<n>\d+)_samples_bits_per_dim",
        "The importance-weighted bound of {n} samples, in bits per pixel and channel; lower is "
        "better.",
    ),
    (
        r"/negative_bound_(?P<n>\d+)_samples",
        "Negative importance-weighted bound of {n} samples, in nats per image; lower is better.",
    ),
    (r"/bits_per_dim", "Negative ELBO, in bits per pixel and channel; lower is better."),
    (r"/reconstruction", "Negative log p(x | z), in nats per image; lower is better."),
    (r"/kl", "KL of all layers together, in nats per image."),
    (
        r"train/loss",
        "What is minimised, in nats: the negative ELBO with free bits and KL weight, or the "
        "negative importance-weighted bound.",
    ),
    (r"train/gradient_norm", "Global norm of the gradient before clipping."),
    (r"train/learning_rate", "Learning rate of the optimiser."),
    (r"train/kl_weight", "Weight of the KL in the loss, from 0 to 1."),
    (r"train/images_per_second", "Training images per second, without evaluations."),
    (r"train/skipped_updates", "Number of updates skipped since the start of the run."),
    (r"train/gradient_spikes", "Number of updates skipped because their gradient exploded."),
    (r"train_kl_collapsed/layer_(?P<n>\d+)", "1 if the KL of layer {n} has collapsed, else 0."),
    (r"_kl/layer_(?P<n>\d+)", "KL of layer {n} in nats per image; layer 1 is the bottom."),
    (
        r"_active_channels/layer_(?P<n>\d+)",
        f"Number of latent channels of layer {{n}} with a mean KL above {ACTIVE_KL} nats; layer 1 "
        "is the bottom.",
    ),
    (r"samples", "Images drawn from the model, on [0, 1]."),
    (
        r"reconstructions",
        "Held-out images (originals) and their reconstructions from one sample of the posterior.",
    ),
)


def description(tag: str) -> str:
    """One line about a tag; empty for an unknown one."""
    for pattern, text in _DESCRIPTIONS:
        if match := re.search(f"{pattern}$", tag):
            found = match.groupdict()
            return text.format(n=f"{int(found['n']):,}") if found else text
    return ""
