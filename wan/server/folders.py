"""The folder of a chain on the server, as clients see it: its files, its clips, and by which files it is led."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from wan.errors import UserError
from wan.files import link_or_copy, write_json
from wan.foreign import read_json

# as in wan.chain.run_folder, which needs PyTorch; a test compares them
JOINED, RUN, DATA, PAGE, STOP, PREVIEW = "joined.mp4", "run.json", "report.json", "report.html", "stop", "preview.webp"
SHEET = "sheet."
_KEPT = (".mp4", ".safetensors", ".json")
_MOST = 256 << 20  # bytes of a report of many clips


class ChainFolder:
    """One chain: what it was given, and below `run` the run's folder."""

    def __init__(self, path: Path, run: Path | None = None) -> None:
        self.path = path
        self.run = path / "run" if run is None else run
        self._data: tuple[int, dict[str, Any]] = (0, {})
        self._by_number: dict[Any, dict[str, Any]] = {}

    @property
    def storyboard(self) -> Path:
        """What is different in which clip."""
        return self.path / "storyboard.json"

    def read_clips(self) -> list[dict[str, Any]]:
        """What the storyboard says of each clip, as far as it goes."""
        clips: list[dict[str, Any]] = read_json(self.storyboard)["clips"]
        return clips

    def write_clips(self, clips: Sequence[Mapping[str, Any]]) -> None:
        """Say what is different in which clip; the run reads it before each clip."""
        write_json(self.storyboard, {"clips": [dict(clip) for clip in clips]})

    def ask_to_stop(self) -> None:
        """Let the run stop after the clip that it makes."""
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / STOP).touch()

    def forget_stop(self) -> None:
        """Let the run go on."""
        (self.run / STOP).unlink(missing_ok=True)

    @property
    def joined(self) -> Path:
        """The joined video."""
        return self.run / JOINED

    @property
    def preview(self) -> Path:
        """The picture of the clip that is being made."""
        return self.run / PREVIEW

    def status(self) -> dict[str, Any]:
        """The run's record, empty before it begins or where it cannot be read."""
        return _read(self.run / RUN)

    def report(self) -> dict[str, Any]:
        """The facts of the run's report, empty before its first clip."""
        now = stamp(self.run / DATA)
        if now != self._data[0]:
            self._data = now, _read(self.run / DATA) if now else {}
            self._by_number = {clip.get("number"): clip for clip in self._data[1].get("clips", ())}
        return self._data[1]

    def made(self, number: int) -> dict[str, Any]:
        """What the report says of a finished clip, empty for one that is not."""
        self.report()
        facts: dict[str, Any] = self._by_number.get(number, {})
        return facts

    @property
    def stamps(self) -> tuple[int, ...]:
        """What changes when anything of the clips does."""
        return tuple(stamp(path) for path in (self.run / DATA, self.joined, self.storyboard, self.run / "takes"))

    def video(self, number: int) -> Path | None:
        """The mp4 of a finished clip."""
        name = str(self.made(number).get("file") or "")
        path = self.run / name
        return path if name.endswith(".mp4") and name == os.path.basename(name) and path.is_file() else None

    def version(self, number: int) -> int | None:
        """What changes when a finished clip is another; None for one that is not finished."""
        path = self.video(number)
        return None if path is None else stamp(path)

    def all_takes(self) -> dict[int, dict[int, Path]]:
        """The mp4s of takes that are whole, by the number of their clip and their own."""
        takes: dict[int, dict[int, Path]] = {}
        for path in sorted(self.run.glob("takes/*/take_*_seed*.json")):
            clip, take = path.parent.name, path.stem.split("_")[1]
            if clip.isdecimal() and take.isdecimal() and path.with_suffix(".mp4").is_file():
                takes.setdefault(int(clip), {})[int(take)] = path.with_suffix(".mp4")
        return takes

    def takes(self, number: int) -> dict[int, Path]:
        """Those of one clip."""
        return self.all_takes().get(number, {})

    def seam(self, number: int) -> list[bytes]:
        """JPEGs of the frames around the seam before a clip, four on each side."""
        video = self.video(number)
        if video is None:
            return []
        try:
            with safe_open(video.with_suffix(".safetensors"), framework="numpy") as opened:
                names = sorted(name for name in opened.keys() if name.startswith(SHEET))  # noqa: SIM118
                return [opened.get_tensor(name).tobytes() for name in names]
        except (OSError, SafetensorError):
            return []

    def take_clips_of(self, other: ChainFolder, count: int) -> int:
        """Link the first `count` finished clips of another folder into this one; returns how many there were."""
        self.run.mkdir(parents=True, exist_ok=True)
        done = 0
        for number in range(1, count + 1):
            video = other.video(number)
            if video is None:
                break
            for suffix in _KEPT:
                link_or_copy(video.with_suffix(suffix), self.run / video.with_suffix(suffix).name)
            done = number
        return done


def stamp(path: Path) -> int:
    """What changes when a file does; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, _MOST)
    except UserError:
        return {}
