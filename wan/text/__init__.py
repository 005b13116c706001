"""Prompts and embeddings. A torchvision that cannot be imported would break the library; it is hidden first."""

from wan.compat import hide_broken_torchvision

hide_broken_torchvision()
