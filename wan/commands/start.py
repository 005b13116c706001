"""The first seconds of a command, in which packages are imported: which are not, and what the disk does meanwhile."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wan import media
from wan.chain.storyboard import Scene
from wan.commands.inputs import lora_files, sampling_of
from wan.commands.job import Job
from wan.commands.lines import PROGRESS
from wan.device.host import GIB, has_gpu_driver
from wan.errors import UserError
from wan.foreign import read_json
from wan.options import Settings, usual_clips
from wan.settings import Context, Geometry, check_continuation, check_end_image, check_motion_amplitude
from wan.sizes import begun_size, continued_size
from wan.weights.checkpoint import default_vlm
from wan.weights.hub import OFFER, check_vlm_place
from wan.weights.prefetch import ReadingProcess, that_fit

log = logging.getLogger(PROGRESS)

# What libraries import where it is installed, for features that nothing here uses.
UNUSED = ("peft", "sklearn", "scipy", "pandas", "matplotlib", "torchaudio")
# What only captioners need that are not our InternVL, and those in fewer bits.
OF_OTHER_VLMS, OF_QUANTIZED_VLMS = ("torchvision",), ("torchao", "bitsandbytes")


def leave_out_unused(settings: Settings) -> None:
    """Let packages that this command does not use count as absent in this process, whose imports take seconds.

    For a process that is the command's own: nobody else in it may want them.
    """
    vlm = _vlm_config(settings)
    unused = list(UNUSED)
    if vlm is not None:
        own_code = settings.vlm_trust_remote_code and "auto_map" in vlm
        if not vlm or (vlm.get("model_type") in ("internvl_chat", "internvl") and not own_code):
            unused += OF_OTHER_VLMS
        if not any(isinstance(one, dict) and "quantization_config" in one for one in (vlm, *vlm.values())):
            unused += OF_QUANTIZED_VLMS
    for name in unused:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]  # from here on an import says "not found"


class _WhenLookedAt(Mapping[str, list[str]]):
    """A mapping that is asked for when it is first looked at."""

    def __init__(self, ask: Callable[[], Mapping[str, list[str]]]) -> None:
        self._answer = functools.cache(ask)

    def __getitem__(self, name: str) -> list[str]:
        return self._answer()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answer())

    def __len__(self) -> int:
        return len(self._answer())


def find_packages_late() -> None:
    """Let libraries that ask which package each module is of, while they are imported, have the answer when they look.

    diffusers asks, and looks for packages that nothing here uses. With many packages installed that takes a second.
    For a process that is the command's own.
    """
    late = _WhenLookedAt(importlib.metadata.packages_distributions)
    importlib.metadata.packages_distributions = lambda: late


def take_cores(environment: MutableMapping[str, str], cores: int) -> None:
    """Give each process of a machine its share of the cores; before PyTorch is imported.

    torchrun gives each one thread where OMP_NUM_THREADS is not set. The first process reads, captions, corrects and
    writes on the CPU while the others wait. A number that the user gave stays, unless it is 1, which looks like that.
    """
    if "TORCHELASTIC_RUN_ID" in environment and environment.get("OMP_NUM_THREADS") == "1":
        processes = int(environment.get("LOCAL_WORLD_SIZE") or 1)
        environment["OMP_NUM_THREADS"] = str(max(1, cores // processes))


def _vlm_config(settings: Settings) -> Mapping[str, Any] | None:
    """The config.json of the captioner, empty where there is none; None where it cannot be seen."""
    if settings.video is None or settings.vlm_url is not None:
        return {}
    try:
        return read_json(_vlm_folder(settings, Path(settings.ckpt_dir or settings.comfy_dir or ".")) / "config.json")
    except UserError:  # a hub's, or one that is refused when it is opened
        return None


def _vlm_folder(settings: Settings, checkpoint: Path) -> Path:
    return Path(settings.vlm_path or default_vlm(checkpoint.expanduser())).expanduser()


def check_budget(job: Job) -> None:
    """Raise UserError where headers tell that a clip of the usual size needs more memory than there is.

    Of a GPU that is what `vram` gives: what is free there is not known before PyTorch. Clips that a storyboard changes
    are checked after it.
    """
    # it asks for torchvision, which is left out by now
    from wan.device.budget import MemoryBudget, NamedDevice, no_gpu_for_vram
    from wan.device.host_budget import HostBudget, host_limit

    settings, config = job.settings, job.config
    if settings.vram is not None and not has_gpu_driver():
        raise no_gpu_for_vram()
    # several GPUs may share a model, which is arranged later
    if job.gpus.size > 1:
        return
    width, height = job.size
    if settings.video is not None:
        info = media.probe(settings.video)
        width, height = continued_size(config.model_type, info.width, info.height, width * height)
    elif settings.image is not None:
        image = media.read_image(settings.image)
        width, height = begun_size(config.model_type, image.width, image.height, width * height)
    geometry = Geometry(settings.frame_num or config.frame_num, height, width, config.vae_stride, config.patch_size)
    device = NamedDevice("cuda" if has_gpu_driver() else "cpu")
    limit = int(settings.vram * GIB) if isinstance(settings.vram, int | float) else None
    budget = MemoryBudget(job.checkpoint, config, device, None if settings.t5_cpu else device, limit)
    budget.check(geometry)
    host = HostBudget(
        job.checkpoint,
        config,
        host_limit(settings.host_memory),
        given=settings.host_memory != "auto",
        sharers=1 if settings.t5_fsdp or settings.dit_fsdp else settings.share_weights,  # `Pipeline` sees if they can
    )
    # what LoRAs themselves take is known when they are opened
    host.plan(budget, geometry, dict.fromkeys(lora_files(settings), 0))


def check_early(job: Job) -> None:
    """Raise UserError for what is refused once PyTorch is there, where files' headers and settings tell it before.

    These are the checks of `VideoContinuation.plan` and `Models.check_loras`, by their own functions, of every clip.
    """
    clips = list(_clips(job))
    for scene, settings, _ in clips:
        with _saying_where(job, scene):
            _check_captioner(job, settings)
    # these ask for torchvision, which is left out by now
    from wan.denoiser.headers import check_denoiser
    from wan.denoiser.lora_file import check_for_experts, check_headers
    from wan.denoiser.policy import no_gpu_for
    from wan.sampling_rules import SamplingRules

    for scene, settings, is_last in clips:
        with _saying_where(job, scene):
            _check_frames(job, scene, settings, is_last)
    if job.config.low_precision is not None and not has_gpu_driver():
        raise no_gpu_for(job.config.low_precision)
    checkpoint = job.checkpoint
    for weights in checkpoint.experts.values():
        check_denoiser(weights)
    rules = SamplingRules(job.config, checkpoint)
    checked = set()
    for scene, settings, _ in clips:
        with _saying_where(job, scene):
            loras = lora_files(settings)
            if (of_clip := (settings.preset, *loras.items())) not in checked:
                checked.add(of_clip)
                check_for_experts(loras, checkpoint, job.config.name)
                for expert, files in loras.items():
                    check_headers(files, checkpoint.experts[expert])
            sampling_of(settings, rules)
            rules.check_distilled(settings.preset, loras)


def _clips(job: Job) -> Iterator[tuple[Scene, Settings, bool]]:
    """What a storyboard says of a clip, its settings by that, and whether it is the last.

    Those of which nothing is said are alike, and come once.
    """
    settings, scenes = job.settings, job.scenes
    count = settings.num_videos or (len(scenes) if settings.storyboard else len(job.ends) or usual_clips(settings))
    for number, scene in enumerate(scenes[:count], 1):
        with _saying_where(job, scene):
            yield scene, scene.over(settings), number == count
    if count > len(scenes):
        yield Scene(0), settings, True


@contextmanager
def _saying_where(job: Job, scene: Scene) -> Iterator[None]:
    """What is refused in the block is said with the scene's line."""
    try:
        yield
    except UserError as error:
        if not scene.line:
            raise
        raise UserError(f"{job.settings.storyboard}, line {scene.line}: {error.marked}") from error


def _check_captioner(job: Job, settings: Settings) -> None:
    """Raise UserError for a clip that a VLM is to describe which is not there."""
    described = settings.prompt is None or settings.prompt_mode == "continue"
    if settings.video is not None and settings.vlm_url is None and settings.cut is not True and described:
        try:
            check_vlm_place(settings.vlm_path or default_vlm(job.checkpoint.folder))
        except UserError as error:
            raise UserError(f"{error.marked}, {OFFER}") from error


def _check_frames(job: Job, scene: Scene, settings: Settings, is_last: bool) -> None:
    """Raise UserError for a way to go on, or an end, that the model cannot make."""
    config = job.config
    mode, leading = "last_frame", int(settings.image is not None)
    if settings.video is not None:
        context = Context.choose(settings.continuation, settings.context_frames)
        mode, leading = context.mode, context.frames
        if settings.cut:
            leading = 0 if settings.cut is True else 1
    check_continuation(config, mode)
    given = {
        "end_image": settings.end_image if is_last or "end_image" in scene.values else None,
        "end_images": job.ends or None,
        "until": settings.until if is_last else None,
    }
    for name in (name for name, value in given.items() if value is not None):
        check_end_image(config, settings.frame_num or config.frame_num, leading, mode, name)
    check_motion_amplitude(settings.motion_amplitude, config, mode)


def read_ahead(job: Job) -> ReadingProcess | None:
    """Begin to read the weights in the order of their use, as far as memory goes, and say so: the first line.

    Stop what it returns where the command ends. Nothing is read for the plan alone, nor by the others of a launcher.
    """
    settings, checkpoint = job.settings, job.checkpoint
    if not job.world.is_first:
        return None
    files = [file for _, weights in checkpoint.parts for file in weights.files]
    if settings.video is not None and settings.prompt is None and settings.vlm_url is None:
        files = [*sorted(_vlm_folder(settings, checkpoint.folder).glob("*.safetensors")), *files]
    limit = None if settings.host_memory == "auto" else int(settings.host_memory * GIB)
    chosen = [] if settings.dry_run else that_fit(dict.fromkeys(files), limit)
    size = sum(file.stat().st_size for file in chosen)
    shown = f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.0f} MB"
    what = f", {shown} of weights are read meanwhile" if chosen else ""
    log.info("%s with %s: PyTorch starts%s", job.config.name, checkpoint.folder, what)
    return ReadingProcess(chosen) if chosen else None
