"""`WanV2V5B`."""

from wan.continuation import VideoContinuation
from wan.textimage2video import WanTI2V


class WanV2V5B(VideoContinuation, WanTI2V):
    """Continue a video with the 5B model: `v2v`, or `plan` and `extend`.

        pipeline = WanV2V5B(config_for("v2v-5B", folder), folder)
        video, prompt = pipeline.v2v("input.mp4", seed=7)

    Constructor arguments are those of `wan.continuation.VideoContinuation`. `close()` frees the models' memory.
    """
