"""What others may see of a path or an address: no folders of this machine, no password."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from wan.files import readable


def public_path(path: str | os.PathLike[str]) -> str:
    """A path as others may see it: one that is not below the working folder by its last name."""
    text = os.fspath(path)
    if os.path.isabs(text):
        below = os.path.relpath(text)
        text = os.path.basename(os.path.normpath(text)) if below.startswith(os.pardir) else below
    return readable(text)


def without_login(url: str) -> str:
    """An address of any scheme without user, password and query."""
    return re.sub(r"://[^/]*@", "://", url).partition("?")[0]


def public_url(url: str) -> str | None:
    """An http or https address without user, password, query and fragment; None for what is no such address."""
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return None
    if not (url.isascii() and url.isprintable() and " " not in url and parts.hostname):
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path}" if parts.scheme in ("http", "https") else None
