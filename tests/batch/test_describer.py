"""A captioner that workers share: which one it is, and when its process ends."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan.batch import describer
from wan.batch.describer import Describer


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is done with PyTorch, with captioners and with this process."""
    told = list[Any]()

    class Owner:
        def __init__(self, path: str, **more: Any) -> None:
            self.path, self.trust_remote_code = path, more["trust_remote_code"]
            self.captioner = f"captioner of {path}"
            told.append(("open", path, more))

        def expect(self, pictures: int) -> None:
            told.append(("expect", self.path, pictures))

        def forget(self) -> None:
            told.append(("forget", self.path))

    def answer(asked: Any, opened: Any) -> dict[str, Any]:
        if asked["what"] == "break":
            return {"failed": "CUDA is broken"}
        return {"text": opened(asked["path"], asked["code"])}

    def timer(seconds: float, call: Any, words: Any) -> Any:
        return SimpleNamespace(start=lambda: told.append(("leave", seconds, call, words)))

    monkeypatch.setattr(describer, "CaptionerOwner", Owner)
    monkeypatch.setattr(describer, "answer", answer)
    monkeypatch.setattr(threading, "Timer", timer)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: told.append(("threads", count)))
    return told


@pytest.mark.parametrize("gpu", [True, False])
def test_a_captioner_stays_until_another_one_is_asked_for(
    gpu: bool, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    shared = Describer(5)

    def ask(path: str, code: bool, **more: Any) -> list[Any]:
        told.clear()
        answer = shared.answer({"what": "describe", "path": path, "code": code, **more})
        assert answer == {"text": f"captioner of {path}"}
        return list(told)

    assert told == [("threads", 5)]
    main = torch.device("cuda" if gpu else "cpu")
    opened: dict[str, Any] = {"url": None, "question": "", "main": main}
    trusting, careful = (opened | {"trust_remote_code": code} for code in (True, False))
    assert ask("a", False, frames=[1, 2, 3]) == [("open", "a", careful), ("expect", "a", 3)]
    assert ask("a", False) == [("expect", "a", 0)]
    assert ask("a", True) == [("forget", "a"), ("open", "a", trusting), ("expect", "a", 0)]
    assert ask("b", True) == [("forget", "a"), ("open", "b", trusting), ("expect", "b", 0)]


def test_a_failure_ends_the_process_when_its_answer_is_out(told: list[Any]) -> None:
    assert Describer(1).answer({"what": "break"}) == {"failed": "CUDA is broken"}
    assert told == [("threads", 1), ("leave", 1.0, os._exit, (1,))]
