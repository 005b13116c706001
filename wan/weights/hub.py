"""The Hugging Face Hub, as far as it can fail."""

from __future__ import annotations

from typing import Any


def unreachable() -> tuple[type[Exception], ...]:
    """What the hub's client raises for what is not there and for a connection that breaks."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # a connection that breaks is an error of the HTTP library, whose name depends on the hub library's version
    transport: Any = next((base for base in HfHubHTTPError.__bases__ if base is not OSError), OSError)
    return OSError, HfHubHTTPError, HFValidationError, transport
