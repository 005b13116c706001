"""`batch.html` and `batch.jsonl`: how far a batch is, what it made, which seams to look at, and what failed and why."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wan.batch.rows import DATA, PAGE, BadRow
from wan.batch.schedule import Task
from wan.files import as_text, digest_of, numbered, readable, releasing, write_text
from wan.options import Settings, options_of, words_of
from wan.pages import templates
from wan.public import public_path
from wan.server.tickets import FAILED

RENEW_SECONDS = 5.0  # from one writing to the next, and no more than this share of the time
_RENEW_SHARE = 0.02
MOST_PICTURES = 500  # of chains on the page, of which each takes about 5 kB
MOST_SEAMS = 200
END = "}\n"  # of a row

log = logging.getLogger(__name__)


def is_report(file: Path) -> bool:
    """Whether a file of either name is one that a batch has written."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.name == PAGE:
        return "script-src 'none'" in text and "generate_batch.py" in text
    try:
        first = json.loads(text.partition("\n")[0] or "{}")
    except ValueError:
        return False
    return not text or (isinstance(first, dict) and {"where", "state"} <= first.keys())


# Each file ends in the digest of itself without it: two commands may renew them, so that no third file can say it.
_SEALS = {
    PAGE: re.compile(r"\n<!-- digest ([0-9a-f]+) -->\n\Z"),
    DATA: re.compile(r', "digest": "([0-9a-f]+)"(?=\}\n\Z)'),
}


def sealed(name: str, text: str) -> str:
    """The text of a file with its digest, in a comment of the page or a key of the last row."""
    digest = digest_of(as_text(text))
    if name == PAGE:
        return f"{text}\n<!-- digest {digest} -->\n"
    return text and f'{text.removesuffix(END)}, "digest": "{digest}"{END}'


def is_as_written(name: str, text: str) -> bool:
    """Whether a file holds what a batch gave it."""
    seal = _SEALS[name].search(text)
    return not text or (seal is not None and seal[1] == digest_of(as_text(text[: seal.start()] + text[seal.end() :])))


class Report:
    """Both files in a folder, which are renewed as the batch runs. One that somebody changed gets another name."""

    def __init__(self, folder: Path, settings: Settings, bad: Sequence[BadRow]) -> None:
        self.folder, self.settings, self.bad = folder, settings, bad
        self._next = 0.0
        self._began = time.monotonic()

    def renew(self, tasks: Sequence[Task], places: Mapping[int, str]) -> None:
        """Write them again, unless that was a moment ago. `places` are the machines of workers that are at work."""
        if time.monotonic() >= self._next:
            self.write(tasks, places, status="running")

    def write(self, tasks: Sequence[Task], places: Mapping[int, str], *, status: str) -> None:
        """Write them as things stand."""
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [self._row(task, places) for task in tasks]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        lines += [json.dumps({"where": one.where, "state": "bad", "reason": one.reason}) for one in self.bad]
        self._replace(DATA, "".join(f"{line}\n" for line in lines))
        self._replace(PAGE, self._page(tasks, rows, status))
        now = time.monotonic()
        self._next = now + max(RENEW_SECONDS, (now - began) / _RENEW_SHARE)

    def _replace(self, name: str, text: str) -> None:
        path = self.folder / name
        if path.exists() and not is_as_written(name, path.read_bytes().decode("utf-8", "surrogateescape")):
            names = (path.with_name(f"{stem}{path.suffix}") for stem in numbered(f"{path.stem}_changed"))
            kept = next(other for other in names if not other.exists())
            log.warning("%s is not what was written; it is %s from now on", path, kept.name)
            with releasing(path, "move"):
                path.rename(kept)
        write_text(path, sealed(name, text))

    def _row(self, task: Task, places: Mapping[int, str]) -> dict[str, Any]:
        return {
            "name": task.row.name,
            "where": task.row.where,
            "video": public_path(task.row.settings.video or ""),
            "folder": readable(os.path.relpath(task.row.folder, self.folder)),
            "state": task.state,
            "elsewhere": task.elsewhere,
            "clips": task.clips,
            "clips_finished": task.done,
            "clips_made_now": task.made,
            "video_seconds": round(task.video_seconds, 3),
            "failures": task.lost,
            "reason": task.reason,
            "warnings": task.warnings,
            "attention": list(task.attention),
            "worker": task.worker,
            "machine": None if task.worker is None else places.get(task.worker),
        }

    def _page(self, tasks: Sequence[Task], rows: Sequence[Mapping[str, Any]], status: str) -> str:
        hours = (time.monotonic() - self._began) / 3600
        shown = [
            {
                **row,
                "picture": task.picture if number < MOST_PICTURES else None,
                "report": self._address(task, "report.html"),
                "joined": self._address(task, "joined.mp4"),
            }
            for number, (task, row) in enumerate(zip(tasks, rows, strict=True))
        ]
        seams = [{**row, **seam} for row in shown for seam in row["attention"]]
        seams.sort(key=lambda one: -(one.get("score") or 0.0))
        made = sum(task.made for task in tasks)
        return (
            templates("wan.batch")
            .get_template("batch.html.jinja")
            .render(
                status=status,
                title=public_path(self.settings.videos or ""),
                counts=Counter(task.state for task in tasks),
                rows=shown,
                failed=[row for row in shown if row["state"] == FAILED],
                bad=self.bad,
                seams=seams[:MOST_SEAMS],
                more_seams=max(0, len(seams) - MOST_SEAMS),
                clips=sum(task.clips for task in tasks),
                finished=sum(task.done for task in tasks),
                made=made,
                per_hour=made / hours if made and hours else None,
                video_seconds=sum(task.video_seconds for task in tasks),
                command=shlex.join(["python", "generate_batch.py", *words_of(self._arguments(), "batch")]),
            )
        )

    def _arguments(self) -> dict[str, Any]:
        """What the command was told, as JSON values that may be handed on: without secrets."""
        return {one.name: one.kind.public(getattr(self.settings, one.name)) for one in options_of("batch") if one.flag}

    def _address(self, task: Task, name: str) -> str:
        return quote(
            os.path.relpath(task.row.folder / name, self.folder).replace(os.sep, "/"), errors="surrogateescape"
        )
