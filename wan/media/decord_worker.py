"""Run as a script, in a process that can be killed: `decord_worker.py VIDEO COUNT` writes raw frames to stdout.

decord can spin or dead-lock for ever inside native code, and only the end of the process ends that. It is started by
its file name, so that neither this package nor its FFmpeg libraries are loaded beside decord's own.
COUNT 0 asks for the last frame. Output: one line "T H W", then T*H*W*3 bytes of RGB.
"""

from __future__ import annotations

import sys
from importlib import import_module


def main() -> None:
    path, count = sys.argv[1], int(sys.argv[2])
    decord = import_module("decord")  # optional, and without type stubs

    video = decord.VideoReader(path, num_threads=1)
    total = len(video)
    wanted = [(2 * slice_ + 1) * total // (2 * count) for slice_ in range(count)] if count else [total - 1]
    frames = video.get_batch(wanted).asnumpy()
    sys.stdout.buffer.write("{} {} {}\n".format(*frames.shape).encode() + frames.tobytes())


if __name__ == "__main__":
    main()
