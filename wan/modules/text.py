"""The text encoder under Wan2.2's path."""

from wan.text.umt5 import TextEncoder

__all__ = ["TextEncoder"]
