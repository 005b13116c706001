"""The parts of a model. A torchvision that cannot be imported would break the libraries below; it is hidden first."""

from wan.compat import hide_broken_torchvision

hide_broken_torchvision()
