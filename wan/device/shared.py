"""Host memory that processes of one machine have in common, so that weights are there once and not once a process."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from wan.device.parallel import Group


class SharedMemory:
    """Some bytes that the processes of a machine map together; the first of them fills it, see `done`.

    It has no name and no file: it is gone when the last process that maps it has let go. Where it cannot be had (not
    on Linux, or processes that do not see each other) `memory` is None in all of them.
    """

    def __init__(self, size: int, machine: Group) -> None:
        self.machine = machine
        self.fills = machine.index == 0
        handle = os.memfd_create("wan") if self.fills and hasattr(os, "memfd_create") else -1
        pid, number = machine.gather(torch.tensor([os.getpid(), handle]))[0].tolist()
        self.memory: Tensor | None = None
        try:
            if number >= 0:
                path = f"/proc/{pid}/fd/{number}"
                if self.fills:
                    os.ftruncate(handle, size)
                # none of its bytes is taken until it is written
                self.memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError):  # of another container, for instance; all of them ask below
            self.memory = None
        finally:
            everyone = self.agree(self.memory is not None)
            if handle >= 0:
                os.close(handle)
        if not everyone:
            self.memory = None

    def agree(self, answer: bool) -> bool:
        """Whether all processes answer yes. None goes on before all have answered."""
        return all(bool(one) for one in self.machine.gather(torch.tensor([answer])))

    def done(self) -> None:
        """Wait until the first process has filled it."""
        self.agree(True)
