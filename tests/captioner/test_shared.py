"""A captioner that others share says what one of one's own says, and fails as it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.served import MODELS
from wan.captioner import Captioner, open_captioner
from wan.captioner.base import Viewer
from wan.captioner.shared import SharedCaptioner, answer, open_shared
from wan.errors import UserError
from wan.prompting import CaptionerOwner

VLM = str(MODELS / "tiny-InternVL")
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 30, 46, 3), np.uint8)


def through_a_pipe(captioner: Captioner) -> Any:
    """Asks it as another process would."""
    return lambda asked: json.loads(json.dumps(answer(json.loads(json.dumps(asked)), lambda path, code: captioner)))


def test_words_and_views_are_those_of_a_captioner_of_ones_own() -> None:
    alone = open_captioner(VLM, device="cpu")
    shared = open_shared(VLM, False, through_a_pipe(open_captioner(VLM, device="cpu")))
    pictures = [Image.fromarray(FRAMES[0]), FRAMES[1][:, :20], Image.fromarray(FRAMES[2]).convert("L")]
    for frames in (FRAMES, pictures):
        asked: tuple[Any, ...] = (frames, "What happens?", "Be short.", 12)
        assert shared.describe(*asked) == alone.describe(*asked) != ""
    assert isinstance(shared, Viewer) and isinstance(alone, Viewer)
    assert torch.equal(shared.view(pictures[0]), alone.view(pictures[0]))


def test_what_is_wrong_is_said_in_the_same_words() -> None:
    def no_folder(path: str, code: bool) -> Captioner:
        return open_captioner(path, device="cpu")

    with pytest.raises(UserError) as alone:
        open_captioner("/nowhere/vlm", device="cpu")
    with pytest.raises(UserError) as shared:
        open_shared("/nowhere/vlm", False, lambda asked: answer(asked, no_folder))
    assert shared.value.marked == alone.value.marked


def test_a_failure_is_none_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def describe(self, *words: Any) -> str:
            raise KeyError("layer 7")

        def close(self) -> None: ...

    shared = open_shared(VLM, False, through_a_pipe(Broken()))
    assert type(shared) is SharedCaptioner and not isinstance(shared, Viewer)
    with pytest.raises(RuntimeError, match="the captioner failed: KeyError: 'layer 7'"):
        shared.describe(FRAMES, "What happens?")
    assert "Traceback" in capsys.readouterr().err


def test_an_owner_that_shares_opens_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.prompting.open_captioner", lambda *_, **__: pytest.fail("it is elsewhere"))
    given: dict[str, Any] = {"question": "What?", "trust_remote_code": False, "main": torch.device("cpu"), "vram": 1}
    asked: list[Mapping[str, Any]] = []

    def ask(question: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append(question)
        return {"viewer": False} if question["what"] == "open" else {"text": "a boat"}

    owner = CaptionerOwner(VLM, url=None, **given)
    owner.share(ask)
    assert owner.describe(FRAMES).text == "a boat" and owner.host_bytes == 0 and owner.leaves_the_disk_alone
    owner.make_room(lambda: False)
    owner.forget()
    assert owner.describe(FRAMES).text == "a boat"
    assert [one["what"] for one in asked] == ["open", "describe"] * 2 and asked[0]["path"] == VLM
    # an endpoint stays the one that is asked
    endpoint = CaptionerOwner(None, url="http://127.0.0.1:1/v1", **given)
    endpoint.share(ask)
    assert endpoint._ask is None
