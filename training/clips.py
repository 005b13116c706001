"""Encoded clips in files: one process draws and encodes them, any number of trainings read them while they grow.

A file holds some hundred clips: their `latents`, the `known` latents as the model is given them, the `count` of known
latent frames and the embedded `text`, all but the count in float16.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from training.loop import Batch, Settings, load

log = logging.getLogger(__name__)
MOST = {"cuda": 150_000, "cpu": 1_000}  # clips that a training holds, 8 to 13 GB of a GPU; then the oldest go
FIRST = {"cuda": 2_048, "cpu": 1}  # clips without which a training does not begin
FILES = 4  # that are read between two batches
EVERY = 8  # batches from one look for new files to the next


class Clips:
    """The clips of a folder in the device's memory."""

    def __init__(self, folder: Path, settings: Settings, generator: torch.Generator) -> None:
        self.folder, self.settings, self.generator = folder, settings, generator
        self.most, self.first = MOST[settings.device.type], FIRST[settings.device.type]
        self.held: Batch = {}
        self.taken: set[str] = set()
        self.filled = self.place = 0

    def batches(self, count: int) -> Iterator[Batch]:
        """`count` clips at random, again and again."""
        self._wait()
        number = 0
        while True:
            if number % EVERY == 0:
                self._take(FILES)
            number += 1
            which = torch.randint(self.filled, (count,), generator=self.generator, device=self.settings.device)
            batch = {key: value[which] for key, value in self.held.items()}
            yield {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}

    def _wait(self) -> None:
        """Take what is there, once that is enough to begin with."""
        until = time.monotonic() + 60 * self.settings.minutes
        self._take(self.most)
        while self.filled < self.first:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.folder} holds {self.filled} clips: run the stage {self.folder.name} beside")
            log.info("%d clips in %s, waiting for %d", self.filled, self.folder, self.first)
            time.sleep(2)
            self._take(FILES)

    def _take(self, files: int) -> None:
        """Read up to that many files that are new, the newest first."""
        new = [file for file in sorted(self.folder.glob("[0-9]*.pt"), reverse=True) if file.name not in self.taken]
        for file in new[:files]:
            self.taken.add(file.name)
            chunk = load(file)
            count = len(chunk["count"])
            if self.place + count > self.most:
                self.place = 0
            for key, value in chunk.items():
                if key not in self.held:
                    shape, device = (self.most, *value.shape[1:]), self.settings.device
                    self.held[key] = torch.empty(shape, dtype=value.dtype, device=device)
                self.held[key][self.place : self.place + count].copy_(value)
            self.place += count
            self.filled = max(self.filled, self.place)


def narrowed(batch: Batch) -> Batch:
    """A chunk as files hold it."""

    def one(value: Tensor) -> Tensor:
        return (value.half() if value.is_floating_point() else value).cpu()

    return {key: one(value) for key, value in batch.items()}
