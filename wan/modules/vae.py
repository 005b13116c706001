"""The VAEs under Wan2.2's path."""

from wan.vae.vae import Wan2_1_VAE, Wan2_2_VAE

__all__ = ["Wan2_1_VAE", "Wan2_2_VAE"]
