"""What a client writes of a chain and of its clips, as JSON or in a form -> settings and scenes in range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wan.errors import UserError
from wan.kinds import Picture, Unfit, read_plain
from wan.options import OPTIONS, Option, by_scene_key, options_of
from wan.server.errors import ApiError

LONGEST_TEXT = 20_000  # characters

CLIENT = {one.name: one for one in options_of("continuous") if one.client and one.flag}
# what a client may say of one clip; pictures are names of files that it sends
_SENT = ("cut", "end_image", "anchor_image", "name")
CLIP = {key: one for key, one in by_scene_key().items() if one.client or one.name in _SENT}


def read_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a client writes them, by name -> their values. Raises ApiError."""
    settings: dict[str, Any] = {}
    for name, value in fields.items():
        one = CLIENT.get(name) or CLIENT.get(f"{name}_")
        if one is None:
            known = name in OPTIONS or f"{name}_" in OPTIONS
            raise ApiError(
                f"{name[:60]!r} is no setting" + (" that a client may choose" if known else ""), param=name[:60]
            )
        # a prompt may go without words before it; of all else a form leaves empty what nobody chose
        if value is not None and (value != "" or one.name == "custom_prompt"):
            settings[one.name] = _value(one, value, name)
    return settings


def read_clip(fields: Mapping[str, Any], pictures: Mapping[str, str], number: int) -> dict[str, Any]:
    """What a client says of one clip -> an entry of a storyboard. Raises ApiError."""
    clip: dict[str, Any] = {}
    for key, value in fields.items():
        if (one := CLIP.get(key)) is None:
            raise ApiError(
                f"clip {number}: {key[:60]!r} is nothing that a clip has; it has {', '.join(CLIP)}", param="clips"
            )
        if value in (None, "", False):
            continue
        if isinstance(one.kind, Picture) and value is not True:
            if value not in pictures:
                raise ApiError(f"clip {number}: no picture {str(value)[:80]!r} came with this", param="clips")
            clip[key] = pictures[value]
        elif value is True and key != "cut":
            raise ApiError(f"clip {number}: {key} cannot be true", param="clips")
        else:
            read = value if value is True else _value(one, value, f"clip {number}: {key}")
            clip[key] = list(read) if isinstance(read, tuple) else read
    return clip


def _value(one: Option, value: Any, name: str) -> Any:
    """A value as JSON or as a form writes it. Raises ApiError."""
    try:
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise Unfit(f"is too long; {LONGEST_TEXT} characters are the most")
        return read_plain(one.kind, value)
    except (Unfit, UserError) as error:
        raise ApiError(f"{name} {error}", param=name.rpartition(" ")[2]) from error
