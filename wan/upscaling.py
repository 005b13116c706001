"""A finished video -> a larger one, by a model file that spandrel knows (ESRGAN, SPAN, Compact, SwinIR and others)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan import media
from wan.compat import hide_broken_torchvision
from wan.device.hardware import is_out_of_memory, release_memory
from wan.errors import UserError
from wan.files import file_digest, readable, write_json
from wan.foreign import parsing, read_json
from wan.types import UInt8Array
from wan.weights.reading import read_state

MOST_SIDE = 8192  # pixels of a side: no player of H.264 takes more
TILES = (512, 256, 128)  # pixels of a side of what is upscaled at once; smaller ones where memory is short
MARGIN = 32  # pixels around a tile that the model sees as well, so that no edge shows
SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass
class Upscaler:
    """A model that makes pictures `scale` times as large; on the CPU until it is used.

    `model` takes and gives [1, 3, H, W] in [0, 1], and `tiles` are the sizes of pieces that it may be given, () for
    whole pictures only.
    """

    file: Path
    scale: int
    model: Callable[[Tensor], Tensor]
    tiles: tuple[int, ...] = TILES
    module: torch.nn.Module | None = None  # what of the model is moved to a device

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what becomes of such a picture. Raises UserError where no player takes that."""
        larger = width * self.scale, height * self.scale
        if max(larger) > MOST_SIDE:
            raise UserError(
                f"`upscale` {self.file} makes pictures of {larger[0]}x{larger[1]}, and players take {MOST_SIDE} pixels "
                f"a side; give a model that enlarges less, or a smaller `size`"
            )
        return larger

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Callable[[UInt8Array], UInt8Array]]:
        """In the block, a function from a picture uint8 [H, W, 3] to the larger one. Raises UserError."""
        if self.module is not None:
            self.module.to(device)
        try:
            yield _Enlarging(self, device)
        finally:
            if self.module is not None:
                self.module.cpu()
            release_memory(device)


class _Enlarging:
    """Pictures, piece by piece, on a device; of smaller pieces from the first on that does not fit into its memory."""

    def __init__(self, upscaler: Upscaler, device: torch.device) -> None:
        self.upscaler, self.device = upscaler, device
        self.tiles = list(upscaler.tiles)

    def __call__(self, picture: UInt8Array) -> UInt8Array:
        while True:
            try:
                return self._enlarge(picture, self.tiles[0] if self.tiles else max(picture.shape))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(self.tiles) < 2:
                    raise UserError(
                        f"{self.device} has too little free memory for `upscale` {self.upscaler.file}: free some, or "
                        "give a smaller model; what is finished stays"
                    ) from error
                del self.tiles[0]
            release_memory(self.device)

    def _enlarge(self, picture: UInt8Array, tile: int) -> UInt8Array:
        height, width = picture.shape[:2]
        scale = self.upscaler.scale
        larger = np.empty((height * scale, width * scale, 3), np.uint8)
        for top, bottom in _spans(height, tile):
            for left, right in _spans(width, tile):
                above, before = max(top - MARGIN, 0), max(left - MARGIN, 0)
                piece = self._run(picture[above : bottom + MARGIN, before : right + MARGIN])
                rows = slice((top - above) * scale, (bottom - above) * scale)
                columns = slice((left - before) * scale, (right - before) * scale)
                larger[top * scale : bottom * scale, left * scale : right * scale] = piece[rows, columns]
        return larger

    def _run(self, piece: UInt8Array) -> UInt8Array:
        pixels = torch.from_numpy(np.ascontiguousarray(piece)).to(self.device)
        made = self.upscaler.model(pixels.permute(2, 0, 1)[None].float() / 255)
        wanted = 3, piece.shape[0] * self.upscaler.scale, piece.shape[1] * self.upscaler.scale
        if tuple(made.shape[1:]) != wanted or not bool(torch.isfinite(made).all()):
            raise UserError(f"`upscale` {self.upscaler.file} makes no pictures of what it is given; take another model")
        larger: UInt8Array = (made[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return larger


def _spans(length: int, tile: int) -> list[tuple[int, int]]:
    """A length in parts of about one size, none of them longer than a tile."""
    count = -(-length // tile)
    ends = [length * index // count for index in range(count + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def open_upscaler(name: str) -> Upscaler:
    """The model of a file, whose weights are read as numbers only: nothing in it is executed. Raises UserError."""
    file = Path(name).expanduser()
    if file.suffix.lower() not in SUFFIXES or not file.is_file():
        raise UserError(f"`upscale` {readable(file)} is no file of weights; give one in .safetensors or .pth")
    spandrel = _spandrel()
    state = spandrel.canonicalize_state_dict(read_state(file))
    with parsing(str(file), "download it again"):
        try:
            model = spandrel.ModelLoader(device="cpu").load_from_state_dict(state)
        except spandrel.UnsupportedModelError as error:
            raise UserError(f"`upscale` {file} is none of the models that spandrel knows; give another") from error
    if not isinstance(model, spandrel.ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
        raise UserError(f"`upscale` {file} does not make colour pictures of colour pictures; give another model")
    tiles = TILES if model.tiling is spandrel.ModelTiling.SUPPORTED else ()
    return Upscaler(file, model.scale, model, tiles, model.model)


def _spandrel() -> Any:
    """The package. Raises UserError."""
    hide_broken_torchvision()  # which it imports, and would fail with in other words
    try:
        return importlib.import_module("spandrel")
    except ImportError as error:
        if str(error.name).partition(".")[0] == "torchvision":
            raise UserError(
                "`upscale`: spandrel needs a torchvision that goes with the installed torch; install that one "
                f"({error})"
            ) from error
        raise UserError(
            f'`upscale` needs the package spandrel: pip install -e ".[finish]" in the project ({error})'
        ) from error


def upscale(
    video: Path,
    target: Path,
    upscaler: Upscaler,
    device: torch.device,
    *,
    of: Any,
    metadata: bool = True,
    on_frame: Callable[[], None] = lambda: None,
) -> None:
    """Write the larger video of a finished one, and then a JSON file of its name with what it was made `of`.

    Raises UserError.
    """
    made_with = {"upscaled": video.name, "model": upscaler.file.name, "scale": upscaler.scale}
    with upscaler.on(device) as enlarge:

        def change(picture: UInt8Array) -> UInt8Array:
            on_frame()
            return enlarge(picture)

        frames = media.rewrite_video(video, target, change, metadata=made_with if metadata else None)
    identity = {"of": of, "model_digest": file_digest(upscaler.file), "video_digest": file_digest(target)}
    write_json(target.with_suffix(".json"), made_with | {"frames": frames} | identity)


def made_of(target: Path, upscaler: Upscaler) -> Any:
    """What a larger video that is there was made of, with this model; None for one that is not what was written."""
    record = target.with_suffix(".json")
    if not (target.is_file() and record.is_file()):
        return None
    try:
        read = read_json(record)
    except UserError:
        return None  # whoever changed it: the video is made again, and what is there is set aside
    if read.get("model_digest") != file_digest(upscaler.file):
        return None
    return read.get("of") if read.get("video_digest") == file_digest(target) else None
