"""What both commands begin with: flags and a checkpoint folder -> a pipeline, and the plan of a clip."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.chain.storyboard import Scene, check_storyboard
from wan.commands.clip_record import Recorder
from wan.commands.flags import check_prompts_for
from wan.commands.gpus import Gpus, check_world
from wan.commands.inputs import (
    check_files,
    check_task,
    choose_size,
    choose_task,
    dit_files,
    lora_files,
    model_settings,
    or_example,
    part_files,
    read_ends,
    read_scenes,
    take_from,
    with_dtypes,
)
from wan.configs import ModelConfig, config_for
from wan.device.ranks import World
from wan.files import readable
from wan.foreign import uncollected
from wan.options import EXPERT_OF_DIT, Command, Settings
from wan.settings import Context

if TYPE_CHECKING:
    from wan.chain.plan import Plan
    from wan.comfy import ComfyFolder
    from wan.continuation import VideoContinuation
    from wan.footage import VideoFile
    from wan.pipeline import Pipeline
    from wan.types import Footage, Frame
    from wan.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)

CHAIN_FRAMES = 81  # of each clip of a chain, whatever the task


@dataclass(frozen=True)
class _Home:
    """Where a checkpoint's files are: its folder, ComfyUI's, and the parts `at_hand` that have files of their own.

    `kind` is how many experts it has and what goes into them, (0, 0) where nothing needs to tell.
    """

    folder: Path
    comfy: ComfyFolder | None
    at_hand: set[str]
    kind: tuple[int, int]


def _home_of(settings: Settings) -> _Home:
    """Look at the files that the settings name. Raises UserError."""
    from wan.weights.checkpoint import Names, identify, identify_files, parts_in, resolve_folder

    files = dit_files(settings)
    by_files = identify_files(files) if files else None
    at_hand, comfy = set(files) | set(part_files(settings)), None
    ours = None if settings.ckpt_dir is None else resolve_folder(settings.ckpt_dir, at_hand)
    if settings.comfy_dir is not None:
        from wan.comfy import ComfyFolder

        comfy = ComfyFolder(Path(settings.comfy_dir).expanduser(), [] if ours is None else [ours])
    folder = ours or (comfy.root if comfy is not None else None)
    assert folder is not None  # the flags need one of them
    if settings.task:
        kind = 0, 0
    elif by_files is not None:
        kind = by_files
    elif comfy is not None and (ours is None or not parts_in(ours, Names()) & set(EXPERT_OF_DIT.values())):
        kind = comfy.kind(continues=settings.video is not None)
    else:
        kind = identify(folder, Names())
    return _Home(folder, comfy, at_hand, kind)


@dataclass(frozen=True)
class Job:
    """What a command was asked for, and what that means with the checkpoint folder: its row and the size."""

    command: Command
    settings: Settings
    folder: Path
    config: ModelConfig
    size: tuple[int, int]  # width, height
    checkpoint: Checkpoint
    scenes: tuple[Scene, ...] = ()
    world: World = World()
    tokenizer: Path | None = None  # where it is in neither of the checkpoint's folders
    ends: tuple[str, ...] = ()  # the last frame of each clip, where each has one

    @classmethod
    def read(cls, command: Command, settings: Settings) -> Job:
        """The settings, checked against the files that they name before PyTorch is imported. Raises UserError."""
        world = World.read(os.environ)
        check_world(settings, world)
        if (given := settings.task) is not None:
            settings = or_example(settings, given)
            check_task(settings, given)  # before anything is downloaded
        check_files(settings)
        if settings.until is not None:
            settings = dataclasses.replace(settings, include_source=True)
        scenes, ends = read_scenes(settings), read_ends(settings)
        if ends:
            check_prompts_for(settings, len(ends))

        from wan.weights.checkpoint import Names, open_checkpoint, parts_in

        home = _home_of(settings)  # which may be downloaded
        folder = home.folder
        task = choose_task(settings, home.kind)
        settings = or_example(settings, task)
        check_task(settings, task)
        config = with_dtypes(config_for(task, folder), settings)
        tokenizer = None
        if home.comfy is not None:
            at_hand = home.at_hand | (set() if settings.ckpt_dir is None else parts_in(folder, Names.of(config)))
            settings, tokenizer = take_from(home.comfy, settings, config, at_hand)
        if command == "continuous" and settings.frame_num is None:
            # a checkpoint may declare that it makes fewer
            settings = dataclasses.replace(settings, frame_num=min(CHAIN_FRAMES, config.frame_num))
        if settings.storyboard:
            check_storyboard(Path(settings.storyboard), scenes, config=config)
        size = choose_size(settings.size, config, folder)
        parts = part_files(settings) | ({} if tokenizer is None else {"tokenizer": tokenizer})
        checkpoint = open_checkpoint(
            folder,
            in_channels=config.in_channels,
            experts=1 if config.boundary is None else 2,
            names=Names.of(config),
            files=dit_files(settings) | parts,
        )
        return cls(command, settings, folder, config, size, checkpoint, scenes, world, tokenizer, ends)

    @property
    def video(self) -> Path:
        """The video to continue, of a v2v task."""
        assert self.settings.video is not None  # `check_task`
        return Path(self.settings.video)

    def footage(self) -> VideoFile:
        """The video to continue, up to `from_`; what is dull at its end is said."""
        from wan.footage import VideoFile

        until = self.settings.from_
        opened = VideoFile(self.video, self.settings.video_reader, until)
        if (end := media.find_dull_end(self.video, until)) is not None:
            lively = end.last_lively
            advice = "" if lively is None else f"; `from_` {lively:.3f} continues from its last lively frame"
            log.warning("%s: %s%s", readable(self.video), end, advice)
        return opened

    @uncollected()
    def open(self, **continuing: Any) -> Pipeline:
        """The pipeline of the task; its models load when they are used."""
        import transformers

        from wan.experts import pipeline_class

        if not self.settings.dry_run:
            import_module("wan.clip_sampler")  # now, while files are read, and not in a stage of the first clip

        transformers.utils.logging.disable_progress_bar()  # it would be drawn through ours, and into log files
        settings = self.settings
        pipeline: Pipeline = pipeline_class(self.config.name)(
            self.config,
            self.folder,
            device_id=self.world.local_rank,
            t5_fsdp=settings.t5_fsdp,
            dit_fsdp=settings.dit_fsdp,
            t5_cpu=settings.t5_cpu,
            convert_model_dtype=settings.convert_model_dtype,
            dit_files=dit_files(settings),
            part_files=part_files(settings) | ({} if self.tokenizer is None else {"tokenizer": self.tokenizer}),
            compile_blocks=settings.compile == "auto",
            vram=settings.vram,
            **{"host_memory": settings.host_memory, "share_weights": settings.share_weights} | continuing,
        )
        self.gpus.expect(pipeline)
        return pipeline

    @property
    def gpus(self) -> Gpus:
        """The processes that make its clips together."""
        return Gpus(self.settings, self.world, self.offload)

    @property
    def recorder(self) -> Recorder:
        """Writes its clips down."""
        return Recorder(self.command, self.settings, self.config, self.offload)

    def follow(self, pipeline: Pipeline | None = None) -> None:
        """In any process but the first: make its shares, with a pipeline that may be there already."""
        if not self.settings.dry_run:
            self.gpus.follow(self.open() if pipeline is None else pipeline)

    @property
    def models_key(self) -> tuple[Any, ...]:
        """Equal for two jobs whose pipeline may be the same."""
        return self.folder.absolute(), self.config, self.tokenizer, model_settings(self.settings)

    @property
    def offload(self) -> bool:
        """Whether only the model in use is on the GPU: what is given, or as in Wan2.2's script."""
        given = self.settings.offload_model
        alone = Gpus(self.settings, self.world).size == 1
        return alone or self.settings.vram is not None if given is None else given

    @uncollected()
    def open_continuation(self, **share: Any) -> VideoContinuation:
        """The pipeline of a v2v task; `share`: arguments of memory in place of those of the settings."""
        settings = self.settings
        from wan.continuation import VideoContinuation

        continuation = self.open(
            vlm_path=settings.vlm_path,
            vlm_device=settings.vlm_device,
            vlm_url=settings.vlm_url,
            vlm_question=settings.vlm_question,
            vlm_fallback=settings.vlm_fallback,
            vlm_trust_remote_code=settings.vlm_trust_remote_code,
            video_reader=settings.video_reader,
            **share,
        )
        assert isinstance(continuation, VideoContinuation)  # its task is one of V2V_TASKS
        return continuation

    def plan(
        self,
        continuation: VideoContinuation,
        footage: Footage,
        settings: Settings | None = None,
        read: Callable[[str], Frame] = media.read_image,
        **more: Any,
    ) -> Plan:
        """How the footage is continued. Raises UserError, also for a VLM that is not there.

        `settings` are those of the clip where they are not the command's, `read` how its pictures are read, and `more`
        further arguments of `VideoContinuation.plan`.
        """
        settings = settings or self.settings
        pictures = {"anchor": settings.anchor_image, "end": settings.end_image, "cut": settings.cut}
        frames = {name: read(file) if isinstance(file, str) else file for name, file in pictures.items()}
        if settings.until is not None and frames["end"] is None and "end" not in more:
            frames["end"] = media.read_first_frame(settings.until)
        plan = continuation.plan(
            footage,
            **frames
            | {
                "max_area": self.size[0] * self.size[1],
                "frame_num": settings.frame_num,
                "shift": settings.sample_shift,
                "solver": settings.sample_solver,
                "steps": settings.sample_steps,
                "guidance": settings.sample_guide_scale,
                "guidance_interval": settings.guidance_interval,
                "cache": settings.cache,
                "preset": settings.preset,
                "prompt": settings.prompt,
                "prefix": settings.custom_prompt if self.command == "continuous" else "",
                "num_segments": settings.num_segments,
                "offload": self.offload,
                "context": Context.choose(settings.continuation, settings.context_frames),
                "loras": lora_files(settings),
                "prompt_mode": settings.prompt_mode,
                "motion_amplitude": settings.motion_amplitude,
                "discard": settings.discard,
                "handoff": settings.handoff_command,
                "fade": settings.fade,
                "drift_correction": settings.drift_correction,
                "colour_carry": settings.colour_carry,
                "best_of": settings.takes if settings.takes > 1 else settings.best_of,
                "keeps_takes": settings.takes > 1,
            }
            | more,
        )
        if plan.described and more.get("check", True):
            continuation.captioner  # noqa: B018  (a wrong vlm_path is said now, not after an hour)
        return plan
