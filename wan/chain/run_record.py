"""What is written about a run as it goes: run.json, the prompts and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from wan.chain.finished_clip import FinishedClip
from wan.chain.report import render_report
from wan.chain.run_folder import DATA, PAGE, PROMPTS, RunFolder
from wan.chain.written import Written
from wan.files import as_json, as_text, digest_of, write_bytes
from wan.options import Settings, options_of


class RunRecord:
    """Writes about a run with these settings, which took `seconds` in the commands before this one."""

    def __init__(self, settings: Settings, folder: RunFolder, written: Written, seconds: float) -> None:
        self.settings, self.folder, self.written = settings, folder, written
        self.makes_clips = False  # a run that has nothing to do leaves the time of those that made the clips
        self._seconds, self._started = seconds, time.perf_counter()

    def write(self, status: str, clips: Sequence[FinishedClip], asked: int, state: Mapping[str, Any]) -> None:
        """`run.json`, `prompts_log.txt` and the report, with these finished clips of as many as are `asked` for.

        `state` is what else the next run goes on from. What somebody has changed of the others moves to `redone/`.
        """
        records = [{"file": clip.video.name} | dict(clip.record) for clip in clips]
        made_in = time.perf_counter() - self._started if self.makes_clips else 0.0
        run = {
            "status": status,
            "clips_finished": len(clips),
            "clips_asked": asked,
            **state,
            "seconds": round(self._seconds + made_in, 3),
            "arguments": self._arguments(),
            "clips": records,
        }
        page, data = render_report(run, records, [clip.sheet for clip in clips])
        files = {PROMPTS: as_text(_prompts(clips)), DATA: as_json(data), PAGE: as_text(page)}
        for name, content in files.items():
            self.written.announce(name, digest_of(content))
        self.folder.write_run(run | self.written.as_json())  # first: it tells that the other files are ours
        for name, content in files.items():
            write_bytes(self.folder.path / name, content)

    def _arguments(self) -> dict[str, Any]:
        """What the command was told, as JSON values that may be handed on."""
        given = {
            one.name: one.kind.public(getattr(self.settings, one.name)) for one in options_of("continuous") if one.flag
        }
        return dict(sorted(given.items()))


def _prompts(clips: Sequence[FinishedClip]) -> str:
    """One line a clip."""
    return "".join(
        f"{clip.video.name}\tseed {clip.record['seed']}\t{' '.join(clip.record['prompt'].split())}\n" for clip in clips
    )
