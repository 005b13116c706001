"""`upscale`: a larger video of the finished one, for both commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wan import media
from wan.chain.dry_run import MP4_BYTES, size_in_words
from wan.chain.run_folder import JOINED, UPSCALED
from wan.commands.job import Job
from wan.commands.outputs import upscaled_name
from wan.commands.progress import Progress
from wan.device.hardware import main_device
from wan.files import file_digest
from wan.types import Geometry, Step
from wan.upscaling import made_of, open_upscaler, upscale

if TYPE_CHECKING:
    from wan.chain.run import ChainRun


class Upscaling:
    """The model of `upscale`, opened before hours of work for clips of a size. Raises UserError."""

    def __init__(self, job: Job, geometry: Geometry) -> None:
        assert job.settings.upscale is not None
        self._job = job
        self.upscaler = open_upscaler(job.settings.upscale)
        self.size = self.upscaler.size(geometry.width, geometry.height)

    def outline(self, name: str, frames: int) -> str:
        """The line of the dry run for a larger video of so many frames."""
        width, height = self.size
        size = size_in_words(MP4_BYTES * width * height * frames)
        return f"{name}: {width}x{height} by {self.upscaler.file.name}, about {size}"

    def of_chain(self, run: ChainRun, watch: Callable[[str, int, bool], Progress]) -> Path:
        """The larger video of a finished chain's joined one. Raises UserError.

        One that is there and is of the same is kept. One of the beginning of the same is replaced, like the joined
        video; any other file of that name moves to `redone/`.
        """
        folder, of = run.folder, list(run.joined.made_of)
        joined, target = folder.path / JOINED, folder.path / UPSCALED[0]
        before = made_of(target, self.upscaler)
        if before == of:
            return target
        if not (isinstance(before, list) and before and before == of[: len(before)]):
            folder.set_aside(*UPSCALED)
        with self._progress(joined, watch) as on_frame:
            upscale(joined, target, self.upscaler, self._device, of=of, metadata=self._metadata, on_frame=on_frame)
        return target

    def of_clip(self, video: Path, watch: Callable[[str, int, bool], Progress]) -> Path:
        """The larger video of a single one."""
        target = upscaled_name(video)
        with self._progress(video, watch) as on_frame:
            of = file_digest(video)
            upscale(video, target, self.upscaler, self._device, of=of, metadata=self._metadata, on_frame=on_frame)
        return target

    @property
    def _device(self) -> torch.device:
        return main_device(self._job.world.local_rank)

    @property
    def _metadata(self) -> bool:
        return not self._job.settings.no_video_metadata

    @contextmanager
    def _progress(self, video: Path, watch: Callable[[str, int, bool], Progress]) -> Iterator[Callable[[], None]]:
        """A bar of the frames, and what is called for each."""
        info = media.probe(video)
        total, done = round((info.duration or 0) * info.fps), 0

        with watch(video.name, 0, self._job.settings.quiet) as progress:

            def on_frame() -> None:
                nonlocal done
                progress(Step(done, total, "upscale"))
                done += 1

            yield on_frame
