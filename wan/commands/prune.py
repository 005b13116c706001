"""`generate_continuous.py --prune DIR`: a run's folder without what only making a clip again needs."""

from __future__ import annotations

from pathlib import Path

from wan.chain import finished_clip
from wan.chain.run_folder import RUN, RunFolder
from wan.commands.progress import say
from wan.errors import UserError


def prune(path: Path) -> None:
    """Leave out the frames and latents of all clips but the last two, and of those that were replaced.

    Says how much space that gave. Raises UserError for what is no run's folder.
    """
    if not (path / RUN).is_file():
        raise UserError(f"{path} is no folder of a run; give the one that holds its {RUN}")
    with RunFolder(path) as folder:
        clips = {number: finished_clip.seal(clip) for number, clip in folder.clips().items()}
        freed = sum(finished_clip.prune(clip) for clip in folder.to_prune(clips).values())
        freed += sum(finished_clip.prune(clip) for clip in folder.elsewhere.replaced())
        say(f"{path}: {freed / 2**20:.0f} MiB less; of {len(clips)} clips the last two can be made again by themselves")
