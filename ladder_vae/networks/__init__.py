"""The building blocks of model and guide, and the configuration of their architecture."""

from ladder_vae.networks.config import LadderConfig as LadderConfig
