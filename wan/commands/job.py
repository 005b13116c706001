"""What both commands share: flags and a checkpoint folder -> a pipeline, a plan, and the record of a clip."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import platform
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.chain.storyboard import Scene, check_storyboard, read_storyboard
from wan.commands.examples import example_of
from wan.commands.flags import check_prompts_for, check_video_settings
from wan.commands.lines import PROGRESS
from wan.configs import ModelConfig, config_for, parse_size, preset_named
from wan.device.ranks import Sizes, World, choose_sizes
from wan.errors import UserError
from wan.files import readable
from wan.kinds import Picture, Video, public_path
from wan.options import EXPERT_OF_DIT, EXPERT_OF_LORA, OPTIONS, PART_OF_FILE, V2V_TASKS, Command, Settings, options_of
from wan.settings import Context, LoraFile
from wan.version import __version__

if TYPE_CHECKING:
    from wan.chain.plan import Plan
    from wan.comfy import ComfyFolder
    from wan.continuation import VideoContinuation
    from wan.footage import VideoFile
    from wan.pipeline import Pipeline
    from wan.types import Footage, Frame, Generation
    from wan.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)

CHAIN_FRAMES = 81  # of each clip of a chain, whatever the task


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
            settings = _or_example(settings, given)
            check_task(settings, given)  # before anything is downloaded
        _check_files(settings)
        if settings.until is not None:
            settings = dataclasses.replace(settings, include_source=True)
        scenes, ends = read_scenes(settings), read_ends(settings)
        if ends:
            check_prompts_for(settings, len(ends))

        from wan.weights.checkpoint import (
            Names,
            identify,
            identify_files,
            open_checkpoint,
            parts_in,
            resolve_folder,
        )

        files = dit_files(settings)
        by_files = identify_files(files) if files else None
        comfy, there = None, set(files) | set(part_files(settings))
        if settings.ckpt_dir is not None:
            folder = resolve_folder(settings.ckpt_dir, there)  # which may download it
        if settings.comfy_dir is not None:
            from wan.comfy import ComfyFolder

            root = Path(settings.comfy_dir).expanduser()
            comfy = ComfyFolder(root, [] if settings.ckpt_dir is None else [folder])
            folder = comfy.root if settings.ckpt_dir is None else folder
        if settings.task:
            found = 0, 0
        elif by_files is not None:
            found = by_files
        elif comfy is not None and (
            settings.ckpt_dir is None or not parts_in(folder, Names()) & set(EXPERT_OF_DIT.values())
        ):
            found = comfy.kind(continues=settings.video is not None)
        else:
            found = identify(folder, Names())
        task = choose_task(settings, found)
        settings = _or_example(settings, task)
        check_task(settings, task)
        config = _with_dtypes(config_for(task, folder), settings)
        tokenizer = None
        if comfy is not None:
            there |= set() if settings.ckpt_dir is None else parts_in(folder, Names.of(config))
            settings, tokenizer = _take(comfy, settings, config, there)
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
        """The video to continue, up to where it is continued from; what is dull at its end is said."""
        from wan.footage import VideoFile

        until = self.settings.from_
        opened = VideoFile(self.video, self.settings.video_reader, until)
        if (end := media.find_dull_end(self.video, until)) is not None:
            lively = end.last_lively
            advice = "" if lively is None else f"; `from_` {lively:.3f} continues from its last lively frame"
            log.warning("%s: %s%s", readable(self.video), end, advice)
        return opened

    def open(self, **continuing: Any) -> Pipeline:
        """The pipeline of the task; its models load when they are used."""
        import transformers

        from wan.pipeline import pipeline_class

        transformers.utils.logging.disable_progress_bar()  # it would be drawn through ours, and into log files
        settings = self.settings
        return pipeline_class(self.config.name)(
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
            host_memory=settings.host_memory,
            **continuing,
        )

    @property
    def models_key(self) -> tuple[Any, ...]:
        """Equal for two jobs whose pipeline may be the same."""
        names: tuple[str, ...] = ("vlm_path", "vlm_device", "vlm_url", "vlm_trust_remote_code", "video_reader")
        names += ("t5_fsdp", "dit_fsdp", "t5_cpu", "convert_model_dtype", "compile", "vram", "host_memory")
        said = tuple(getattr(self.settings, name) for name in names)
        files = dit_files(self.settings) | part_files(self.settings)
        return self.folder.absolute(), self.config, tuple(sorted(files.items())), self.tokenizer, said

    @property
    def offload(self) -> bool:
        """Whether only the model in use is on the GPU: what is given, or as in Wan2.2's script."""
        given = self.settings.offload_model
        return self.world.size == 1 or self.settings.vram is not None if given is None else given

    def sizes(self, pipeline: Pipeline, world: World) -> Sizes:
        """How the work is shared among the processes. Raises UserError."""
        return choose_sizes(world.size, pipeline.heads, self._guided(pipeline), **self._given_sizes)

    @property
    def _given_sizes(self) -> dict[str, int | None]:
        settings = self.settings
        given = {"cfg": settings.cfg_size, "ulysses": settings.ulysses_size, "ring": settings.ring_size}
        return {name: None if size == "auto" else size for name, size in given.items()}

    def _guided(self, pipeline: Pipeline) -> float:
        """The share of steps that have guidance."""
        settings = self.settings
        sampling = pipeline.sampling(
            settings.sample_steps,
            settings.sample_shift,
            settings.sample_solver,
            settings.sample_guide_scale,
            guidance_interval=settings.guidance_interval,
            preset=settings.preset,
        )
        shares = pipeline.shares(sampling)
        return sum(guided for _, guided in shares) / sum(steps for steps, _ in shares)

    @contextmanager
    def together(self, pipeline: Pipeline) -> Iterator[None]:
        """In the first process: the others make their shares of what is made in the block. Raises UserError."""
        if self.world.size == 1:
            yield
            return
        self._join(pipeline)
        logging.getLogger(PROGRESS).info("%d GPUs: %s", self.world.size, pipeline.team.sizes)
        try:
            with pipeline.team.watched():
                yield
        except GeneratorExit:  # between two clips
            self._part(pipeline)
            raise
        self._part(pipeline)

    def _part(self, pipeline: Pipeline) -> None:
        pipeline.release()
        pipeline.team.end()

    def follow(self, pipeline: Pipeline | None = None) -> None:
        """In any other process: make its shares until the first has done, with a pipeline that may be there already."""
        if self.settings.dry_run:
            return
        pipeline = self.open() if pipeline is None else pipeline
        self._join(pipeline)
        with pipeline.team.watched():
            pipeline.follow()
        pipeline.team.end()

    def _join(self, pipeline: Pipeline) -> None:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast can hang a host, and nothing here gains by it
        timeout = self.settings.collective_timeout
        pipeline.join(self.world, self._guided(pipeline), timeout=timeout, **self._given_sizes)

    def open_continuation(self) -> VideoContinuation:
        """The pipeline of a v2v task."""
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
        found = {name: read(file) if isinstance(file, str) else file for name, file in pictures.items()}
        if settings.until is not None and found["end"] is None and "end" not in more:
            found["end"] = media.read_first_frame(settings.until)
        plan = continuation.plan(
            footage,
            **found
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
        if plan.described:
            continuation.captioner  # noqa: B018  (a wrong vlm_path is said now, not after an hour)
        return plan

    def describe(self, made: Generation, source: str | None, plan: Plan | None = None) -> dict[str, Any]:
        """The sidecar of a clip: everything that made it, and what it took. `plan` is that of a continuation."""
        from wan.device.host import host_peak_gib

        request, config = made.request, self.config
        used = self._used(made, plan)
        return {
            "source": None if source is None else public_path(source),
            "prompt": request.prompt,
            "negative_prompt": request.negative,
            "seed": request.seed,
            "width": request.geometry.width,
            "height": request.geometry.height,
            "fps": str(made.clip.fps),
            "param_dtype": str(config.param_dtype).removeprefix("torch."),
            "t5_dtype": str(config.t5_dtype).removeprefix("torch."),
            **{
                one.record: used[one.name]
                for one in options_of(self.command)
                if one.record and (plan is not None or not one.continues)
            },
            **({} if plan is None else {"seam": made.seam, "dropped": made.dropped}),
            **({"memory": made.prompt_memory} if made.prompt_memory else {}),
            **made.notes,
            "seconds": {stage: round(taken, 3) for stage, taken in made.seconds.items()},
            "peak_gpu_gib": None if made.peak_gib is None else round(made.peak_gib, 3),
            "peak_host_gib": round(host_peak_gib(), 3),
            "versions": versions(),
        }

    def _used(self, made: Generation, plan: Plan | None) -> dict[str, Any]:
        """The settings of a clip as it was made, as JSON values: what was open is what the preset or model chose."""
        settings, config, request = self.settings, self.config, made.request
        sampling = request.sampling
        given = options_of(self.command)
        used = {one.name: one.kind.public(getattr(settings, one.name)) for one in given} | {
            "task": config.name,
            "size": settings.size or config.sizes[0],
            "frame_num": request.geometry.frames,
            "offload_model": self.offload,
            "sample_solver": sampling.solver,
            "sample_steps": sampling.steps,
            "sample_shift": sampling.shift,
            "sample_guide_scale": list(sampling.guidance),
            "guidance_interval": sampling.guidance_interval and list(sampling.guidance_interval),
            "cache": str(sampling.cache or "off"),
            "precision": config.low_precision or settings.precision,
            "vae_dtype": str(config.vae_dtype).removeprefix("torch."),
            "end_image": request.known.end is not None,
            "motion_amplitude": request.motion_amplitude,
        }
        if plan is not None:
            used |= {
                "custom_prompt": plan.prefix,
                "prompt_mode": plan.prompt_mode,
                "vlm_path": used["vlm_path"] if plan.described else None,
                "vlm_url": used["vlm_url"] if plan.described else None,
                "num_segments": plan.num_segments,
                "continuation": plan.context.mode,
                "context_frames": made.context_frames,
                "cut": plan.is_cut,
                "discard": plan.discard,
                "drift_correction": plan.drift_correction,
                "colour_carry": plan.colour_carry,
            }
        return used


def _take(
    comfy: ComfyFolder, settings: Settings, config: ModelConfig, there: Container[str]
) -> tuple[Settings, Path | None]:
    """The settings with the files of the parts that are not there, each of which is said; and the tokenizer's."""
    from wan.comfy import as_settings

    experts = ["model"] if config.boundary is None else ["high_noise_model", "low_noise_model"]
    if "model" in there:  # which serves both
        experts = []
    wanted = [part for part in (*experts, "vae", "text_encoder", "tokenizer") if part not in there]
    distilled = preset_named(settings.preset).distilled and not any(lora_files(settings).values())
    found = list(comfy.find(wanted, config.in_channels, config.z_dim, distilled))
    for one in found:
        logging.getLogger(PROGRESS).info(one.line)
    tokenizer = next((one.file for one in found if one.part == "tokenizer"), None)
    return dataclasses.replace(settings, **as_settings(found)), tokenizer


def read_scenes(settings: Settings) -> tuple[Scene, ...]:
    """What a storyboard, or prompts for some clips in place of one, say of each clip. Raises UserError."""
    if settings.storyboard:
        return read_storyboard(Path(settings.storyboard))
    said = dict(settings.prompt_for)
    numbers = range(1, max(said, default=0) + 1)
    return tuple(Scene(0, {"prompt": said[number]} if number in said else {}) for number in numbers)


def read_ends(settings: Settings) -> tuple[str, ...]:
    """The picture files of `end_images`, which are whole, in the order of their names. Raises UserError."""
    if settings.end_images is None:
        return ()
    try:
        files = [file for file in os.scandir(settings.end_images) if not file.name.startswith(".")]
    except OSError as error:
        raise UserError(f"`end_images` {settings.end_images!r} cannot be read: {error.strerror}") from error
    if not files:
        raise UserError(f"`end_images` {settings.end_images!r} holds no pictures")
    for file in files:
        media.read_image(file.path)
    return tuple(file.path for file in sorted(files, key=lambda file: _by_numbers(file.name)))


def _by_numbers(name: str) -> list[Any]:
    """A key for names in which 2 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.casefold())]


def _or_example(settings: Settings, task: str) -> Settings:
    """What the task makes when it is given neither a prompt nor an input, as in Wan2.2's script; this is said."""
    if settings.prompt is not None or settings.video is not None or settings.image is not None:
        return settings
    example: Mapping[str, Any] = example_of(task)
    for name, file in example.items():
        if name != "prompt" and not Path(file).is_file():
            raise UserError(f"`task` {task} needs `{name}`; its example lies in a clone of the project, and not here")
    shown = ", ".join(f"`{name}` {value!r}" for name, value in example.items())
    log.warning("neither a prompt nor an input is given: this runs the example of %s, %s", task, shown)
    return dataclasses.replace(settings, **example)


_SIZES = ("ulysses_size", "cfg_size", "ring_size")


def check_world(settings: Settings, world: World) -> None:
    """Raise UserError for settings of several GPUs that cannot be followed with these processes."""
    asked = [f"`{name}`" for name in ("t5_fsdp", "dit_fsdp") if getattr(settings, name)]
    if asked and world.size == 1 and not settings.dry_run:
        raise UserError(f"{' and '.join(asked)}: weights are shared among GPUs; start the command with torchrun")
    given = {name: size for name in _SIZES if (size := getattr(settings, name)) != "auto"}
    ranks = math.prod(given.values())
    said = ", ".join(f"`{name}` {size}" for name, size in given.items())
    if world.size == 1 and ranks > 1 and not settings.dry_run:
        raise UserError(f"{said} needs {ranks} processes: start the command with torchrun --nproc_per_node={ranks}")
    if world.size > 1 and (world.size % ranks or (len(given) == len(_SIZES) and ranks != world.size)):
        raise UserError(f"{said} does not make up the {world.size} processes that are started")


def choose_task(settings: Settings, found: tuple[int, int]) -> str:
    """The task, told from the checkpoint's (experts, input channels) unless it is given. Raises UserError."""
    if settings.task is not None:
        return settings.task
    by_kind = {(2, 36): ("i2v-A14B", "v2v-14B"), (1, 48): ("ti2v-5B", "v2v-5B"), (2, 16): ("t2v-A14B", "t2v-A14B")}
    by_kind |= {(1, channels): by_kind[2, channels] for channels in (36, 16)}  # one denoiser that serves both experts
    given = [f"`{name}` {file}" for name in EXPERT_OF_DIT if (file := getattr(settings, name))]
    folder = "ckpt_dir" if settings.ckpt_dir is not None else "comfy_dir"
    where = " and ".join(given) or f"`{folder}` {getattr(settings, folder)}"
    if found not in by_kind:
        raise UserError(
            f"no task is for {found[0]} denoiser(s) with {found[1]} input channels, which {where} gives; give the "
            "files of I2V-A14B (two), T2V-A14B (two) or TI2V-5B (one)"
        )
    if settings.video is not None and found[1] == 16:
        raise UserError(f"{where} is T2V-A14B, which takes no `video`; give the files of I2V-A14B or TI2V-5B")
    return by_kind[found][settings.video is not None]


def check_task(settings: Settings, task: str) -> None:
    """Raise UserError for inputs that the task does not take or lacks."""
    if settings.video is not None and task not in V2V_TASKS:
        raise UserError(f"`task` {task} takes no `video`; use `task` v2v-14B or v2v-5B with their checkpoints")
    if settings.video is None and task in V2V_TASKS:
        raise UserError(f"`task` {task} needs `video`, the clip to continue")
    if settings.image is not None and task not in ("i2v-A14B", "ti2v-5B"):
        raise UserError(f"`task` {task} takes no `image`")
    if settings.image is None and task == "i2v-A14B":
        raise UserError("`task` i2v-A14B needs `image`, the first frame")
    if settings.video is None:
        check_video_settings(settings)
        if settings.prompt is None:
            raise UserError(f"`task` {task} needs `prompt`")


def choose_size(given: str | None, config: ModelConfig, folder: Path) -> tuple[int, int]:
    """(width, height) of `size`, which must be on the task's list. Raises UserError."""
    size = given or config.sizes[0]
    parse_size(size)
    if size not in config.sizes:
        raise UserError(f"`size` {size} is not one of {', '.join(config.sizes)} that {config.name} in {folder} takes")
    return parse_size(size)


def _with_dtypes(config: ModelConfig, settings: Settings) -> ModelConfig:
    """The row with what `vae_dtype` and `precision` say in it."""
    if settings.vae_dtype:
        config = config.variant(vae_dtype=settings.vae_dtype)
    if settings.precision == "bf16":
        return config.variant(param_dtype="bfloat16", low_precision=None)
    return config.variant(low_precision=settings.precision or config.low_precision)


def _check_files(settings: Settings) -> None:
    """Raise UserError for an input that cannot be read or an output that cannot be written, before any download."""
    for one in OPTIONS.values():
        file = getattr(settings, one.name)
        if file and isinstance(one.kind, Video):
            media.probe(file)
        elif file and isinstance(one.kind, Picture):
            media.read_image(file)
    if settings.save_file:
        media.check_output(settings.save_file)


def dit_files(settings: Settings) -> dict[str, Path]:
    """The denoisers that come from a file of their own, by expert."""
    given = {expert: getattr(settings, name) for name, expert in EXPERT_OF_DIT.items()}
    return {expert: Path(file).expanduser() for expert, file in given.items() if file is not None}


def part_files(settings: Settings) -> dict[str, Path]:
    """The VAE and the text encoder that come from a file of their own."""
    given = {part: getattr(settings, name) for name, part in PART_OF_FILE.items()}
    return {part: Path(file).expanduser() for part, file in given.items() if file is not None}


def lora_files(settings: Settings) -> dict[str, tuple[LoraFile, ...]]:
    """The LoRA files by the expert that they are for."""
    given = {expert: getattr(settings, name) for name, expert in EXPERT_OF_LORA.items()}
    return {expert: tuple(LoraFile.parse(text) for text in texts) for expert, texts in given.items() if texts}


def versions() -> dict[str, str]:
    """What is installed of everything that can change a result."""
    import torch

    # torch says which CUDA it was built for; its package's version does not
    found = {"wan-continue": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "transformers", "av", "pillow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
