"""A captioner in another process, which several chains share: what is asked and answered, as JSON values.

Frames go there as they are, so that its words are those of a captioner of one's own.
"""

from __future__ import annotations

import base64
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan.captioner.base import Captioner, Pictures, Viewer, to_images
from wan.errors import UserError
from wan.types import UInt8Array

Ask: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class SharedCaptioner:
    """Asks a captioner elsewhere; see `Captioner`. Raises UserError as that does, and RuntimeError where it fails."""

    def __init__(self, model: Mapping[str, Any], ask: Ask) -> None:
        self._model, self._ask = model, ask

    def describe(self, frames: Pictures, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        """See `Captioner.describe`."""
        words = {"question": question, "system": system, "max_new_tokens": max_new_tokens}
        return str(self._get("describe", frames=_packed(to_images(frames)), **words)["text"])

    def close(self) -> None:
        """Nothing to free here: others use it."""

    def _get(self, what: str, **more: Any) -> Mapping[str, Any]:
        answer = self._ask({"what": what, **self._model, **more})
        if "wrong" in answer:
            raise UserError(answer["wrong"])
        if "failed" in answer:
            raise RuntimeError(f"the captioner failed: {answer['failed']}")
        return answer


class SharedViewer(SharedCaptioner):
    """One that is a `Viewer`, too."""

    def view(self, picture: Image.Image) -> Tensor:
        """See `Viewer.view`."""
        numbers = base64.b64decode(self._get("view", frames=_packed([picture]))["view"])
        return torch.from_numpy(np.frombuffer(numbers, np.float32).copy())


def open_shared(path: str, trust_remote_code: bool, ask: Ask) -> Captioner:
    """The captioner elsewhere, for a folder that is there or a hub id. Raises UserError for what it cannot open."""
    model = {"path": path, "trust_remote_code": trust_remote_code}
    is_viewer = SharedCaptioner(model, ask)._get("open")["viewer"]
    return (SharedViewer if is_viewer else SharedCaptioner)(model, ask)


def answer(asked: Mapping[str, Any], captioner: Callable[[str, bool], Captioner]) -> dict[str, Any]:
    """What the captioner that `captioner` opens says: `viewer`, `text`, `view`, or what is `wrong` or has `failed`."""
    try:
        opened = captioner(asked["path"], asked["trust_remote_code"])
        if asked["what"] == "open":
            return {"viewer": isinstance(opened, Viewer)}
        frames = [_unpacked(one) for one in asked["frames"]]
        if asked["what"] == "view":
            assert isinstance(opened, Viewer)
            numbers = opened.view(Image.fromarray(frames[0])).numpy().astype(np.float32)
            return {"view": base64.b64encode(numbers.tobytes()).decode()}
        return {"text": opened.describe(frames, asked["question"], asked["system"], asked["max_new_tokens"])}
    except UserError as error:
        return {"wrong": error.marked}
    except Exception as error:  # the chain fails with it, as with a captioner of its own
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def _packed(images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    pixels = [np.ascontiguousarray(image.convert("RGB")) for image in images]
    return [{"shape": one.shape, "pixels": base64.b64encode(one.tobytes()).decode()} for one in pixels]


def _unpacked(frame: Mapping[str, Any]) -> UInt8Array:
    return np.frombuffer(base64.b64decode(frame["pixels"]), np.uint8).reshape(frame["shape"])
