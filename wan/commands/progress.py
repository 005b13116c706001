"""One bar per clip with stage, step and time left."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

from wan.types import Step


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
    """One bar per clip with stage, step and time left, and above it the clips of a chain. Silent off a terminal."""

    def __init__(self, title: str, clips: int = 0) -> None:
        self.title = title
        self.clips = clips
        self.chain: tqdm[Any] | None = None
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Progress:
        if self.clips:
            self.chain = self._new(total=self.clips, desc="chain", unit="clip", position=0)
        else:
            self.begin(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (self.bar, self.chain):
            if bar is not None:
                bar.close()

    def begin(self, title: str) -> None:
        """A new clip."""
        self.title = title
        if self.bar is not None:
            self.bar.close()
        self.bar = self._new(desc=title, unit="step", position=1 if self.clips else 0, leave=not self.clips)

    def stage(self, name: str) -> None:
        """What goes on now."""
        if self.bar is not None:
            self.bar.set_description(f"{self.title} {name}")

    def finish_clips(self, count: int = 1) -> None:
        """So many more clips of the chain are on disk."""
        if self.chain is not None:
            self.chain.update(count)

    def __call__(self, step: Step) -> None:
        if self.bar is None:
            return
        self.bar.total = step.total
        self.stage(step.stage)
        if step.latents is None and step.index == 0:
            self.bar.reset(step.total)  # time left is counted from here, not from loading
        self.bar.update(step.index - self.bar.n)

    @staticmethod
    def _new(**options: Any) -> tqdm[Any]:
        terminal = sys.stderr is not None and sys.stderr.isatty()  # None where it was closed before we began
        return tqdm(disable=not terminal, dynamic_ncols=True, file=sys.stderr, **options)
