"""What a command says while it works: bars on a terminal, a line a stage off one, and both in a log file."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm  # in a notebook a widget

from wan.commands.lines import CLIP, PROGRESS, STAGE
from wan.detail import span

if TYPE_CHECKING:
    from wan.chain.finished_clip import FinishedClip
    from wan.types import Step

log = logging.getLogger(PROGRESS)

TICK = 1.0  # seconds between two drawings of a bar in which nothing happens


def say(*lines: str) -> None:
    """Print lines. That nobody reads them, or that the terminal lacks a character, is no error: the work is done."""
    out = sys.stdout
    if out is None:  # it was closed before we began
        return
    text = "".join(f"{line}\n" for line in lines)
    try:
        try:
            out.write(text)
        except UnicodeEncodeError:
            out.write(text.encode(out.encoding, "backslashreplace").decode(out.encoding))
        out.flush()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (what Python flushes at its end)


class Progress:
    """One bar per clip with stage, step and time left, and above it the clips of a chain; and the lines of the log."""

    def __init__(self, title: str, clips: int = 0, quiet: bool = False) -> None:
        self.title = title
        self.quiet = quiet
        self.clips = clips
        self.chain: tqdm[Any] | None = None
        self.bar: tqdm[Any] | None = None
        self.started = time.perf_counter()
        self.finished_before = self.done = 0  # clips that were there when the run began, and those of this run
        self._stage, self._since, self._steps = "", self.started, 0
        self._stepped = self.started  # when the last step was done
        self._over, self._resting = threading.Event(), False

    def __enter__(self) -> Progress:
        if self.clips:
            self.chain = self._new(total=self.clips, desc="chain", unit="clip", position=0)
        else:
            self.begin(self.title)
        if self.bar is not None or self.chain is not None:
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._end_stage()
        for bar in (self.bar, self.chain):
            if bar is not None:
                bar.close()

    def begin(self, title: str, seed: int | None = None) -> None:
        """A new clip."""
        self._resting = False
        self._end_stage()
        self.title, self._since, self._steps = title, time.perf_counter(), 0
        if seed is not None:
            log.log(CLIP, "%s seed %d", title, seed)
        if self.bar is not None:
            self.bar.close()
        self.bar = self._new(desc=title, unit="step", position=1 if self.clips else 0, leave=not self.clips)

    def _tick(self) -> None:
        """Draw the bars each second, so that they show how long a stage has taken."""
        while not self._over.wait(TICK):
            for bar in (self.chain, self.bar):
                if bar is not None and not bar.disable and not self._resting:
                    bar.refresh()

    def rest(self) -> None:
        """Leave the terminal to a question."""
        self._resting = True
        self._end_stage()
        for bar in (self.bar, self.chain):
            if bar is not None:
                bar.clear()

    def stage(self, name: str) -> None:
        """What goes on now."""
        if name != self._stage:
            self._end_stage()
            self._stage, self._since, self._steps = name, time.perf_counter(), 0
        self._describe(name)

    def _take_step(self, expert: str) -> None:
        """A denoiser has taken a step, which began with the stage or with the end of another one's step."""
        if expert != self._stage:
            if self._steps:
                self._end_stage(self._stepped)
                self._since, self._steps = self._stepped, 0
            self._stage = expert
        self._steps, self._stepped = self._steps + 1, time.perf_counter()
        self._describe(expert)

    def _describe(self, stage: str) -> None:
        if self.bar is not None:
            self.bar.set_description(f"{self.title} {stage}")

    def _end_stage(self, at: float | None = None) -> None:
        if self._stage:
            steps = f"{counted(self._steps, 'step')}, " if self._steps else ""
            seconds = (time.perf_counter() if at is None else at) - self._since
            log.log(STAGE, "%s %s: %s%.1f s", self.title, self._stage, steps, seconds)
        self._stage = ""

    def finish_clips(self, count: int) -> None:
        """So many clips of the chain were on disk before the run."""
        self.finished_before = count
        if self.chain is not None:  # the rate is that of this run
            self.chain.initial = self.chain.n = count
            self.chain.refresh()
        if count:
            log.log(CLIP, "%d of %d clips are finished already", count, self.clips)

    def finish(self, clip: FinishedClip) -> None:
        """A clip of the chain is on disk."""
        self.done += 1
        if self.chain is not None:
            self.chain.update(1)
        log.log(CLIP, "clip %d/%d finished%s: %s", clip.number, self.clips, _facts(clip.record), clip.video)
        if self.chain is not None:
            self.chain.total = self.clips
        rest = self.clips - self.finished_before - self.done
        if rest > 0:
            each = (time.perf_counter() - self.started) / self.done
            log.log(CLIP, "clip %d/%d: about %s left", clip.number, self.clips, span(each * rest))

    def take_back(self) -> None:
        """A clip that was just finished is made again."""
        self.done -= 1
        if self.chain is not None:
            self.chain.update(-1)

    def __call__(self, step: Step) -> None:
        if step.prompt is not None:
            log.log(CLIP, "%s prompt: %s", self.title, " ".join(step.prompt.split()))
            return
        if self.bar is None:
            return
        if step.detail:
            self.bar.set_description(f"{self.title} {step.stage}: {step.detail}")
            return
        self.bar.total = step.total
        if step.latents is None:
            self.stage(step.stage)
        else:
            self._take_step(step.stage)
        if step.latents is None and step.index == 0:
            self.bar.reset(step.total)  # time left is counted from here, not from loading
        self.bar.update(step.index - self.bar.n)

    def _new(self, **options: Any) -> tqdm[Any]:
        # None where it was closed before we began
        bars = ("ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())) and not self.quiet
        return tqdm(disable=not bars, dynamic_ncols=True, file=sys.stderr, **options)


def counted(count: int, word: str) -> str:
    """1 clip, 2 clips."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def _facts(record: Mapping[str, Any]) -> str:
    taken, seam = sum((record.get("seconds") or {}).values()), record.get("seam") or {}
    facts = [f" in {taken:.1f} s"] if taken else []
    if "score" in seam:
        warnings = f" ({', '.join(seam['warnings'])})" if seam.get("warnings") else ""
        facts.append(f" seam {seam['score']:.2f}{warnings}")
    return ",".join(facts)
