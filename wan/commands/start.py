"""The first seconds of a command, in which packages are imported: which are not, and what the disk does meanwhile."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.commands.job import Job
from wan.commands.lines import PROGRESS
from wan.errors import UserError
from wan.foreign import read_json
from wan.options import Settings
from wan.weights.checkpoint import default_vlm
from wan.weights.prefetch import ReadAhead, that_fit

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


def read_ahead(job: Job) -> ReadAhead:
    """Begin to read the weights in the order of their use, as far as memory goes, and say so: the first line.

    Stop what it returns where the command ends. Nothing is read for the plan alone, nor by the others of a launcher.
    """
    settings, checkpoint = job.settings, job.checkpoint
    if not job.world.is_first:
        return ReadAhead([])
    files = [file for _, weights in checkpoint.parts for file in weights.files]
    if settings.video is not None and settings.prompt is None and settings.vlm_url is None:
        files = [*sorted(_vlm_folder(settings, checkpoint.folder).glob("*.safetensors")), *files]
    limit = None if settings.host_memory == "auto" else int(settings.host_memory * 2**30)
    chosen = [] if settings.dry_run else that_fit(dict.fromkeys(files), limit)
    size = sum(file.stat().st_size for file in chosen) / 1e9
    what = f", {size:.1f} GB of weights are read meanwhile" if chosen else ""
    log.info("%s with %s: PyTorch starts%s", job.config.name, checkpoint.folder, what)
    reading = ReadAhead(chosen, len(chosen))
    reading.start()
    return reading
