"""A chain's settings as JSON and back, for the process that answers and for those that work. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from wan.options import OPTIONS, Settings

CHECKED = "checked"  # how the check of a chain ends, where a chain ends in one of the states of `tickets`


def settings_of_chain(owner: Settings, values: Mapping[str, Any]) -> Settings:
    """The server's settings, with those of a chain, which are JSON values. Raises UserError."""
    return dataclasses.replace(owner, **{name: _from_json(value) for name, value in values.items()})


def owner_settings(values: Mapping[str, Any]) -> Settings:
    """The server's own settings, from JSON. Raises UserError."""
    return Settings(**{name: _from_json(value) for name, value in values.items() if name in OPTIONS})


def as_json(settings: Settings) -> dict[str, Any]:
    """Settings that differ from their defaults, as JSON values."""
    return {one.name: value for one in OPTIONS.values() if (value := getattr(settings, one.name)) != one.default}


def _from_json(value: Any) -> Any:
    """JSON has no tuples."""
    if isinstance(value, list):
        return tuple(tuple(one) if isinstance(one, list) else one for one in value)
    return value
