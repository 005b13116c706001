"""Continue videos with Wan2.2: the public names, each imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan.commands.continuous import Chain as Chain
    from wan.configs import WAN_CONFIGS as WAN_CONFIGS
    from wan.errors import UserError as UserError
    from wan.image2video import WanI2V as WanI2V
    from wan.options import Settings as Settings
    from wan.pipeline import Pipeline
    from wan.text2video import WanT2V as WanT2V
    from wan.textimage2video import WanTI2V as WanTI2V
    from wan.video2video import WanV2V as WanV2V
    from wan.wan22video2video5B import WanV2V5B as WanV2V5B

__version__ = "0.1.0"

_HOME = {
    "Chain": "wan.commands.continuous",
    "Settings": "wan.options",
    "WAN_CONFIGS": "wan.configs",
    "UserError": "wan.errors",
    "WanI2V": "wan.image2video",
    "WanT2V": "wan.text2video",
    "WanTI2V": "wan.textimage2video",
    "WanV2V": "wan.video2video",
    "WanV2V5B": "wan.wan22video2video5B",
}
_CLASSES = {
    "t2v-A14B": "WanT2V",
    "i2v-A14B": "WanI2V",
    "ti2v-5B": "WanTI2V",
    "v2v-14B": "WanV2V",
    "v2v-5B": "WanV2V5B",
}
__all__ = sorted([*_HOME, "pipeline_class"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # reading a video file or parsing flags should not wait for the model libraries
    if name not in _HOME:
        raise AttributeError(f"module 'wan' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def pipeline_class(task: str) -> type[Pipeline]:
    """The class of a task's pipeline, by the task's name in `WAN_CONFIGS`."""
    found: type[Pipeline] = getattr(import_module(_HOME[_CLASSES[task]]), _CLASSES[task])
    return found
