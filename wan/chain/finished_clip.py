"""A finished clip on disk: its three files, what is in them, and whether they still are what was written.

The files appear one after the other, each under its name only when it is complete: `video_03_seed12.safetensors` for
the clip after it, `.mp4` for people, and last the `.json` record, which says that the clip is finished and has the
digests of both.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor

from wan import media
from wan.chain.fingerprint import fingerprint
from wan.chain.records import check_record
from wan.errors import UserError
from wan.files import digest_of, file_digest, write_bytes, write_json
from wan.foreign import parse_json, read_json
from wan.options import LONGEST_CONTEXT, current, settings_of
from wan.types import Generation, UInt8Array, is_finite, to_uint8

REDONE, TAKES = "redone", "takes"
SUFFIXES = (".safetensors", ".mp4", ".json")  # of a clip, in the order in which they appear
SHEET = "sheet."
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


@dataclass(frozen=True)
class Fault:
    """Why a clip does not count as finished."""

    number: int
    reason: str


def read_clip(path: Path) -> FinishedClip | Fault:
    """The clip of a record, if its files are those that were written: their digests are compared."""
    number = clip_number(path) or 1  # a take has none, before it is put in a clip's place
    state, video = path.with_suffix(".safetensors"), path.with_suffix(".mp4")
    try:
        record = current(read_json(path))
        made_with = record["fingerprint"]
    except (UserError, KeyError):
        return Fault(number, f"its record {path.name} is none")
    for file in (state, video):
        if not file.is_file():
            return Fault(number, f"{file.name} is not there")
    clip = FinishedClip(number, path, record, settings_in(state))
    digests = record.get("digests")
    try:
        if not isinstance(digests, dict):
            if fault := _check_without_digests(clip):
                return fault
            check_record(path, record)
            return clip
        changed = [file.name for file in (state, video) if file_digest(file) not in _digests_of(digests, file)]
    except OSError as error:
        return Fault(number, f"{error.filename} cannot be read ({error.strerror})")
    if changed:
        are = "are" if len(changed) > 1 else "is"
        return Fault(number, f"{' and '.join(changed)} {are} not what was written")
    if made_with != clip.fingerprint:
        return Fault(number, f"its record {path.name} is of another clip")
    check_record(path, record)
    return clip


def write_clip(stem: Path, made: Generation, settings: Mapping[str, Any], told: Told) -> dict[str, Any]:
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
    metadata = {"settings": json.dumps(settings), "samples": json.dumps(told.samples)}
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


def seal(clip: FinishedClip) -> FinishedClip:
    """Note the digests of a clip of 0.1.0, whose record has none."""
    if "digests" in clip.record:
        return clip
    record = read_json(clip.record_path) | {"digests": _digests(clip.record_path)}
    write_json(clip.record_path, record)
    return dataclasses.replace(clip, record=current(record))


def prune(clip: FinishedClip) -> int:
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


def settings_in(state: Path) -> dict[str, Any]:
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


def _check_without_digests(clip: FinishedClip) -> Fault | None:
    """What can be told of a clip of 0.1.0: whether its files can be read, and fit its record."""
    if clip.record.get("fingerprint") != clip.fingerprint:
        return Fault(clip.number, f"its record {clip.record_path.name} is of another clip, or its state is damaged")
    width, height = clip.settings.get("width"), clip.settings.get("height")
    try:
        latents, tail = clip._tensor("latents"), clip._tensor("tail")
        if tail.shape[1:] != (height, width, 3) or not (is_finite(latents) and is_finite(tail)):
            return Fault(clip.number, f"{clip.state.name} is of another clip, or damaged")
        media.read_last_frame(clip.video)
    except (SafetensorError, OSError):
        return Fault(clip.number, f"{clip.state.name} is damaged")
    except UserError:
        return Fault(clip.number, f"{clip.video.name} is damaged")
    return None


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def clip_number(file: Path) -> int | None:
    """The clip that a file belongs to, or belonged to."""
    match = (_REPLACED if file.parent.name == REDONE else _NAME).fullmatch(f"{file.stem}.json")
    return int(match[1]) if match else None
