"""The five methods under whose names scripts use the VLM and a file's last frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from wan import media
from wan.captioner import Captioner, build_transform, dynamic_preprocess
from wan.prompting import CaptionerOwner


class CaptionHelpers:
    """For a class with a captioner, `vlm`, and the name of how its videos are read, `video_reader`."""

    vlm: CaptionerOwner
    video_reader: str

    def _load_vlm(self) -> Captioner:
        """The captioner, opened and checked; its weights load at the first description."""
        return self.vlm.captioner

    def _build_vlm_transform(self, input_size: int = 448) -> Callable[[Image.Image], Tensor]:
        """A function: PIL image -> float32 [3, input_size, input_size], normalised for the VLM."""
        return build_transform(input_size)

    def _vlm_dynamic_preprocess(
        self,
        image: Image.Image,
        min_num: int = 1,
        max_num: int = 12,
        image_size: int = 448,
        use_thumbnail: bool = False,
    ) -> list[Image.Image]:
        """InternVL's tiles of an image, each image_size x image_size."""
        return dynamic_preprocess(
            image, min_num=min_num, max_num=max_num, image_size=image_size, use_thumbnail=use_thumbnail
        )

    def _extract_last_frame(self, video_path: str | Path) -> Image.Image:
        """The exact last displayed frame of a file, RGB and upright. Raises UserError."""
        return media.read_last_frame(video_path)

    def _summarize_video(self, video_path: str | Path, num_segments: int = 8, question: str | None = None) -> str:
        """What the VLM says about a file. Raises UserError."""
        described = self.vlm.describe(media.sample_frames(video_path, num_segments, reader=self.video_reader), question)
        self.vlm.make_room(stays=lambda: False)
        return described.text
