"""`WanV2V5B`."""

from wan.continuation import VideoContinuation
from wan.textimage2video import WanTI2V


class WanV2V5B(VideoContinuation, WanTI2V):
    """Continue a video with the 5B model."""
