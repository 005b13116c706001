"""What a process that makes videos asks whoever started it, in the middle of its work."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any

LOOK_SECONDS = 0.2  # from one look at whether the chain is still wanted to the next


class Questions:
    """Sends questions out and waits for answers, which another thread hears."""

    def __init__(self, send: Callable[..., None], check: Callable[[], None]) -> None:
        self._send, self._check = send, check  # `check` raises where the answer is not wanted any more
        self._answers = queue.Queue[Mapping[str, Any]]()
        self._number = 0

    def ask(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """The answer. A question that was left leaves its answer to nobody."""
        self._number += 1
        self._send("ask", number=self._number, asked=asked)
        while True:
            self._check()
            try:
                order = self._answers.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            if order["number"] == self._number:
                answer: Mapping[str, Any] = order["answer"]
                return answer

    def hear(self, order: Mapping[str, Any]) -> None:
        """Take in an answer with the number of its question."""
        self._answers.put(order)
