"""What a command is about to write, and what of the user's must not be lost by it. Needs no PyTorch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.errors import UserError
from wan.files import file_digest
from wan.foreign import read_json
from wan.kinds import Files
from wan.options import OPTIONS, OUTPUT
from wan.settings import LoraFile

if TYPE_CHECKING:
    from wan.chain.run_folder import RunFolder
    from wan.commands.job import Job


def check_file(job: Job, target: Path) -> None:
    """Raise UserError for an mp4 that cannot be written, or that would replace what we did not make."""
    videos = {target: _is_clip}
    if job.settings.upscale is not None:
        videos[upscaled_name(target)] = _is_larger
    inputs = list(_inputs(job))
    for video, is_ours in videos.items():
        media.check_output(video)
        files = [video, video.with_suffix(".json")]
        for user, file in inputs:
            if any(_same(file, ours) for ours in files):
                raise UserError(f"`save_file` {target} would replace {file}, which {user} needs; give another name")
        existing = [file for file in files if file.exists()]
        if existing and not job.settings.overwrite and not is_ours(video):
            raise UserError(
                f"{existing[0]} is there already, and no record beside it says that it was made here: give another "
                "`save_file`, or `overwrite` to replace it"
            )


def upscaled_name(video: Path) -> Path:
    """Where the larger one of a single video is written; a JSON file of its name says what it was made of."""
    return video.with_name(f"{video.stem}_upscaled.mp4")


def check_folder(job: Job, folder: RunFolder) -> None:
    """Raise UserError for a folder that cannot be written to, or in which a file of the user's would be replaced."""
    output = folder.path
    if output.exists() and not output.is_dir():
        raise UserError(f"`output_dir` {output} is a file; give a folder")
    parent = next(one for one in (output.absolute(), *output.absolute().parents) if one.exists())
    if not parent.is_dir():
        raise UserError(f"`output_dir` {output} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"`output_dir` {output} cannot be used: {parent} is not writable")
    _try_to_write(output)
    folder.check_names()
    for user, file in _inputs(job):
        # as it is named, and as what it is: a link in the folder would be replaced as well
        for place in (file, file.resolve()):
            if folder.writes(place):
                raise UserError(
                    f"{file} would be overwritten: {user} needs it, and a run in {output} writes a file of that name; "
                    "give another `output_dir`"
                )
    if foreign := folder.foreign(preview=job.settings.preview, upscaled=job.settings.upscale is not None):
        raise UserError(f"{foreign} would be overwritten, and no run of ours made it; give another `output_dir`")


def _try_to_write(folder: Path) -> None:
    """Raise UserError for a folder that cannot be made or written to, for reasons that only trying tells."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"`output_dir` {folder} cannot be written to: {error.strerror}; give another") from error
    finally:
        for one in made:
            with suppress(OSError):  # it was not made
                one.rmdir()


def _inputs(job: Job) -> Iterator[tuple[str, Path]]:
    """The files that the command reads, each with the setting that names it."""
    settings: list[tuple[str, str, Any]] = [(f"`{name}`", name, getattr(job.settings, name)) for name in OPTIONS]
    settings += [("the storyboard", name, value) for scene in job.scenes for name, value in scene.values.items()]
    for shown, name, value in settings:
        one = OPTIONS[name]
        if one.group == OUTPUT or not one.kind.local or not value or value is True:
            continue
        texts = [LoraFile.parse(text).path for text in value] if isinstance(one.kind, Files) else [value]
        yield from ((shown, path) for text in texts if (path := Path(text).expanduser()).is_file())


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _is_clip(video: Path) -> bool:
    """Whether a file is a clip of ours as it was written, or is gone and its record is there."""
    record = _record(video)
    versions, digests = record.get("versions"), record.get("digests")
    if not isinstance(versions, dict) or "wan-continue" not in versions or "seed" not in record:
        return False
    # earlier releases noted no digest
    return not (video.exists() and isinstance(digests, dict)) or digests.get("mp4") == file_digest(video)


def _is_larger(video: Path) -> bool:
    """Whether a file is a larger video of ours as it was written, or is gone and its record is there."""
    record = _record(video)
    return "model_digest" in record and (not video.exists() or record.get("video_digest") == file_digest(video))


def _record(video: Path) -> dict[str, Any]:
    """What the JSON file next to a video says; empty for one that is none."""
    try:
        return read_json(video.with_suffix(".json"))
    except UserError:
        return {}
