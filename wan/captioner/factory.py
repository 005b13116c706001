"""Which back end a path or an address gets."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wan.captioner.base import BackEnd, Captioner, Pictures, foreseen_failures, one_line, read_config
from wan.captioner.endpoint import EndpointCaptioner
from wan.captioner.generic import GenericCaptioner, RemoteCodeCaptioner
from wan.captioner.internvl import InternVLCaptioner, quantization_method, quantization_of
from wan.errors import UserError
from wan.weights.hub import HUB_ID, check_vlm_place, unreachable

log = logging.getLogger(__name__)


def open_captioner(
    path: str | Path | None,
    *,
    url: str | None = None,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
    room: Callable[[], int] | None = None,
) -> Captioner:
    """The captioner for a folder, a hub id such as OpenGVLab/InternVL3_5-8B, or an endpoint's `url`.

    A hub id may end in @ and a commit, and must where its code is to run: other code may be there tomorrow.

    With `url`, `path` is the name of the model there, None for the first one. Nothing is downloaded or loaded before
    the first description, but a folder is checked. `trust_remote_code` runs the code of a folder that brings some;
    without it none is run. `room`: bytes that the weights of an InternVL may take of the device, see there. Raises
    UserError.
    """
    if url is not None:
        return EndpointCaptioner(url, None if path is None else str(path))

    def open_folder(folder: Path) -> BackEnd:
        config = read_config(folder / "config.json")
        _check_quantized(folder, config, device)
        own_code = trust_remote_code and "auto_map" in config
        if config.get("model_type") == "internvl_chat" and own_code:
            return RemoteCodeCaptioner(folder, device, dtype)
        if config.get("model_type") in ("internvl_chat", "internvl"):
            return InternVLCaptioner(folder, device, dtype, room)
        return GenericCaptioner(folder, device, dtype, trust_remote_code=own_code)

    with foreseen_failures(str(path)):
        if path is None:
            raise UserError("captioning needs a model: give `vlm_path` or `vlm_url`")
        if Path(path).is_dir():
            return open_folder(Path(path))
        check_vlm_place(path)
        hub = HUB_ID.fullmatch(str(path))
        if trust_remote_code and hub is not None and not hub["revision"]:
            raise UserError(
                f"`vlm_trust_remote_code` runs code of {path} from the hub: say which, as {path}@ and 40 digits "
                "of a commit that you have read, or give a folder"
            )
        return HubCaptioner(str(path), open_folder, with_code=trust_remote_code)


# The packages, all of which transformers needs for weights that are quantised in that way.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "awq": ("gptqmodel",),
    "gptq": ("gptqmodel", "optimum"),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "torchao": ("torchao",),
    "hqq": ("hqq",),
}


def _check_quantized(folder: Path, config: Mapping[str, Any], device: str | torch.device) -> None:
    """Raise UserError for quantised weights that cannot be loaded here, before anything is."""
    quantization = quantization_of(config)
    if quantization is None:
        return
    method = quantization_method(quantization)
    if method not in _PACKAGES:
        raise UserError(f"{folder} is quantised ({method}), which cannot be loaded; give weights in bf16")
    if missing := [name for name in _PACKAGES[method] if not find_spec(name)]:
        raise UserError(f"{folder} is quantised ({method}): install {' and '.join(missing)}, or give weights in bf16")
    _check_environment(folder, method, quantization, torch.device(device))


def _check_environment(folder: Path, method: str, quantization: Mapping[str, Any], device: torch.device) -> None:
    """What transformers asks of versions, devices and the packages of packages. Raises UserError."""
    from transformers.quantizers import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config({"quant_method": method, **quantization}, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device})
    except Exception as error:  # each package's own, and a config's
        raise UserError(
            f"{folder} is quantised ({method}), which cannot be loaded here ({one_line(error)}); give weights in bf16"
        ) from error


def weight_bytes(path: str | Path) -> int | None:
    """Bytes of the weight files of a VLM, a folder or a hub id (by the cache or the list of files); None: unknown."""
    folder, hub = local_folder(path), HUB_ID.fullmatch(str(path))
    if folder is not None and (size := _weights_in(folder)):
        return size
    if Path(path).expanduser().is_dir() or not hub:
        return None
    from huggingface_hub import HfApi

    try:
        listed = HfApi().model_info(hub["id"], files_metadata=True, timeout=10, **_commit(hub)).siblings or []
    except unreachable() as error:
        log.info("cannot tell how large %s is: %s", path, one_line(error))
        return None
    return sum(file.size or 0 for file in listed if file.rfilename.endswith(".safetensors")) or None


def local_folder(path: str | Path) -> Path | None:
    """The folder of a VLM, which may be the hub's cache; None where it is not here."""
    folder = Path(path).expanduser()
    if folder.is_dir() or not (hub := HUB_ID.fullmatch(str(path))):
        return folder if folder.is_dir() else None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub["id"], local_files_only=True, **_commit(hub)))
    except unreachable():
        log.debug("%s is not in the hub's cache", path)
        return None


def _commit(hub: re.Match[str]) -> dict[str, Any]:
    """The commit, where one is given, as the hub's client takes it."""
    return {"revision": hub["revision"]} if hub["revision"] else {}


def _weights_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class HubCaptioner(BackEnd):
    """A model on the Hugging Face Hub, downloaded into its cache at the first description."""

    def __init__(self, hub_id: str, open_folder: Callable[[Path], BackEnd], *, with_code: bool) -> None:
        self.source = hub_id
        self.open_folder = open_folder
        self.patterns = ["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"] + ["*.py"] * with_code
        self.local: BackEnd | None = None

    def answer(self, frames: Pictures, question: str, system: str | None, max_new_tokens: int) -> str:
        return self._opened().answer(frames, question, system, max_new_tokens)

    def hold(self) -> None:
        self._opened().hold()

    def _opened(self) -> BackEnd:
        if self.local is None:
            self.local = self.open_folder(self.download())
        return self.local

    def download(self) -> Path:
        """The local folder; what the cache holds already is not fetched again. Raises UserError."""
        from huggingface_hub import snapshot_download

        try:
            hub = HUB_ID.fullmatch(self.source)
            assert hub is not None  # `open_captioner` looked
            return Path(snapshot_download(hub["id"], allow_patterns=self.patterns, **_commit(hub)))
        except unreachable() as error:
            raise UserError(
                f"cannot download {self.source} ({one_line(error)}): check `vlm_path` and the connection"
            ) from error

    def close(self) -> None:
        if self.local is not None:
            self.local.close()
