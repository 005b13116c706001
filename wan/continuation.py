"""The mixin that continues videos: `v2v` and its helpers."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan.candidates import CandidateMaker, Draft, is_better, score_seam_later, seam_score
from wan.caption_helpers import CaptionHelpers
from wan.captioner import Captioner
from wan.chain.plan import Plan
from wan.colour_carry import colours_of_shot
from wan.configs import ModelConfig
from wan.detail import heard_by
from wan.device.hardware import parse_device
from wan.fitted_frames import FittedFrames
from wan.footage import FramesInMemory, VideoFile
from wan.options import CANDIDATE_STEP, QUESTION
from wan.pipeline import Pipeline
from wan.planning import Loras, Planner
from wan.prompting import CaptionerOwner, ClipPrompt, PromptBuilder
from wan.settings import Context, draw_seed
from wan.stopwatch import detail_to
from wan.types import Clip, Footage, Frame, Generation, OnStep, Step, UInt8Array
from wan.weights.checkpoint import default_vlm

Video: TypeAlias = "str | Path | Footage | UInt8Array | list[Image.Image] | tuple[Image.Image, ...]"


class VideoContinuation(CaptionHelpers, Pipeline):
    """Adds `v2v` and the captioner to a model that generates from an image.

    Constructor arguments beyond Wan2.2's: `vlm_path` (folder or hub id; default: a folder InternVL3_5-8B in or beside
    the checkpoint folder, else that model on the hub), `vlm_device` (default: the model's own), `vlm_url` (an
    OpenAI-compatible endpoint instead of a local model), `vlm_question`, `vlm_fallback`,
    `vlm_trust_remote_code` and `video_reader`; `dit_files` and `part_files` as in `Pipeline`.
    """

    fit: Callable[[int, int, int], tuple[int, int]]  # width, height, max_area -> width, height
    frame_for: Callable[[Frame, int, int], Tensor]  # picture, width, height -> float32 [3, height, width]

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
        vlm_fallback: str | None = None,
        vlm_trust_remote_code: bool = False,
        video_reader: str = "auto",
        dit_files: Mapping[str, str | Path] = MappingProxyType({}),
        part_files: Mapping[str, str | Path] = MappingProxyType({}),
        compile_blocks: bool = True,
        vram: float | Literal["auto"] | None = None,
        host_memory: float | Literal["auto"] = "auto",
        share_weights: int = 1,
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
            dit_files=dit_files,
            part_files=part_files,
            compile_blocks=compile_blocks,
            vram=vram,
            host_memory=host_memory,
            share_weights=share_weights,
        )
        self.vlm: CaptionerOwner = CaptionerOwner(
            # an endpoint serves what it serves; a name is sent only when it is given
            vlm_path or (None if vlm_url else default_vlm(self.checkpoint.folder)),
            url=vlm_url,
            question=vlm_question,
            fallback=vlm_fallback,
            trust_remote_code=vlm_trust_remote_code,
            main=self.device,
            device=None if vlm_device is None else parse_device(str(vlm_device)),
            vram=self.budget.vram,
        )
        self.prompts = PromptBuilder(self.vlm, self.tokenizer.count, config.text_len, self.fps)
        self.video_reader: str = video_reader
        self.frames = FittedFrames(self.frame_for, self.fps)
        self.plan = Planner(
            self.rules, self.models, self.fit, lambda *size: self.geometry(*size), lambda plan: self._check_memory(plan)
        )

    def close(self) -> None:
        """As `Pipeline.close`, the captioner too."""
        self.vlm.forget()
        super().close()

    def v2v(
        self,
        video_path: Video,
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
        fps: float | Fraction | None = None,
        on_step: OnStep | None = None,
        guidance_interval: tuple[float, float] | None = None,
        cache: str | None = None,
        preset: str = "quality",
        context: Context | int | None = None,
        anchor: Frame | None = None,
        end: Frame | None = None,
        loras: Loras = (),
        prompt_mode: str = "describe",
        motion_amplitude: float = 1.0,
        drift_correction: float = 0.0,
        best_of: int = 1,
    ) -> tuple[Tensor, str]:
        """Continue a video -> (video float32 [3, T, H, W] in [-1, 1], the prompt that was used).

        `video_path` is a file, frames uint8 [T, H, W, 3] (a list of pictures too) at `fps`, which is the model's unless
        it is given, or any `Footage`. The video starts with the last frame; with a longer `context`, 5, 9, 13 or 17,
        with that many of the last frames. Without `prompt` the VLM describes the video, after `custom_prompt` if that
        is given. What is None comes from the config. The other arguments are those of `plan`, see `Planner`; with
        a `preset` its solver takes the place of 'unipc'. Raises UserError.
        """
        footage = self.footage(video_path, fps)
        plan = self.plan(
            footage,
            max_area=max_area,
            frame_num=frame_num,
            shift=shift,
            solver=None if sample_solver == "unipc" else sample_solver,  # the default is no choice against a preset
            steps=sampling_steps,
            guidance=guide_scale,
            guidance_interval=guidance_interval,
            cache=cache,
            preset=preset,
            negative=n_prompt,
            prompt=prompt,
            prefix=custom_prompt or "",
            num_segments=num_segments,
            offload=offload_model,
            context=context,
            anchor=anchor,
            end=end,
            loras=loras,
            prompt_mode=prompt_mode,
            motion_amplitude=motion_amplitude,
            drift_correction=drift_correction,
            best_of=best_of,
        )
        if not self.team.is_first:
            self.follow(len(plan.candidates))
            return None, None  # type: ignore[return-value]  # in other processes than that of rank 0, as in Wan2.2
        made = self.extend(footage, draw_seed(seed), plan, on_step)
        return made.video, made.request.prompt

    def footage(self, video: Video, fps: float | Fraction | None = None) -> Footage:
        """What can be continued: a file, frames at `fps` (the model's unless given), or what is footage already."""
        if isinstance(video, str | Path):
            return VideoFile(video, self.video_reader)
        if isinstance(video, np.ndarray | list | tuple):
            return FramesInMemory(video, self.fps if fps is None else fps)
        return video

    def _check_memory(self, plan: Plan) -> None:
        if self.budget.vram is None or plan.loras:  # else `geometry` has seen to it
            self.budget_for(plan.geometry, plan.offload, plan.loras).check(plan.geometry)
        if plan.described:
            self.vlm.expect(plan.num_segments)
        self.host_plan(plan.geometry, plan.loras, self.vlm.host_bytes if plan.described else 0)

    @property
    def fps(self) -> Fraction:
        """Frames per second of what the model makes."""
        return Fraction(self.config.sample_fps)

    def extend(
        self,
        footage: Footage,
        seed: int,
        plan: Plan,
        on_step: OnStep | None = None,
        *,
        memory: Mapping[str, Any] = MappingProxyType({}),
        draft: Draft | None = None,
        on_take: Callable[[int, Generation], None] | None = None,
    ) -> Generation:
        """One clip that goes on from the footage. `memory` is what the clip before noted under that name.

        What is in the `draft` is not made again, and what sampling comes to is kept there. `on_take` gets each of the
        candidates of a plan that keeps them, with its number from 1.
        """
        plan = self.frames.with_available_context(footage, plan)
        prompt = None if draft is None else draft.prompt
        if prompt is None:
            prompt = self._caption(footage, plan, memory, on_step)
        if on_step is not None:
            on_step(Step(0, plan.sampling.steps, "prompt", prompt=prompt.text))
        caption = {"caption": prompt.seconds} if plan.described else {}
        start, handed = self.frames.hand_off(footage, plan, None if draft is None else draft.handed)
        stride = self.config.vae_stride[0]
        maker = CandidateMaker(self.run, self.frames, stride, self.device, start, prompt, plan, on_step, draft, handed)

        def finish(made: Generation, seconds: Mapping[str, float], **notes: Any) -> Generation:
            return dataclasses.replace(
                made,
                seconds=caption | dict(seconds),
                dropped=plan.dropped,
                context_frames=plan.context.frames,
                prompt_memory=prompt.memory,
                handed=handed,
                colours=colours_of_shot(footage, made, is_cut=plan.is_cut) if plan.colour_carry else None,
                notes=dict(prompt.notes) | dict(made.notes) | notes,
            )

        seconds, candidates, kept = Counter[str](), [], None
        for number in plan.candidates:
            made = maker.make(seed + (number - 1) * CANDIDATE_STEP)
            made = dataclasses.replace(made, score_seam=score_seam_later(self.frames, footage, made, plan))
            seconds.update(made.seconds)
            if on_take is not None and plan.keeps_takes:
                on_take(number, finish(made, made.seconds))
            if len(plan.candidates) == 1:
                return finish(made, made.seconds)
            candidates.append({"seed": made.request.seed, "score": None if plan.is_cut else seam_score(made)})
            if kept is None or number == plan.take or (plan.take is None and is_better(made, kept)):
                kept = made
        assert kept is not None  # there are candidates
        return finish(kept, seconds, candidates=candidates)

    def _caption(self, footage: Footage, plan: Plan, memory: Mapping[str, Any], on_step: OnStep | None) -> ClipPrompt:
        """The clip's prompt. Where the VLM writes it, what is in its way leaves first, what is next loads beside."""
        if not plan.described:
            return self.build_prompt(footage, plan, memory)
        if on_step is not None:
            on_step(Step(0, plan.sampling.steps, "caption"))
        start, host_bytes = time.perf_counter(), self.vlm.host_bytes
        host = self.host_plan(plan.geometry, plan.loras, host_bytes)
        self.vlm.takes_turns = host.in_turn and host_bytes > 0
        self.models.live_by(host)  # where they take turns, they leave before it comes
        with heard_by(detail_to(on_step, lambda: 0, plan.sampling.steps, "caption")), ExitStack() as beside:
            if self.vlm.leaves_the_disk_alone:
                with self.models.read_ahead():
                    self.vlm.load(plan.num_segments)  # by itself: its library builds it with settings of the process
                first = self.first_expert(plan.sampling)
                beside.enter_context(self._loading(plan.loras, "text_encoder", "vae", first))
            prompt = self.build_prompt(footage, plan, memory)
        return dataclasses.replace(prompt, seconds=time.perf_counter() - start)

    def build_prompt(
        self, footage: Footage, plan: Plan, memory: Mapping[str, Any] = MappingProxyType({})
    ) -> ClipPrompt:
        """The clip's prompt, see `PromptBuilder.build`; after a cut to a picture that picture is described."""
        if plan.cut is not None and not isinstance(plan.cut, bool):
            picture = self.frames.picture(plan.cut, plan.geometry)
            footage = Clip(picture[None].permute(0, 2, 3, 1), self.fps)

        def stays() -> bool:
            """The captioner describes again after this clip, which fits beside it."""
            budget = self.budget_for(plan.geometry, plan.offload, plan.loras)
            return plan.number < plan.count and budget.fits_now(plan.geometry, plan.offload, self.models.loaded)

        return self.prompts.build(footage, plan, stays, memory)

    @property
    def captioner(self) -> Captioner:
        """The VLM behind the descriptions; it loads at its first use."""
        return self.vlm.captioner
