"""What must be put right about other packages before they are imported."""

from __future__ import annotations

import importlib
import logging
import sys

logger = logging.getLogger(__name__)


def hide_broken_torchvision() -> None:
    """Make a torchvision that cannot be imported count as absent. Call before transformers or diffusers is imported.

    Both see that it is installed, import it, and fail with it (a build for another torch raises "operator
    torchvision::nms does not exist"), although nothing here needs it.
    """
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # what a broken binary raises is open: RuntimeError, OSError, AttributeError, ...
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            return  # not installed, or hidden already
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # from here on an import says "not found"
        logger.warning("torchvision is installed but broken, going on without it: %s", " ".join(str(error).split()))
