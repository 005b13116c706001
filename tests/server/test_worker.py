"""A server's process: which pipeline it keeps, and what it tells while a clip is made."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from wan.server.worker import Behind, Cancelled, KeptPipeline, Telling
from wan.types import Step


def test_a_pipeline_stays_for_chains_of_its_models_and_goes_for_others() -> None:
    told = list[str]()

    def job(key: str, question: str) -> Any:
        def opened() -> Any:
            told.append(f"open {key}")
            vlm = SimpleNamespace(share=lambda ask: told.append(f"share {ask}"), question=None, fallback=None)
            return SimpleNamespace(vlm=vlm, close=lambda: told.append(f"close {key}"))

        settings = SimpleNamespace(vlm_question=question, vlm_fallback=key == "b")
        return SimpleNamespace(models_key=key, open_continuation=opened, settings=settings)

    kept: Any = KeptPipeline("asking")  # type: ignore[arg-type]
    first = kept.open(job("a", "what?"))
    assert kept.open(job("a", "who?")) is first and first.vlm.question == "who?" and first.vlm.fallback is False
    second = kept.open(job("b", "why?"))
    assert second is not first and second.vlm.question == "why?" and second.vlm.fallback is True
    assert told == ["open a", "share asking", "close a", "open b", "share asking"]


def test_a_prompt_is_told_at_once_and_steps_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    told, cancelled = list[tuple[str, Any]](), threading.Event()
    monkeypatch.setattr("wan.server.worker.time.monotonic", lambda: 1000.0)
    telling = Telling(lambda event, **more: told.append((event, more)), cancelled, 2, Behind())
    telling.begin("clip 2/2", seed=5)
    for step in (
        Step(0, 4, "sample", prompt="A dog runs."),
        Step(1, 4, "sample"),  # the first for long
        Step(2, 4, "sample"),  # no time has gone by
        Step(4, 4, "sample"),
        Step(4, 4, "sample", detail="shard 2 of 6"),
    ):
        telling(step)
    steps = [more["step"] for event, more in told if event == "step"]
    assert [more for event, more in told if event == "prompt"] == [{"clip": 2, "prompt": "A dog runs."}]
    assert steps == [1, 4]
    cancelled.set()
    with pytest.raises(Cancelled):
        telling(Step(0, 4, "sample"))
