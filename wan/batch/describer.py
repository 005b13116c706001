"""A captioner on a GPU of its own, which the workers of a batch ask. The class of a Ray actor that knows no Ray."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import torch

from wan.captioner import Captioner
from wan.captioner.shared import answer
from wan.prompting import CaptionerOwner

LEAVE_SECONDS = 1.0  # for the last answer to go out


class Describer:
    """Owns the captioner that was asked for last. `threads` are those of its CPU, which can change a rounding."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._owner: CaptionerOwner | None = None

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See `wan.captioner.shared.answer`. After a failure this process ends, and Ray starts another."""
        answered = answer(asked, lambda path, code: self._open(path, code, len(asked.get("frames", ()))))
        if "failed" in answered:  # an error of CUDA stays with a process
            threading.Timer(LEAVE_SECONDS, os._exit, (1,)).start()
        return answered

    def _open(self, path: str, trust_remote_code: bool, pictures: int) -> Captioner:
        if (owner := self._owner) is None or (owner.path, owner.trust_remote_code) != (path, trust_remote_code):
            if owner is not None:
                owner.forget()
            main = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            owner = CaptionerOwner(path, url=None, question="", trust_remote_code=trust_remote_code, main=main)
            self._owner = owner
        owner.expect(pictures)
        return owner.captioner
