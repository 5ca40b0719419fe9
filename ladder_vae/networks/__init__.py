"""The networks that model and guide are made of."""

from ladder_vae.networks.config import LadderConfig as LadderConfig
