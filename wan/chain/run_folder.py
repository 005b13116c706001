"""A chain's folder: what is finished in it, losslessly, and what each clip was made with.

A clip is files that appear one after the other, each under its name only when it is complete: a draft with its latents
as soon as they are sampled, `video_03_seed12.safetensors` for the clip after it, `.mp4` for people, and last the
`.json` record, which says that the clip is finished and has the digests of both. Whatever stops a run, the next one
finds every finished clip, samples no clip again, and takes nothing for finished that is not what was written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor

from wan import media
from wan.chain.draft import discard
from wan.chain.fingerprint import fingerprint
from wan.chain.records import check_record, read_run
from wan.errors import UserError
from wan.files import file_digest, write_bytes, write_json, write_text
from wan.foreign import parse_json, read_json
from wan.options import LONGEST_CONTEXT, current, settings_of
from wan.types import Generation, UInt8Array, is_finite, to_uint8

log = logging.getLogger(__name__)

REDONE = "redone"
SHEET = "sheet."
JOINED, RUN, PROMPTS, PAGE, DATA = "joined.mp4", "run.json", "prompts_log.txt", "report.html", "report.json"
LOCK = ".lock"  # an empty file that stays
_OF_THE_RUN = (RUN, JOINED, PROMPTS, PAGE, DATA)
_SUFFIXES = (".safetensors", ".mp4", ".json")  # of a clip, in the order in which they appear
_NAME = re.compile(r"video_0*([1-9]\d{0,4})_seed(\d{1,19})\.json")


@dataclass(frozen=True)
class FinishedClip:
    """One clip on disk, as `Footage`: what the next clip needs of it, bit for bit.

    `settings` is everything that made it; among them is the fingerprint of the clip before.
    """

    number: int
    record_path: Path
    record: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def video(self) -> Path:
        """The mp4."""
        return self.record_path.with_suffix(".mp4")

    @property
    def state(self) -> Path:
        """The latents, the last frames and the frames for the captioner."""
        return self.record_path.with_suffix(".safetensors")

    @property
    def fingerprint(self) -> str:
        """Of all that made the clip."""
        return fingerprint(self.settings)

    @property
    def dropped(self) -> int:
        """Leading frames that repeat the clip before."""
        return int(self.record.get("dropped", 1))

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.state, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    @property
    def last(self) -> Tensor:
        """The last frame, float32 [3, H, W] in [-1, 1]."""
        return self._tensor("tail")[-1].permute(2, 0, 1).contiguous()

    @property
    def motion(self) -> Tensor:
        """The last latent frame, float32 [z, 1, h, w]."""
        return self._tensor("latents")[:, -1:]

    def tail(self, count: int, fps: Fraction) -> Tensor:
        """The last frames, up to `count` and no more than are kept, float32 [n, H, W, 3], oldest first."""
        if fps != Fraction(self.record["fps"]):
            raise ValueError(f"{self.state} holds frames at {self.record['fps']} frames per second, not at {fps}")
        return self._tensor("tail")[-count:]

    def samples(self, count: int, seconds: float | None = None) -> UInt8Array:
        """Frames for the captioner, uint8 [n, H, W, 3], as `Footage.samples`.

        Those that were kept when the clip was saved, bit for bit; where others are asked for by now, the mp4's.
        """
        with safe_open(self.state, framework="pt") as opened:
            kept = json.loads(opened.metadata().get("samples", "null"))
            if kept == [count, seconds]:
                frames: UInt8Array = opened.get_tensor("samples").numpy()
                return frames
        if seconds is None:
            return media.sample_frames(self.video, count)
        return media.read_tail(self.video, count, Fraction(max(count - 1, 1)) / Fraction(seconds))

    @property
    def sheet(self) -> list[bytes]:
        """JPEGs of the frames around the seam before the clip."""
        with safe_open(self.state, framework="pt") as opened:
            names = sorted(name for name in opened.keys() if name.startswith(SHEET))  # noqa: SIM118
            return [opened.get_tensor(name).numpy().tobytes() for name in names]


@dataclass(frozen=True)
class _Fault:
    """Why a clip does not count as finished."""

    number: int
    reason: str


class RunFolder:
    """The folder of one chain, locked while it is open, so that two runs cannot mix. Raises UserError."""

    def __init__(self, path: Path, *, lock: bool = True) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, fallback_to_soft=False) if lock else None

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self.check_names()
        try:
            if self._lock is not None:
                # a lock of the system, which goes with the process; a mark in its place would outlast a kill
                self._lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(f"{self.path} is in use by another run; wait for it, or give another folder") from error
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{self.path} cannot be locked ({reason}); give another folder, or `no_lock` if no other run uses it"
            ) from error
        if self._lock is not None:  # which keeps others out: these are of a run that was killed
            for name in ("video_", ".draft_", *_OF_THE_RUN):
                for left in self.path.glob(f".{name}*.part"):
                    left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def check_names(self) -> None:
        """Raise UserError where something else stands under a name that a run needs: said now, not after an hour."""
        names = ((REDONE, "folder", Path.is_dir), *((name, "file", Path.is_file) for name in _OF_THE_RUN))
        for name, wanted, fits in names:
            if os.path.lexists(path := self.path / name) and not fits(path):
                raise UserError(f"{path} is no {wanted}, and a run needs that name; move it, or give another folder")

    def writes(self, name: str) -> bool:
        """Whether a run may give a file this name, on systems too that do not tell letters by their case."""
        file = Path(name.casefold())
        return file.name in _OF_THE_RUN or (file.suffix in _SUFFIXES and _number(file) is not None)

    def foreign(self) -> Path | None:
        """A file that a run would replace and that none of ours has made."""
        there = [path for name in _OF_THE_RUN if (path := self.path / name).exists()]
        if self.path / RUN in there:
            run = self.run
            return None if isinstance(run.get("clips"), list) and "base_seed" in run else self.path / RUN
        # a run writes its record first; clips without one are of a run whose record was removed
        return there[0] if there and not self.clips() else None

    def clips(self) -> dict[int, FinishedClip]:
        """The finished clips by number, counted from 1; `faults` then says what is wrong with those that are not.

        A clip is finished as long as its files are those that were written: their digests are compared. Raises
        UserError for two records of one number: which of them the user wants, only they know.
        """
        self.faults: dict[int, str] = {}
        clips = {}
        paths = [path for path in sorted(self.path.glob("video_*.json")) if _number(path) is not None]
        first: dict[int | None, Path] = {}
        for path in paths:
            if (other := first.setdefault(_number(path), path)) is not path:
                raise UserError(
                    f"{self.path} has two records of clip {_number(path)}, {other.name} and {path.name}; "
                    f"move the files of one of them elsewhere"
                )
        with ThreadPoolExecutor(4) as readers:  # digests are computed beside each other
            for found in readers.map(self._read, paths):
                if isinstance(found, FinishedClip):
                    clips[found.number] = found
                else:
                    self.faults[found.number] = found.reason
        return clips

    def _read(self, path: Path) -> FinishedClip | _Fault:
        number = _number(path)
        assert number is not None  # such are read
        state, video = path.with_suffix(".safetensors"), path.with_suffix(".mp4")
        try:
            record = current(read_json(path))
            made_with = record["fingerprint"]
        except (UserError, KeyError):
            return _Fault(number, f"its record {path.name} is none")
        for file in (state, video):
            if not file.is_file():
                return _Fault(number, f"{file.name} is not there")
        clip = FinishedClip(number, path, record, _settings(state))
        digests = record.get("digests")
        try:
            if not isinstance(digests, dict):
                if fault := _check_without_digests(clip):
                    return fault
                check_record(path, record)
                return clip
            changed = [file.name for file in (state, video) if file_digest(file) != digests.get(file.suffix[1:])]
        except OSError as error:
            return _Fault(number, f"{error.filename} cannot be read ({error.strerror})")
        if changed:
            are = "are" if len(changed) > 1 else "is"
            return _Fault(number, f"{' and '.join(changed)} {are} not what was written")
        if made_with != clip.fingerprint:
            return _Fault(number, f"its record {path.name} is of another clip")
        check_record(path, record)
        return clip

    def seal(self, clip: FinishedClip) -> FinishedClip:
        """Note the digests of a clip of 0.1.0, whose record has none."""
        if "digests" in clip.record:
            return clip
        said = read_json(clip.record_path) | {"digests": _digests(clip.record_path)}
        write_json(clip.record_path, said)
        return dataclasses.replace(clip, record=current(said))

    def save(
        self,
        number: int,
        digits: int,
        made: Generation,
        settings: Mapping[str, Any],
        describe: Callable[[], Mapping[str, Any]],
        *,
        samples: tuple[int, float | None],
        sheet: Sequence[bytes],
        metadata: bool,
    ) -> FinishedClip:
        """Put a clip on disk; it is finished when this returns. An older one of its number goes to `redone/`.

        First comes what cannot be made again in no time, its state; then its record is made with `describe`.
        `samples` are the arguments of `Generation.samples` for what the captioner will see of it, `sheet` the JPEGs of
        its seam.
        """
        stem = self.path / f"video_{number:0{digits}d}_seed{made.request.seed}"
        path = stem.with_suffix(".json")
        self._make_room(number, stem.name)
        frames = made.clip.frames
        tensors = {
            "latents": made.latents.float().contiguous(),
            "tail": frames[-LONGEST_CONTEXT:].contiguous(),
            "samples": torch.from_numpy(made.samples(*samples)).contiguous(),
            **{f"{SHEET}{index:02d}": _bytes(jpeg) for index, jpeg in enumerate(sheet)},
        }
        said = {"settings": json.dumps(settings, ensure_ascii=False), "samples": json.dumps(samples)}
        # the library's own writer would leave a file of its own when killed
        write_bytes(stem.with_suffix(".safetensors"), as_bytes(tensors, said))
        record = dict(describe())
        # the first new frame starts a group of its own, so that joining can leave out what repeats the clip before
        media.write_video(
            stem.with_suffix(".mp4"),
            (to_uint8(frame) for frame in frames),
            made.clip.fps,
            keyframes=frozenset({0, record.get("dropped", 1)}),
            metadata=settings_of(record) if metadata else None,
        )
        record |= {"fingerprint": fingerprint(settings), "digests": _digests(path)}
        write_json(path, record)
        discard(self.path, number)
        return FinishedClip(number, path, record, settings)

    def _make_room(self, number: int, stem: str) -> None:
        """Move to `redone/` whatever bears a clip's number, the record last: an earlier clip, or what is not ours.

        What a killed run left of this very clip is overwritten. It has no record yet; its state, which comes first,
        tells.
        """
        files = [file for file in self.path.glob("video_*") if _number(file) == number]
        recorded = {file.stem for file in files if file.suffix == ".json"}
        left = stem if stem not in recorded and _settings(self.path / f"{stem}.safetensors") else None
        for file in sorted(files, key=lambda file: file.suffix == ".json"):
            if file.stem == left:
                continue
            if file.stem not in recorded:
                log.warning("%s has no record of a run; it moves to %s/", file, REDONE)
            self._set_aside(file)

    def _set_aside(self, file: Path) -> None:
        home = self.path / REDONE
        home.mkdir(exist_ok=True)
        copies = (home / f"{file.stem}{again}{file.suffix}" for again in ("", *(f"_{n}" for n in range(2, 10**6))))
        file.rename(next(copy for copy in copies if not copy.exists()))

    def set_joined_aside(self) -> None:
        """Move the joined video to `redone/`, if there is one."""
        if (joined := self.path / JOINED).exists():
            self._set_aside(joined)

    @property
    def run(self) -> dict[str, Any]:
        """The record of the run so far, empty before the first."""
        path = self.path / RUN
        return read_run(path) if path.exists() else {}

    def write_run(self, record: Mapping[str, Any]) -> None:
        """Replace the record of the run."""
        write_json(self.path / RUN, record)

    def write_prompts(self, clips: list[FinishedClip]) -> None:
        """`prompts_log.txt`: one line a clip."""
        lines = [
            f"{clip.video.name}\tseed {clip.record['seed']}\t{' '.join(clip.record['prompt'].split())}\n"
            for clip in clips
        ]
        write_text(self.path / PROMPTS, "".join(lines))


def _settings(state: Path) -> dict[str, Any]:
    """What a clip was made with, as its state says; empty for a file that is no state."""
    if not state.is_file():  # opening a pipe would wait for ever
        return {}
    try:
        with safe_open(state, framework="pt") as opened:
            return dict(parse_json(opened.metadata()["settings"], str(state)))
    except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError):
        return {}


def _digests(record: Path) -> dict[str, str]:
    """Of the files of a clip, by suffix."""
    return {suffix: file_digest(record.with_suffix(f".{suffix}")) for suffix in ("safetensors", "mp4")}


def _check_without_digests(clip: FinishedClip) -> _Fault | None:
    """What can be told of a clip of 0.1.0: whether its files can be read, and fit its record."""
    if clip.record.get("fingerprint") != clip.fingerprint:
        return _Fault(clip.number, f"its record {clip.record_path.name} is of another clip, or its state is damaged")
    width, height = clip.settings.get("width"), clip.settings.get("height")
    try:
        latents, tail = clip._tensor("latents"), clip._tensor("tail")
        if tail.shape[1:] != (height, width, 3) or not (is_finite(latents) and is_finite(tail)):
            return _Fault(clip.number, f"{clip.state.name} is of another clip, or damaged")
        media.read_last_frame(clip.video)
    except (SafetensorError, OSError):
        return _Fault(clip.number, f"{clip.state.name} is damaged")
    except UserError:
        return _Fault(clip.number, f"{clip.video.name} is damaged")
    return None


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _number(file: Path) -> int | None:
    """The clip that a file belongs to."""
    match = _NAME.fullmatch(f"{file.stem}.json")
    return int(match[1]) if match else None
