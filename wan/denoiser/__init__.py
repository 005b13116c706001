"""The denoiser: its model, its sampling and its speed. A torchvision that cannot be imported is hidden first."""

from wan.compat import hide_broken_torchvision

hide_broken_torchvision()
