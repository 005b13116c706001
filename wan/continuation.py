"""The mixin that continues videos (`v2v` and its helpers), and `chain()`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wan import media
from wan.captioner import Captioner, build_transform, compose_prompt, dynamic_preprocess, open_captioner
from wan.configs import ModelConfig
from wan.errors import UserError
from wan.pipeline import Pipeline, draw_seed
from wan.placement import parse_device, same_device
from wan.types import (
    Footage,
    Frame,
    Generation,
    Geometry,
    OnStep,
    Request,
    Sampling,
    Step,
    UInt8Array,
    frame_size,
)

QUESTION = "Describe this video in detail."
VLM_NAME = "InternVL3_5-8B"
VLM_HUB_ID = f"OpenGVLab/{VLM_NAME}"


class VideoFile:
    """A video file as `Footage`. Opening it reads its last frame; raises UserError when it has none."""

    def __init__(self, path: str | Path, reader: str = "auto") -> None:
        self.path = Path(path)
        self.reader = reader
        image = media.read_last_frame(self.path)
        if reader == "decord":
            media.check_last_frame_with_decord(self.path, image)
        self.last: Frame = image

    def samples(self, count: int) -> UInt8Array:
        """`count` frames spread over the file, uint8 [count, H, W, 3]."""
        return media.sample_frames(self.path, count, reader=self.reader)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a video is continued; the same for every clip of a chain.

    `prompt` is used as it is; without one each clip is described. `prefix` goes before either.
    """

    geometry: Geometry
    sampling: Sampling
    negative: str
    prompt: str | None = None
    prefix: str = ""
    num_segments: int = 8
    offload: bool = True

    def __post_init__(self) -> None:
        if self.num_segments < 1:
            raise UserError(f"num_segments must be at least 1, {self.num_segments} is not")


class VideoContinuation(Pipeline):
    """Adds `v2v` and the captioner to a model that generates from an image.

    Constructor arguments beyond Wan2.2's: `vlm_path` (folder or hub id; default: a folder InternVL3_5-8B in or beside
    the checkpoint folder, else that model on the hub), `vlm_device` (default: the model's own), `vlm_url` (an
    OpenAI-compatible endpoint instead of a local model), `vlm_question`, `vlm_trust_remote_code` and `video_reader`.
    """

    fit: Callable[[int, int, int], tuple[int, int]]  # width, height, max_area -> width, height

    def __init__(
        self,
        config: ModelConfig,
        checkpoint_dir: str | Path,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_sp: bool = False,
        t5_cpu: bool = False,
        init_on_cpu: bool = True,
        convert_model_dtype: bool = False,
        vlm_path: str | Path | None = None,
        vlm_device: str | torch.device | None = None,
        *,
        vlm_url: str | None = None,
        vlm_question: str = QUESTION,
        vlm_trust_remote_code: bool = False,
        video_reader: str = "auto",
    ) -> None:
        super().__init__(
            config,
            checkpoint_dir,
            device_id,
            rank,
            t5_fsdp,
            dit_fsdp,
            use_sp,
            t5_cpu,
            init_on_cpu,
            convert_model_dtype,
        )
        # an endpoint serves what it serves; a name is sent only when it is given
        self.vlm_path = vlm_path or (None if vlm_url else default_vlm(self.checkpoint.folder))
        self.vlm_device = self.device if vlm_device is None else parse_device(str(vlm_device))
        self.vlm_url = vlm_url
        self.vlm_question = vlm_question
        self.vlm_trust_remote_code = vlm_trust_remote_code
        self.video_reader = video_reader

    def v2v(
        self,
        video_path: str | Path,
        prompt: str | None = None,
        max_area: int | None = None,
        frame_num: int | None = None,
        shift: float | None = None,
        sample_solver: str = "unipc",
        sampling_steps: int | None = None,
        guide_scale: float | tuple[float, float] | None = None,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        custom_prompt: str | None = None,
        num_segments: int = 8,
        *,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, str]:
        """Continue a video file -> (video float32 [3, T, H, W] in [-1, 1], the prompt that was used).

        The video starts with the file's last frame. Without `prompt` the VLM describes the file, after
        `custom_prompt` if that is given. What is None comes from the config. Raises UserError.
        """
        footage = VideoFile(video_path, self.video_reader)
        plan = self.plan(
            footage,
            max_area=max_area,
            frame_num=frame_num,
            shift=shift,
            solver=sample_solver,
            steps=sampling_steps,
            guidance=guide_scale,
            negative=n_prompt,
            prompt=prompt,
            prefix=custom_prompt or "",
            num_segments=num_segments,
            offload=offload_model,
        )
        made = self.extend(footage, draw_seed(seed), plan, on_step)
        return made.video, made.request.prompt

    def plan(
        self,
        footage: Footage,
        *,
        max_area: int | None = None,
        frame_num: int | None = None,
        shift: float | None = None,
        solver: str = "unipc",
        steps: int | None = None,
        guidance: float | tuple[float, float] | None = None,
        negative: str = "",
        **rest: Any,
    ) -> Plan:
        """A plan that fits the footage: its aspect within `max_area` pixels. None means the config's value."""
        config = self.config
        if max_area is None:
            width, height = (int(side) for side in config.sizes[0].split("*"))
            max_area = width * height
        size = self.fit(*frame_size(footage.last), max_area)
        return Plan(
            self.geometry(*size, config.frame_num if frame_num is None else frame_num),
            self.sampling(
                config.sample_steps if steps is None else steps,
                config.sample_shift if shift is None else shift,
                solver,
                config.guidance if guidance is None else guidance,
            ),
            negative or config.sample_neg_prompt,
            **rest,
        )

    def extend(self, footage: Footage, seed: int, plan: Plan, on_step: OnStep | None = None) -> Generation:
        """One clip that goes on from the footage's last frame, with the description of the footage as its prompt."""
        if on_step is not None and plan.prompt is None:
            on_step(Step(0, plan.sampling.steps, "caption"))
        start = time.perf_counter()
        prompt = self.prompt_for(footage, plan)
        seconds = {"caption": time.perf_counter() - start} if plan.prompt is None else {}
        request = Request(prompt, plan.negative, footage.last, plan.geometry, plan.sampling, seed)
        made = self.run(request, offload=plan.offload, on_step=on_step)
        return dataclasses.replace(made, seconds=seconds | dict(made.seconds))

    def prompt_for(self, footage: Footage, plan: Plan) -> str:
        """The plan's prompt, or the description of the footage cut to what the text encoder takes; prefix first."""
        if plan.prompt is not None:
            return f"{plan.prefix} {plan.prompt}".strip()
        summary = self._describe(footage.samples(plan.num_segments))
        return compose_prompt(plan.prefix, summary, self.tokenizer.count, self.config.text_len)

    @cached_property
    def captioner(self) -> Captioner:
        """The VLM behind the descriptions; it loads at its first use."""
        return open_captioner(
            self.vlm_path, url=self.vlm_url, device=self.vlm_device, trust_remote_code=self.vlm_trust_remote_code
        )

    def _describe(self, frames: UInt8Array, question: str | None = None) -> str:
        summary = self.captioner.describe(frames, question or self.vlm_question)
        if self.device.type == "cuda" and same_device(self.vlm_device, self.device):
            self.captioner.close()  # the diffusion model needs the memory
        return summary

    # The helpers that scripts may call by these names.

    def _load_vlm(self) -> Captioner:
        """The captioner, opened and checked; its weights load at the first description."""
        return self.captioner

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
        return self._describe(media.sample_frames(video_path, num_segments, reader=self.video_reader), question)


def default_vlm(checkpoint: Path) -> str:
    """The folder InternVL3_5-8B in or beside the checkpoint folder, else the hub id."""
    for folder in (checkpoint / VLM_NAME, checkpoint.resolve().parent / VLM_NAME):
        if folder.is_dir():
            return str(folder)
    return VLM_HUB_ID


def chain(
    start: Footage,
    *,
    count: int,
    extend: Callable[[Footage, int], Generation],
    seed: int,
    finished: Mapping[int, Footage] = MappingProxyType({}),
    seeds: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[Generation]:
    """`count` clips, each going on from the one before; clip i, counted from 0, is made with seed + i.

    Every clip is handed out as soon as it is made, and the next one starts from its frames as they are in memory.
    `finished` holds clips, by i, that are there already and are gone on from; `seeds` other seeds than seed + i.
    """
    footage = start
    for index in range(count):
        if index in finished:
            footage = finished[index]
            continue
        made = extend(footage, seeds.get(index, seed + index))
        yield made
        footage = made.clip
