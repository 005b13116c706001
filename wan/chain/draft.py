"""What is known of a clip that is not finished: its prompt and its latents, on disk before they are decoded.

Sampling is what takes the time. A run that was stopped after it decodes the clip again, to the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor

from wan.errors import UserError
from wan.files import write_bytes
from wan.foreign import parse_json
from wan.prompting import ClipPrompt
from wan.types import Sampled


class ClipDraft:
    """The drafts of one clip in a run's folder, one for each candidate; `settings` is everything that makes the clip.

    A draft of other settings, or one that is damaged, is none.
    """

    def __init__(self, folder: Path, number: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.number, self.settings = folder, number, dict(settings)

    @property
    def prompt(self) -> ClipPrompt | None:
        """The prompt that the candidates are made with, if one of them is there."""
        for path in sorted(self.folder.glob(f".draft_{self.number}_*.safetensors")):
            if (draft := self._read(path)) is not None:
                return ClipPrompt(**draft[0]["prompt"])
        return None

    @property
    def handed(self) -> Tensor | None:
        """The known frames of the candidates as a program has left them, if one of them is there."""
        for path in sorted(self.folder.glob(f".draft_{self.number}_*.safetensors")):
            if (draft := self._read(path)) is not None:
                return draft[2]
        return None

    def find(self, seed: int) -> Sampled | None:
        """What sampling the candidate with this seed came to."""
        draft = self._read(self._path(seed))
        if draft is None:
            return None
        sampled, latents, _ = draft
        return Sampled(latents, sampled["seconds"], sampled["peak_gib"], sampled["notes"])

    def keep(self, seed: int, sampled: Sampled, prompt: ClipPrompt, handed: Tensor | None) -> None:
        """Put what sampling came to on disk, and the known frames that a program has left."""
        written = json.dumps(
            {
                "settings": self.settings,
                "prompt": dataclasses.asdict(prompt),
                "seconds": dict(sampled.seconds),
                "peak_gib": sampled.peak_gib,
                "notes": dict(sampled.notes),
            }
        )
        tensors = {"latents": sampled.latents.float().contiguous()}
        if handed is not None:
            tensors["handed"] = handed.contiguous()
        metadata = {"said": written, "digest": _digest(tensors, written)}
        write_bytes(self._path(seed), as_bytes(tensors, metadata))

    def _path(self, seed: int) -> Path:
        return self.folder / f".draft_{self.number}_{seed}.safetensors"

    def _read(self, path: Path) -> tuple[dict[str, Any], Tensor, Tensor | None] | None:
        if not path.is_file():  # opening a pipe would wait for ever
            return None
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            latents, handed = tensors["latents"], tensors.get("handed")
            whole = metadata["digest"] == _digest(tensors, metadata["said"])
            written = parse_json(metadata["said"], str(path))
        except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        return (
            (written, latents, handed)
            if whole and written["settings"] == json.loads(json.dumps(self.settings))
            else None
        )


def discard(folder: Path, number: int | None = None) -> None:
    """Remove the drafts of a clip, or of all clips."""
    for path in folder.glob(f".draft_{'*' if number is None else number}_*.safetensors"):
        path.unlink()


def _digest(tensors: Mapping[str, Tensor], written: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors, reverse=True):  # latents first: alone they have the digest that they always had
        digest.update(tensors[name].contiguous().numpy().tobytes())
    digest.update(written.encode())
    return digest.hexdigest()
