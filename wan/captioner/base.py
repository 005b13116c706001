"""What all back ends share: the interface, the one-line errors, and a model that loads late and can be freed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from wan.compat import hide_broken_torchvision
from wan.device.hardware import release_memory
from wan.errors import UserError
from wan.foreign import parsing, read_json
from wan.pictures import as_shown
from wan.types import UInt8Array
from wan.weights.hub import OFFER

Pictures: TypeAlias = UInt8Array | Sequence["Image.Image | UInt8Array"]

MOST_CHARACTERS = 8_000  # of an answer; the longest that is asked for has 512 tokens


class Captioner(Protocol):
    """Answers a question about frames."""

    def describe(self, frames: Pictures, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        """Frames in order and a question -> the answer as the model gave it.

        Frames are RGB uint8 [n, H, W, 3], or a list of PIL images or of arrays uint8 [H, W, 3], whose sizes may differ.
        `system` None means the model's own system message, "" means none. Raises UserError.
        """

    def close(self) -> None:
        """Free the memory; a later `describe` loads again."""


@runtime_checkable
class Viewer(Protocol):
    """A captioner that also tells what a picture looks like to it."""

    def view(self, picture: Image.Image) -> Tensor:
        """A picture -> float32 [D] of length 1, on the CPU; near for pictures of one subject."""


class BackEnd(ABC):
    """A captioner whose foreseeable failures are UserErrors of one line that offer a prompt instead."""

    source: str  # names the model in messages

    def describe(self, frames: Pictures, question: str, system: str | None = None, max_new_tokens: int = 512) -> str:
        """See `Captioner.describe`."""
        with foreseen_failures(self.source):
            if max_new_tokens < 1:
                raise UserError(f"max_new_tokens is {max_new_tokens}: give at least 1")
            answer = self.answer(frames, question, system, max_new_tokens)
            # half of a surrogate pair, which JSON can spell, can be written to no file
            answer = answer[:MOST_CHARACTERS].encode("utf-8", "replace").decode().strip()
            if not answer:
                raise UserError(f"{self.source} gave an empty answer: ask with another `vlm_question`")
        return answer

    def prepare_weights(self) -> None:
        """Have what describes in memory, as far as that is this process's. Raises UserError, as `describe` does."""
        with foreseen_failures(self.source):
            self.hold()

    def hold(self) -> None:  # noqa: B027  (an endpoint holds nothing)
        """Load the model unless it is."""

    @abstractmethod
    def answer(self, frames: Pictures, question: str, system: str | None, max_new_tokens: int) -> str:
        """The answer, possibly empty or with spaces around it."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory; a later `describe` loads again."""


class LocalModel(BackEnd):
    """A model folder; the model loads at its first use and goes with `close()`."""

    faults: tuple[str, ...] = ("missing", "unexpected", "mismatched")  # what weights must not be

    def __init__(self, path: str | Path, device: str | torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder = Path(path)
        self.source = str(path)
        self.device = torch.device(device)
        self.dtype = dtype
        self._model: Any = None
        hide_broken_torchvision()

    @property
    def model(self) -> Any:
        """The model in evaluation mode, on the device."""
        if self._model is None:
            self._model = self.load()
        return self._model

    @property
    def is_loaded(self) -> bool:
        """Whether its weights are in memory."""
        return self._model is not None

    @property
    def waits_in_host_memory(self) -> bool:
        """Whether its weights are there, of which a device may get some for a time."""
        return self.is_loaded and self.device.type == "cpu"

    def hold(self) -> None:
        self.model  # noqa: B018

    @abstractmethod
    def load(self) -> Any:
        """A new model, complete and on the device."""

    def close(self) -> None:
        """Free the weights and hand GPU memory back; a later `describe` loads again."""
        if self._model is not None:
            self._model = None
            release_memory(self.device)

    def from_pretrained(
        self, model_class: Any, source: Path | None, *, home: torch.device | None = None, **options: Any
    ) -> Any:
        """The library's loader, except that weights that are missing or do not fit are a UserError, not a log line.

        The model is put on its device, or on `home`.
        """
        model, report = model_class.from_pretrained(
            source,
            dtype=self.dtype,
            device_map={"": str(home or self.device)},
            ignore_mismatched_sizes=True,  # they come back in the report, with names
            output_loading_info=True,
            **options,
        )
        for what in self.faults:
            if keys := [str(key) for key in report[f"{what}_keys"]]:
                shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
                raise UserError(
                    f"{self.folder} has {len(keys)} {what} weights ({shown}): download it again or name another folder"
                )
        return model


@contextmanager
def foreseen_failures(source: str) -> Iterator[None]:
    """Make one line, with the reason and the way round it, of what can go wrong outside this code."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error.marked}, {OFFER}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"captioning with {source} ran out of memory: use `vlm_device` cpu, a smaller model, {OFFER}"
        ) from error
    except (OSError, SafetensorError, HTTPException) as error:
        raise UserError(f"captioning with {source} failed ({one_line(error)}): put that right, {OFFER}") from error


@contextmanager
def reading(folder: Path, *told: type[Exception]) -> Iterator[None]:
    """Around the library that reads a folder's files and builds a model of them: what it raises is one line.

    Errors in `told`, and those of `foreseen_failures`, pass: others tell them.
    """
    passing: tuple[type[BaseException], ...] = (
        UserError,
        torch.OutOfMemoryError,
        MemoryError,
        OSError,
        SafetensorError,
        *told,
    )
    try:
        yield
    except BaseException as error:
        if isinstance(error, passing):
            raise
        with parsing(f"{folder} or a file in it", "download it again"):
            raise


def one_line(error: Exception) -> str:
    """What an error says, on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def to_images(frames: Pictures) -> list[Image.Image]:
    """Frames -> RGB images. Raises UserError for what is no picture."""
    images = [as_shown(one) if isinstance(one, Image.Image) else _image(np.asarray(one)) for one in frames]
    if not images:
        raise UserError("there are no frames: a captioner needs RGB uint8 [n, H, W, 3] or pictures")
    return images


def _image(frame: UInt8Array) -> Image.Image:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or not frame.size:
        raise UserError(
            f"a frame is {frame.dtype} {list(frame.shape)}: a captioner needs RGB uint8 [n, H, W, 3] or pictures"
        )
    return Image.fromarray(frame)


def number_frames(slots: list[str], question: str) -> str:
    """The official layout of a question about a video: `slots` stand for the frames."""
    return "".join(f"Frame{number}: {slot}\n" for number, slot in enumerate(slots, 1)) + question


def read_config(path: Path) -> dict[str, Any]:
    """The config of a VLM folder. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not a VLM folder, it has no {path.name}: check `vlm_path`")
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"{error.marked}: download it again") from error
