"""The mixin that continues videos: `v2v` and its helpers."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan import media
from wan.captioner import Captioner, build_transform, dynamic_preprocess
from wan.chain.plan import Plan
from wan.colour_carry import colours_of_shot, lead_to
from wan.configs import ModelConfig
from wan.detail import heard_by
from wan.device.hardware import parse_device
from wan.errors import UserError
from wan.footage import ChangedEnd, FramesInMemory, VideoFile, choose_anchor
from wan.handoff import check_program, hand_off
from wan.options import CANDIDATE_STEP, LONGEST_CONTEXT, QUESTION
from wan.pipeline import Pipeline, draw_seed
from wan.prompting import CaptionerOwner, ClipPrompt, PromptBuilder
from wan.quality import correct_drift, score_seam
from wan.settings import Context, LoraFile, check_end_image, check_motion_amplitude
from wan.stopwatch import Stopwatch, detail_to
from wan.types import (
    Clip,
    Footage,
    Frame,
    Generation,
    KnownFrames,
    OnStep,
    Request,
    Sampled,
    Step,
    UInt8Array,
    frame_size,
)
from wan.weights.checkpoint import default_vlm

log = logging.getLogger(__name__)


Video: TypeAlias = "str | Path | Footage | UInt8Array | list[Image.Image] | tuple[Image.Image, ...]"
OneOrMore: TypeAlias = "LoraFile | str | Path | Sequence[LoraFile | str | Path]"
Loras: TypeAlias = "OneOrMore | Mapping[str, OneOrMore]"


def _lora_files(given: OneOrMore) -> tuple[LoraFile, ...]:
    files = [given] if isinstance(given, LoraFile | str | Path) else given
    return tuple(file if isinstance(file, LoraFile) else LoraFile.parse(str(file)) for file in files)


class _Once:
    """A mapping that is computed when it is first called for; what it is computed from is let go then."""

    def __init__(self, compute: Callable[[], Mapping[str, Any]]) -> None:
        self._compute: Callable[[], Mapping[str, Any]] | None = compute
        self._value: Mapping[str, Any] = {}
        self._lock = Lock()

    def __call__(self) -> Mapping[str, Any]:
        with self._lock:
            if self._compute is not None:
                self._value, self._compute = self._compute(), None
            return self._value


class Draft(Protocol):
    """Where what is known of an unfinished clip is kept, see `wan.chain.draft.ClipDraft`."""

    @property
    def prompt(self) -> ClipPrompt | None:
        """The prompt that its candidates are made with, None before the first of them is sampled."""

    @property
    def handed(self) -> Tensor | None:
        """The known frames of its candidates [n, H, W, 3] as a program has left them, None before that."""

    def find(self, seed: int) -> Sampled | None:
        """What sampling the candidate with this seed came to, None for one that is to be sampled."""

    def keep(self, seed: int, sampled: Sampled, prompt: ClipPrompt, handed: Tensor | None) -> None:
        """Keep what sampling came to, and what it began with."""


class VideoContinuation(Pipeline):
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
        is given. What is None comes from the config. The other arguments are those of `plan`; with a `preset` its
        solver takes the place of 'unipc'. Raises UserError.
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

    def plan(
        self,
        footage: Footage,
        *,
        max_area: int | None = None,
        frame_num: int | None = None,
        shift: float | None = None,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | tuple[float, float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        cache: str | None = None,
        preset: str = "quality",
        negative: str = "",
        context: Context | int | None = None,
        anchor: Frame | None = None,
        end: Frame | None = None,
        cut: Frame | bool | None = None,
        loras: Loras = (),
        prompt: str | None = None,
        prefix: str = "",
        prompt_mode: str = "describe",
        num_segments: int = 8,
        motion_amplitude: float = 1.0,
        discard: int = 0,
        handoff: str | None = None,
        fade: int = 0,
        drift_correction: float = 0.0,
        colour_carry: float = 0.0,
        best_of: int = 1,
        keeps_takes: bool = False,
        offload: bool = True,
        number: int = 1,
        count: int = 1,
    ) -> Plan:
        """A plan that fits the footage: its aspect within `max_area` pixels. None means the preset's or config's value.

        `context` may be a number of known frames. `loras` are files, as `LoraFile` or as text PATH[:STRENGTH]: one or
        several for a model with one denoiser, and by the name of the expert ("high_noise_model", "low_noise_model")
        for one with two. The rest are fields of `Plan`. Raises UserError.
        """
        config = self.config
        if max_area is None:
            width, height = (int(side) for side in config.sizes[0].split("*"))
            max_area = width * height
        size = self.fit(*frame_size(footage.last), max_area)
        context = Context.choose(None, context) if isinstance(context, int) else context or Context()
        if context.mode == "svi2pro" and anchor is None:
            anchor = choose_anchor(footage)
        plan = Plan(
            self.geometry(*size, config.frame_num if frame_num is None else frame_num),
            self.sampling(
                steps,
                shift,
                solver,
                guidance,
                guidance_interval=guidance_interval,
                cache=cache,
                preset=preset,
            ),
            negative or config.sample_neg_prompt,
            context=context,
            anchor=anchor,
            end=end,
            loras=self._loras(loras),
            preset=preset,
            prompt=prompt,
            prefix=prefix,
            prompt_mode=prompt_mode,
            num_segments=num_segments,
            motion_amplitude=motion_amplitude,
            discard=discard,
            handoff=handoff,
            fade=fade,
            drift_correction=drift_correction,
            colour_carry=colour_carry,
            best_of=best_of,
            keeps_takes=keeps_takes,
            cut=cut,
            offload=offload,
            number=number,
            count=count,
        )
        if handoff is not None:
            check_program(handoff)
        self.check(plan)
        return plan

    def _loras(self, given: Loras) -> dict[str, tuple[LoraFile, ...]]:
        """LoRA files by the expert that they are for. Raises UserError."""
        if not isinstance(given, Mapping):
            experts = sorted(self.checkpoint.experts)
            if given and len(experts) > 1:
                raise UserError(f"loras: give them by expert, {{{experts[0]!r}: …, {experts[1]!r}: …}}")
            given = {experts[0]: given}
        return {name: files for name, one in given.items() if (files := _lora_files(one))}

    def check(self, plan: Plan) -> None:
        """Raise UserError for a plan that this model cannot follow. LoRA files are looked at, not loaded."""
        two_experts = self.config.model_type == "i2v"
        if self.budget.vram is None:  # else `geometry` has seen to it
            self.budget.for_clip(plan.geometry, plan.offload).check(plan.geometry)
        self.host_plan(plan.geometry, plan.loras, self.vlm.host_bytes if plan.described else 0)
        if plan.context.mode == "svi2pro" and not two_experts:
            raise UserError(f"`continuation` svi2pro is for I2V-A14B; use tail with {self.config.name}")
        if plan.end is not None:
            check_end_image(self.config, plan.geometry.frames, plan.leading, plan.context.mode)
        check_motion_amplitude(plan.motion_amplitude, self.config, plan.context.mode)
        if plan.cut is True and two_experts:
            raise UserError("cut: true makes a clip of text alone, which I2V-A14B cannot; give a picture to cut to")
        if plan.cut is True and plan.prompt is None:
            raise UserError("cut: true makes a clip of text alone: give it a prompt")
        self.models.check_loras(plan.loras)
        self.check_distilled(plan.preset, plan.loras)
        self._check_pairing(plan)

    def _check_pairing(self, plan: Plan) -> None:
        """SVI's layout needs its LoRAs and they need it; which of its versions a file is, only its name can tell."""
        found = [file.path.name for files in plan.loras.values() for file in files if file.is_svi]
        if plan.context.mode == "svi2pro":
            if not all(plan.loras.get(expert) for expert in self.checkpoint.experts):
                raise UserError("`continuation` svi2pro needs its pair of LoRAs: give `lora_high` and `lora_low`")
            if not found:
                log.warning("no name of the LoRAs says SVI; svi2pro makes noise without the 2.0 Pro pair")
            if wrong := [name for name in found if "pro" not in name.lower()]:
                raise UserError(f"{wrong[0]} is of another SVI version; svi2pro needs the 2.0 Pro pair")
        elif found:
            raise UserError(f"{found[0]} is trained for another conditioning; use it with `continuation` svi2pro")

    @property
    def fps(self) -> Fraction:
        """Frames per second of what the model makes."""
        return Fraction(self.config.sample_fps)

    def with_available_context(self, footage: Footage, plan: Plan) -> Plan:
        """The plan with no more known frames than the footage has at the model's rate."""
        if plan.context.mode != "tail" or plan.is_cut:
            return plan
        context = plan.context.within(len(footage.tail(plan.context.frames, self.fps)))
        if context != plan.context:
            log.warning("the video is too short for %d known frames: %d", plan.context.frames, context.frames)
        return dataclasses.replace(plan, context=context)

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
        plan = self.with_available_context(footage, plan)
        prompt = None if draft is None else draft.prompt
        if prompt is None:
            if on_step is not None and plan.described:
                on_step(Step(0, plan.sampling.steps, "caption"))
            if plan.described and self.vlm.host_bytes:
                host = self.host_plan(plan.geometry, plan.loras, self.vlm.host_bytes)
                self.vlm.takes_turns = host.in_turn
                if host.in_turn:
                    self.models.live_by(host)  # they leave before it comes
            ahead = self.models.read_ahead() if plan.described and self.vlm.leaves_the_disk_alone else nullcontext()
            with ahead, heard_by(detail_to(on_step, lambda: 0, plan.sampling.steps, "caption")):
                prompt = self.build_prompt(footage, plan, memory)
        if on_step is not None:
            on_step(Step(0, plan.sampling.steps, "prompt", prompt=prompt.text))
        caption = {"caption": prompt.seconds} if plan.described else {}
        start, handed = self.hand_off(footage, plan, None if draft is None else draft.handed)

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
            candidate_seed = seed + (number - 1) * CANDIDATE_STEP
            made = self._candidate(start, prompt, candidate_seed, plan, on_step, draft, handed)
            made = dataclasses.replace(made, score_seam=self.score_seam_later(footage, made, plan))
            seconds.update(made.seconds)
            if on_take is not None and plan.keeps_takes:
                on_take(number, finish(made, made.seconds))
            if len(plan.candidates) == 1:
                return finish(made, made.seconds)
            candidates.append({"seed": made.request.seed, "score": None if plan.is_cut else _seam_score(made)})
            if kept is None or number == plan.take or (plan.take is None and _is_better(made, kept)):
                kept = made
        assert kept is not None  # there are candidates
        return finish(kept, seconds, candidates=candidates)

    def _candidate(
        self,
        footage: Footage,
        prompt: ClipPrompt,
        seed: int,
        plan: Plan,
        on_step: OnStep | None,
        draft: Draft | None,
        handed: Tensor | None,
    ) -> Generation:
        steps = plan.sampling.steps
        watch = Stopwatch(self.device, steps, on_step)
        with watch.stage("prepare"):
            known = self.known(footage, plan)
            if plan.colour_carry and plan.dropped and footage.colours is not None:
                tail = torch.stack(self.pictures(footage, LONGEST_CONTEXT, plan))
                known = lead_to(footage.colours, known, tail, plan.colour_carry)
        request = Request(
            prompt.text,
            plan.negative,
            known,
            plan.geometry,
            plan.sampling,
            seed,
            plan.loras,
            plan.motion_amplitude,
        )
        # of the whole chain, so that a run that goes on with it computes with the same kernels
        made = self.run(
            request,
            offload=plan.offload,
            on_step=on_step,
            clips=plan.count * plan.best_of,
            sampled=None if draft is None else draft.find(seed),
            on_sampled=None if draft is None else lambda sampled: draft.keep(seed, sampled, prompt, handed),
        )
        if plan.discard:
            kept = len(made.clip.frames) - plan.discard
            cells = plan.discard // self.config.vae_stride[0]
            clip = Clip(made.clip.frames[:kept], made.clip.fps)
            made = dataclasses.replace(made, clip=clip, latents=made.latents[:, :-cells])
        if plan.drift_correction and plan.dropped and plan.end is None:  # an end image says itself how the clip ends
            correcting = Stopwatch(self.device, steps, on_step, done=steps)
            with correcting.stage("correct"):
                before = torch.stack(self.pictures(footage, LONGEST_CONTEXT, plan)).permute(0, 2, 3, 1)
                frames = correct_drift(made.clip.frames, before, known=plan.dropped, strength=plan.drift_correction)
            made = dataclasses.replace(made, clip=Clip(frames, made.clip.fps))
            made = dataclasses.replace(made, seconds=dict(made.seconds) | correcting.seconds)
        return dataclasses.replace(made, seconds=watch.seconds | dict(made.seconds))

    def hand_off(self, footage: Footage, plan: Plan, handed: Tensor | None) -> tuple[Footage, Tensor | None]:
        """What the clip starts from, and its known frames [n, H, W, 3] where the plan's command has seen them.

        `handed` are those frames where they are known already. Raises UserError where the command fails.
        """
        if plan.handoff is None or plan.is_cut:
            return footage, None
        tail = torch.stack(self.pictures(footage, LONGEST_CONTEXT, plan)).permute(0, 2, 3, 1)
        if plan.context.frames == 1:
            last = self.frame_for(footage.last, plan.geometry.width, plan.geometry.height)
            tail = torch.cat([tail[:-1], last.permute(1, 2, 0)[None]])  # as it would be known without this
        # svi2pro knows the last latent frame, which is encoded from all of these
        known = tail if plan.context.mode == "svi2pro" else tail[-plan.context.frames :]
        if handed is None:
            handed = hand_off(plan.handoff, known)
        if torch.equal(handed, known):
            return footage, handed
        return ChangedEnd(footage, torch.cat([tail[: len(tail) - len(handed)], handed])), handed

    def known(self, footage: Footage, plan: Plan) -> KnownFrames:
        """What the clip is conditioned on."""
        size = plan.geometry.width, plan.geometry.height
        end = None if plan.end is None else self.frame_for(plan.end, *size)
        if plan.cut is True:
            return KnownFrames(end=end)
        if plan.cut is not None and plan.cut is not False:
            picture = self.frame_for(plan.cut, *size)
            # the first clip of a shot has an anchor and no motion yet (source: Stable Video Infinity 2.0 Pro)
            is_svi = plan.context.mode == "svi2pro"
            return KnownFrames(end=end, anchor=picture) if is_svi else KnownFrames((picture,), end)
        if plan.context.mode == "svi2pro":
            assert plan.anchor is not None
            anchor = self.frame_for(plan.anchor, *size)
            if footage.motion is not None:
                return KnownFrames(end=end, anchor=anchor, motion=footage.motion)
            tail = self.pictures(footage, LONGEST_CONTEXT, plan)
            return KnownFrames(tail[(len(tail) - 1) % 4 :], end, anchor)
        if plan.context.frames == 1:
            return KnownFrames((self.frame_for(footage.last, *size),), end)
        return KnownFrames(self.pictures(footage, plan.context.frames, plan), end)

    def pictures(self, footage: Footage, count: int, plan: Plan) -> tuple[Tensor, ...]:
        """The footage's last frames at the model's rate, up to `count`, float32 [3, H, W] of the clip's size."""
        width, height = plan.geometry.width, plan.geometry.height
        return tuple(self.frame_for(frame.permute(2, 0, 1), width, height) for frame in footage.tail(count, self.fps))

    def score_seam_later(
        self, footage: Footage, made: Generation, plan: Plan
    ) -> Callable[[], Mapping[str, Any] | None]:
        """How well the clip goes on from the footage, `SeamScore` as JSON values; None for one that begins a new shot.

        It is computed when it is first asked for, so that a chain need not wait for it.
        """
        if plan.is_cut:
            return lambda: None
        # a copy, lest each clip hold on to the one before it
        before = torch.stack(self.pictures(footage, LONGEST_CONTEXT, plan)).permute(0, 2, 3, 1)
        frames, dropped = made.clip.frames, plan.dropped
        # the first frame that svi2pro makes restores its anchor, which is not the footage
        known = min(dropped - (plan.context.mode == "svi2pro"), len(before))
        return _Once(
            lambda: score_seam(
                before,
                frames[dropped : dropped + len(before)],
                known=before[-known:],
                rendered=frames[dropped - known : dropped],
            ).as_json()
        )

    def build_prompt(
        self, footage: Footage, plan: Plan, memory: Mapping[str, Any] = MappingProxyType({})
    ) -> ClipPrompt:
        """The clip's prompt, see `PromptBuilder.build`; after a cut to a picture that picture is described."""
        if plan.cut is not None and not isinstance(plan.cut, bool):
            picture = self.frame_for(plan.cut, plan.geometry.width, plan.geometry.height)
            footage = Clip(picture[None].permute(0, 2, 3, 1), self.fps)

        def stays() -> bool:
            """The captioner describes again after this clip, which fits beside it."""
            budget = self.budget.for_clip(plan.geometry, plan.offload)
            return plan.number < plan.count and budget.fits_now(plan.geometry, plan.offload, self.models.loaded)

        return self.prompts.build(footage, plan, stays, memory)

    @property
    def captioner(self) -> Captioner:
        """The VLM behind the descriptions; it loads at its first use."""
        return self.vlm.captioner

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
        described = self.vlm.describe(media.sample_frames(video_path, num_segments, reader=self.video_reader), question)
        self.vlm.make_room(stays=lambda: False)
        return described.text


def _is_better(made: Generation, other: Generation) -> bool:
    """Whether a candidate has a less visible seam; where there are no seams the first stays."""
    return made.seam is not None and _seam_score(made) < _seam_score(other)


def _seam_score(made: Generation) -> float:
    assert made.seam is not None
    return float(made.seam["score"])
