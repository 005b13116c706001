"""The Hugging Face Hub, as far as it can fail, and what may be a folder there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wan.errors import UserError

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[0-9a-f]{40}))?")

OFFER = "or give `prompt` to go on without captioning"  # behind all that is wrong with a captioner


def check_vlm_place(path: str | Path) -> None:
    """Raise UserError for what is neither a folder here nor may be one on the hub."""
    if not (Path(path).is_dir() or (HUB_ID.fullmatch(str(path)) and not Path(path).parent.is_dir())):
        raise UserError(f"there is no VLM folder {path}: check `vlm_path`")


def unreachable() -> tuple[type[Exception], ...]:
    """What the hub's client raises for what is not there and for a connection that breaks."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # a connection that breaks is an error of the HTTP library, whose name depends on the hub library's version
    transport: Any = next((base for base in HfHubHTTPError.__bases__ if base is not OSError), OSError)
    return OSError, HfHubHTTPError, HFValidationError, transport
