"""`WanV2V`."""

from wan.continuation import VideoContinuation
from wan.image2video import WanI2V


class WanV2V(VideoContinuation, WanI2V):
    """Continue a video with the A14B experts."""
