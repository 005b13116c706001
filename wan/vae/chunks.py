"""How large the chunks are in which a VAE computes a clip: arithmetic that needs no PyTorch."""

from __future__ import annotations

_WIDEST = 640 << 20  # what the widest activation of a chunk may take, a fifth of all that it takes
FIRST, PER_LATENT = 1, 4  # pixel frames of the first latent frame, and of each one after it


def widest(channels: int, patch: int, height: int, width: int) -> int:
    """Numbers in the largest activation of one latent frame: where the decoder doubles the size for the last time,
    with twice the channels of its last stage."""
    return PER_LATENT * 2 * channels * height * width // patch**2


def chunk_for(size: int) -> int:
    """How many latent frames to compute at a time when the widest activation of one takes `size` bytes.

    0: single frames where it is widest.
    """
    return _WIDEST // size
