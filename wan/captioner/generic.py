"""Models that transformers runs by itself, and InternVL's own code out of the checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field

from wan.captioner.base import LocalModel, Pictures, number_frames, one_line, read_config, reading, to_images
from wan.captioner.frames import build_transform, dynamic_preprocess
from wan.errors import UserError
from wan.foreign import fit

LONGEST_SIDE = 448  # pixels; tokens, and with them time and memory, grow with the area of a frame


_Pixels = Annotated[int, Field(ge=1, le=10_000)]


class _Vision(BaseModel):
    image_size: _Pixels = 448


class _Config(BaseModel):
    """What of an InternVL's config.json its own code leaves to us."""

    force_image_size: _Pixels | None = None
    vision_config: _Vision = _Vision()

    @property
    def side(self) -> int:
        """Of the pictures that the model sees, in pixels."""
        return self.force_image_size or self.vision_config.image_size


class GenericCaptioner(LocalModel):
    """Any image-text-to-text model of transformers. `trust_remote_code` lets the folder's own code run."""

    faults = ("missing", "mismatched")  # weights for training are often left in

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device,
        dtype: torch.dtype = torch.bfloat16,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(path, device, dtype)
        read_config(self.folder / "config.json")
        self.trust_remote_code = trust_remote_code

    @torch.inference_mode()
    def answer(self, frames: Pictures, question: str, system: str | None, max_new_tokens: int) -> str:
        model = self.model  # before the processor: it is what refuses a folder of another kind in plain words
        content: list[dict[str, Any]] = []
        for number, image in enumerate(to_images(frames), 1):
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            content += [{"type": "text", "text": f"Frame{number}: "}, {"type": "image", "image": image}]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        with foreign_folder(self.folder):  # the template is the folder's
            inputs = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self.device, self.dtype)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.batch_decode(new, skip_special_tokens=True)[0])

    @cached_property
    def processor(self) -> Any:
        from transformers import AutoProcessor

        with foreign_folder(self.folder):
            return AutoProcessor.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    def load(self) -> Any:
        from transformers import AutoModelForImageTextToText

        with foreign_folder(self.folder):
            return self.from_pretrained(
                AutoModelForImageTextToText, self.folder, trust_remote_code=self.trust_remote_code
            )


class RemoteCodeCaptioner(LocalModel):
    """InternVL through the `chat` of the code in its folder, which runs with all the rights of this program."""

    def __init__(self, path: str | Path, device: str | torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(path, device, dtype)
        config = read_config(self.folder / "config.json")
        self.image_size = fit(_Config, config, f"{self.folder}/config.json").side

    def answer(self, frames: Pictures, question: str, system: str | None, max_new_tokens: int) -> str:
        transform = build_transform(self.image_size)
        tiles = [
            transform(dynamic_preprocess(image, max_num=1, image_size=self.image_size)[0])
            for image in to_images(frames)
        ]
        model, own_system = self.model, self.model.system_message
        model.system_message = own_system if system is None else system
        try:
            return str(
                model.chat(
                    self.tokenizer,
                    torch.stack(tiles).to(self.device, self.dtype),
                    number_frames(["<image>"] * len(tiles), question),
                    {"max_new_tokens": max_new_tokens, "do_sample": False},
                    num_patches_list=[1] * len(tiles),
                )
            )
        finally:
            model.system_message = own_system

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with foreign_folder(self.folder):
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=True)

    def load(self) -> Any:
        from transformers import AutoModel

        with foreign_folder(self.folder), models_without_post_init():
            return self.from_pretrained(
                AutoModel,
                self.folder,
                trust_remote_code=True,
                use_flash_attn=self.device.type == "cuda",  # with flash_attn installed, True asserts CUDA
            )


@contextmanager
def foreign_folder(folder: Path) -> Iterator[None]:
    """Say in one line what a folder needs that is not there, or what is damaged in it."""
    try:
        with reading(folder, ImportError, ValueError):
            yield
    except ImportError as error:
        raise UserError(f"{folder} needs a package that is not installed ({one_line(error)}): install it") from error
    except ValueError as error:
        raise UserError(
            f"transformers cannot open {folder} ({one_line(error)}): take another VLM, or set "
            "`vlm_trust_remote_code` if you trust the code in that folder"
        ) from error


@contextmanager
def models_without_post_init() -> Iterator[None]:
    """Let models load whose code predates transformers 5 and never calls post_init(), which sets this attribute."""
    import transformers

    base: Any = transformers.PreTrainedModel
    if hasattr(base, "all_tied_weights_keys"):
        yield
        return
    base.all_tied_weights_keys = {}
    try:
        yield
    finally:
        del base.all_tied_weights_keys
