"""`WanV2V`."""

from wan.continuation import VideoContinuation
from wan.image2video import WanI2V


class WanV2V(VideoContinuation, WanI2V):
    """Continue a video with the A14B experts: `v2v`, or `plan` and `extend`.

        pipeline = WanV2V(config_for("v2v-14B", folder), folder)
        video, prompt = pipeline.v2v("input.mp4", seed=7)

    Constructor arguments are those of `wan.continuation.VideoContinuation`. `close()` frees the models' memory.
    """
