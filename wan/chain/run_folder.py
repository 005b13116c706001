"""A chain's folder: what is finished in it, losslessly, and what each clip was made with.

A clip is files that appear one after the other, each under its name only when it is complete: a draft with its latents
as soon as they are sampled, `video_03_seed12.safetensors` for the clip after it, `.mp4` for people, and last the
`.json` record, which says that the clip is finished and has the digests of both. Whatever stops a run, the next one
finds every finished clip, samples no clip again, and takes nothing for finished that is not what was written.
"""

from __future__ import annotations

import dataclasses
import errno
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
from wan.errors import InUse, UserError
from wan.files import digest_of, file_digest, link_or_copy, numbered, write_bytes, write_json, write_text
from wan.foreign import parse_json, read_json
from wan.options import LONGEST_CONTEXT, current, settings_of
from wan.types import Generation, UInt8Array, is_finite, to_uint8

log = logging.getLogger(__name__)

REDONE, TAKES = "redone", "takes"
SHEET = "sheet."
JOINED, RUN, PROMPTS, PAGE, DATA = "joined.mp4", "run.json", "prompts_log.txt", "report.html", "report.json"
UPSCALED = ("joined_upscaled.mp4", "joined_upscaled.json")  # with `upscale`
PREVIEW = "preview.webp"
STOP, PAUSE = "stop", "pause"  # files by which a person leads a run
LOCK = ".lock"  # an empty file that stays
_OF_THE_RUN = (RUN, JOINED, PROMPTS, PAGE, DATA)
_SUFFIXES = (".safetensors", ".mp4", ".json")  # of a clip, in the order in which they appear
_NAME = re.compile(r"video_0*([1-9]\d{0,4})_seed(\d{1,19})\.json")
_REPLACED = re.compile(r"video_0*([1-9]\d{0,4})_seed(\d{1,19})(_\d{1,6})?\.json")  # in redone/


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

    @property
    def is_pruned(self) -> bool:
        """Whether its frames and latents were left out, so that nothing can go on from it."""
        with safe_open(self.state, framework="pt") as opened:
            return "tail" not in opened.keys()  # noqa: SIM118

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

    @property
    def colours(self) -> Tensor | None:
        """Of the first clip of its shot, where the chain carries them."""
        with safe_open(self.state, framework="pt") as opened:
            return opened.get_tensor("colours") if "colours" in opened.keys() else None  # noqa: SIM118

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
class Told:
    """What is kept of a clip next to its frames and latents."""

    describe: Callable[[], Mapping[str, Any]]  # makes the record, when the state is on disk
    samples: tuple[int, float | None]  # the arguments of `Generation.samples` for what the captioner will see of it
    sheet: Sequence[bytes]  # JPEGs of its seam
    metadata: bool  # whether the mp4 holds the settings
    keyframes: frozenset[int] = frozenset()  # frames at which the mp4 is cut when clips are joined with fades


def _has_no_locks(error: OSError | NotImplementedError) -> bool:
    """Whether a file could not be locked because its file system knows no locks."""
    known = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
    return isinstance(error, NotImplementedError) or error.errno in known


@dataclass(frozen=True)
class _Fault:
    """Why a clip does not count as finished."""

    number: int
    reason: str


class RunFolder:
    """The folder of one chain, locked while it is open, so that two runs cannot mix. Raises UserError."""

    def __init__(self, path: Path, *, lock: bool = True) -> None:
        self.path = path
        self._digests: dict[Path, str] = {}  # what the records of clips that were replaced say
        # the thread that opens the folder may not be the one that closes it
        self._lock = FileLock(path / LOCK, fallback_to_soft=False, thread_local=False) if lock else None

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self.check_names()
        try:
            if self._lock is not None:
                # a lock of the system, which goes with the process; a mark in its place would outlast a kill
                self._lock.acquire(blocking=False)
        except Timeout as error:
            raise InUse(f"{self.path} is in use by another run; wait for it, or give another folder") from error
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            # where files can be written, and only locks are missing
            without = ", or `no_lock` if no other run uses it" if _has_no_locks(error) else ""
            raise UserError(f"{self.path} cannot be locked ({reason}); give another folder{without}") from error
        if self._lock is not None:  # which keeps others out: these are of a run that was killed
            for name in ("video_", ".draft_", PREVIEW, *UPSCALED, *_OF_THE_RUN):
                for left in self.path.glob(f".{name}*.part"):
                    left.unlink()
            for left in self.path.glob(f".{JOINED}.*{media.PIECE}"):
                left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def check_names(self) -> None:
        """Raise UserError where something else stands under a name that a run needs: said now, not after an hour."""
        names = (
            (REDONE, "folder", Path.is_dir),
            (TAKES, "folder", Path.is_dir),
            *((name, "file", Path.is_file) for name in _OF_THE_RUN),
        )
        for name, wanted, fits in names:
            if os.path.lexists(path := self.path / name) and not fits(path):
                raise UserError(f"{path} is no {wanted}, and a run needs that name; move it, or give another folder")

    def writes(self, name: str) -> bool:
        """Whether a run may give a file this name, on systems too that do not tell letters by their case."""
        file = Path(name.casefold())
        return file.name in (*_OF_THE_RUN, *UPSCALED) or (file.suffix in _SUFFIXES and _clip_number(file) is not None)

    def foreign(self, *, preview: bool = False, upscaled: bool = False) -> Path | None:
        """A file that a run, with what it is asked for, would replace and that none of ours has made."""
        names = (*_OF_THE_RUN, *([PREVIEW] if preview else []), *(UPSCALED if upscaled else ()))
        existing = [path for name in names if (path := self.path / name).exists()]
        if self.path / RUN in existing:
            run = self.run
            return None if isinstance(run.get("clips"), list) and "base_seed" in run else self.path / RUN
        # a run writes its record first; clips without one are of a run whose record was removed
        return existing[0] if existing and not self.clips() else None

    def clips(self) -> dict[int, FinishedClip]:
        """The finished clips by number, counted from 1; `faults` then says what is wrong with those that are not.

        A clip is finished as long as its files are those that were written: their digests are compared. Raises
        UserError for two records of one number: which of them the user wants, only they know.
        """
        self.faults: dict[int, str] = {}
        clips = {}
        paths = [path for path in sorted(self.path.glob("video_*.json")) if _clip_number(path) is not None]
        first: dict[int | None, Path] = {}
        for path in paths:
            if (other := first.setdefault(_clip_number(path), path)) is not path:
                raise UserError(
                    f"{self.path} has two records of clip {_clip_number(path)}, {other.name} and {path.name}; "
                    f"move the files of one of them elsewhere"
                )
        with ThreadPoolExecutor(4) as readers:  # digests are computed beside each other
            for clip in readers.map(self._read, paths):
                if isinstance(clip, FinishedClip):
                    clips[clip.number] = clip
                else:
                    self.faults[clip.number] = clip.reason
        return clips

    def find(self, digest: str) -> FinishedClip | None:
        """A clip with this fingerprint that was replaced, or is a take, and is whole."""
        for path in self._replaced.get(digest, ()):
            clip = self._read(path)
            if isinstance(clip, FinishedClip) and clip.fingerprint == digest and not clip.is_pruned:
                return clip
        return None

    def replaced(self) -> list[FinishedClip]:
        """The clips that were replaced and are whole."""
        clips = [self._read(path) for path in sorted((self.path / REDONE).glob("*_seed*.json"))]
        return [self.seal(clip) for clip in clips if isinstance(clip, FinishedClip)]

    def to_prune(self, clips: Mapping[int, FinishedClip]) -> dict[int, FinishedClip]:
        """Those of whose state only making a clip again has need: all but the last two, and not before a gap."""
        last = max(clips, default=0)
        return {number: clip for number, clip in clips.items() if number < last - 1 and number + 1 in clips}

    def prune(self, clip: FinishedClip) -> int:
        """Leave frames and latents out of a clip's state, which keeps its name; returns the bytes that this gave.

        The record tells of the smaller file before it is there, so that the clip is whole at any moment.
        """
        if clip.is_pruned:
            return 0
        before = clip.state.stat().st_size
        with safe_open(clip.state, framework="pt") as opened:
            metadata = {"settings": opened.metadata()["settings"]}
            names = [name for name in opened.keys() if name.startswith(SHEET)]  # noqa: SIM118
            data = as_bytes({name: opened.get_tensor(name) for name in names}, metadata)
        record = read_json(clip.record_path)
        write_json(clip.record_path, record | {"digests": record["digests"] | {"pruned": digest_of(data)}})
        write_bytes(clip.state, data)
        return before - len(data)

    @property
    def _replaced(self) -> dict[str, list[Path]]:
        """The records of takes, and of clips that were replaced, by what their fingerprints are said to be."""
        records: dict[str, list[Path]] = {}
        for path in sorted([*self.path.glob(f"{TAKES}/*/take_*.json"), *(self.path / REDONE).glob("*_seed*.json")]):
            if path not in self._digests:
                try:
                    self._digests[path] = str(read_json(path).get("fingerprint"))
                except UserError:
                    self._digests[path] = ""
            records.setdefault(self._digests[path], []).append(path)
        return records

    def _read(self, path: Path) -> FinishedClip | _Fault:
        number = _clip_number(path) or 1  # a take has none, before it is put in a clip's place
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
            changed = [file.name for file in (state, video) if file_digest(file) not in _digests_of(digests, file)]
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
        record = read_json(clip.record_path) | {"digests": _digests(clip.record_path)}
        write_json(clip.record_path, record)
        return dataclasses.replace(clip, record=current(record))

    def save(self, number: int, digits: int, made: Generation, settings: Mapping[str, Any], told: Told) -> FinishedClip:
        """Put a clip on disk; it is finished when this returns. An older one of its number goes to `redone/`.

        First comes what cannot be made again in no time, its state; then its record is made with `told.describe`.
        """
        stem = self.path / f"video_{number:0{digits}d}_seed{made.request.seed}"
        self._make_room(number, stem.name)
        record = self._write(stem, made, settings, told)
        discard(self.path, number)
        return FinishedClip(number, stem.with_suffix(".json"), record, settings)

    def save_take(
        self, number: int, digits: int, take: int, made: Generation, settings: Mapping[str, Any], told: Told
    ) -> Path:
        """Put a take of a clip on disk, as `save` does; returns its mp4. Another one of its name is set aside."""
        home = self.path / TAKES / f"{number:0{digits}d}"
        home.mkdir(parents=True, exist_ok=True)
        stem = home / f"take_{take}_seed{made.request.seed}"
        files = [file for suffix in _SUFFIXES if (file := stem.with_suffix(suffix)).exists()]
        if files and _settings(stem.with_suffix(".safetensors")) != settings:
            self._set_aside(files)
        self._digests.clear()
        self._write(stem, made, settings, told)
        return stem.with_suffix(".mp4")

    def _write(self, stem: Path, made: Generation, settings: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """The three files of a clip, one after the other; returns its record."""
        path = stem.with_suffix(".json")
        frames = made.clip.frames
        tensors = {
            "latents": made.latents.float().contiguous(),
            "tail": frames[-LONGEST_CONTEXT:].contiguous(),
            **({} if made.handed is None else {"handed": made.handed.contiguous()}),
            **({} if made.colours is None else {"colours": made.colours.contiguous()}),
            "samples": torch.from_numpy(made.samples(*told.samples)).contiguous(),
            **{f"{SHEET}{index:02d}": _bytes(jpeg) for index, jpeg in enumerate(told.sheet)},
        }
        metadata = {"settings": json.dumps(settings, ensure_ascii=False), "samples": json.dumps(told.samples)}
        # the library's own writer would leave a file of its own when killed
        write_bytes(stem.with_suffix(".safetensors"), as_bytes(tensors, metadata))
        record = dict(told.describe())
        # the first new frame starts a group of its own, so that joining can leave out what repeats the clip before
        media.write_video(
            stem.with_suffix(".mp4"),
            (to_uint8(frame) for frame in frames),
            made.clip.fps,
            keyframes=frozenset({0, record.get("dropped", 1)}) | told.keyframes,
            metadata=settings_of(record) if told.metadata else None,
        )
        record |= {"fingerprint": fingerprint(settings), "digests": _digests(path)}
        write_json(path, record)
        return record

    def _make_room(self, number: int, stem: str) -> None:
        """Move to `redone/` whatever bears a clip's number, the record last: an earlier clip, or what is not ours.

        What a killed run left of this very clip is overwritten. It has no record yet; its state, which comes first,
        tells.
        """
        files = [file for file in self.path.glob("video_*") if _clip_number(file) == number]
        recorded = {file.stem for file in files if file.suffix == ".json"}
        left = stem if stem not in recorded and _settings(self.path / f"{stem}.safetensors") else None
        for name in sorted({file.stem for file in files} - {left}):
            same = [file for file in files if file.stem == name]
            if name not in recorded:
                for file in same:
                    log.warning("%s has no record of a run; it moves to %s/", file, REDONE)
            self._set_aside(same)

    def _set_aside(self, files: Sequence[Path]) -> None:
        """Move files of one name to `redone/`, a record last, under a name that none of them has there."""
        free = self._free_in_redone(files)
        for file in sorted(files, key=lambda file: file.suffix == ".json"):
            file.rename(free.with_name(f"{free.name}{file.suffix}"))

    def _free_in_redone(self, files: Sequence[Path]) -> Path:
        """A name in `redone/`, without a suffix, that none of these files, which have one name, has there."""
        home, stem = self.path / REDONE, files[0].stem
        home.mkdir(exist_ok=True)
        self._digests.clear()
        ends = [file.suffix for file in files]
        return home / next(name for name in numbered(stem) if not any((home / f"{name}{end}").exists() for end in ends))

    def set_joined_aside(self) -> None:
        """Move the joined video to `redone/`, if there is one."""
        if (joined := self.path / JOINED).exists():
            self._set_aside([joined])

    def set_upscaled_aside(self) -> None:
        """Move the larger video with its JSON file to `redone/`, as far as they are there."""
        if files := [file for name in UPSCALED if (file := self.path / name).exists()]:
            self._set_aside(files)

    def set_clip_aside(self, record: Path) -> Path:
        """Move a finished clip to `redone/`, which has it whole before it is gone; returns its record there."""
        free = self._free_in_redone([record.with_suffix(suffix) for suffix in _SUFFIXES])
        return self._move(record, free.with_name(f"{free.name}.json"))

    def restore(self, number: int, digits: int, record: Path) -> FinishedClip:
        """Bring a clip that is whole and lies elsewhere in the folder to a place; what was there is set aside."""
        target = self.path / f"video_{number:0{digits}d}_seed{read_json(record)['seed']}.json"
        self._make_room(number, "")
        restored = self._read(self._move(record, target, keep=record.parent.name != REDONE))
        assert isinstance(restored, FinishedClip)  # it was, a moment ago
        return restored

    def _move(self, record: Path, target: Path, *, keep: bool = False) -> Path:
        """Give a clip another name, or a second one that it is to `keep`; it is finished somewhere at any moment.

        Its record there comes last and the one here goes first.
        """
        for suffix in _SUFFIXES:
            link_or_copy(record.with_suffix(suffix), target.with_suffix(suffix))
        for suffix in () if keep else reversed(_SUFFIXES):
            record.with_suffix(suffix).unlink()
        self._digests.clear()
        return target

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


def _digests_of(digests: Mapping[str, Any], file: Path) -> tuple[Any, ...]:
    """Those that a file of a clip may have: a state may have become a smaller one."""
    pruned = (digests["pruned"],) if "pruned" in digests and file.suffix == ".safetensors" else ()
    return (digests.get(file.suffix[1:]), *pruned)


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


def _clip_number(file: Path) -> int | None:
    """The clip that a file belongs to, or belonged to."""
    match = (_REPLACED if file.parent.name == REDONE else _NAME).fullmatch(f"{file.stem}.json")
    return int(match[1]) if match else None
