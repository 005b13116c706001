"""Continue videos with Wan2.2: the public names, each imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wan.version import __version__ as __version__

if TYPE_CHECKING:
    from wan.commands.continuous import Chain as Chain
    from wan.configs import WAN_CONFIGS as WAN_CONFIGS
    from wan.errors import UserError as UserError
    from wan.experts import pipeline_class as pipeline_class
    from wan.image2video import WanI2V as WanI2V
    from wan.options import Settings as Settings
    from wan.text2video import WanT2V as WanT2V
    from wan.textimage2video import WanTI2V as WanTI2V
    from wan.video2video import WanV2V as WanV2V
    from wan.wan22video2video5B import WanV2V5B as WanV2V5B

_HOME = {
    "Chain": "wan.commands.continuous",
    "Settings": "wan.options",
    "WAN_CONFIGS": "wan.configs",
    "UserError": "wan.errors",
    "pipeline_class": "wan.experts",
    "WanI2V": "wan.image2video",
    "WanT2V": "wan.text2video",
    "WanTI2V": "wan.textimage2video",
    "WanV2V": "wan.video2video",
    "WanV2V5B": "wan.wan22video2video5B",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # reading a video file or parsing flags should not wait for the model libraries
    if name not in _HOME:
        raise AttributeError(f"module 'wan' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
