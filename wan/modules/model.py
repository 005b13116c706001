"""`WanModel` under Wan2.2's path."""

from wan.denoiser.model import WanModel

__all__ = ["WanModel"]
