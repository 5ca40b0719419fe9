"""The networks that model and guide are built from, and the configuration of their architecture."""

from ladder_vae.networks.config import LadderConfig as LadderConfig
