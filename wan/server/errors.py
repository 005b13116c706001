"""Errors as clients get them: OpenAI's body, and no paths of this machine."""

from __future__ import annotations

import re
from typing import Any

from wan.errors import UserError

# an absolute path, of which the last name may be said
_PATH = re.compile(r"(?<![\w/.:])(?:[A-Za-z]:\\|/)(?:[^\s/\\:;,'\"()]+[/\\])*([^\s/\\:;,'\"()]*)")


class ApiError(Exception):
    """An error that a client gets. `param` names the field that it is about."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API says it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": public(str(self)), "type": kind, "param": self.param, "code": self.code}}


def public(message: str) -> str:
    """A message without the folders that it names."""
    return _PATH.sub(lambda match: match[1] or "…", message)


def from_user_error(error: UserError, param: str | None = None) -> ApiError:
    """What is wrong with a client's setting; it names the first one that the message is about."""
    named = re.search(r"`([a-z0-9_]+)`", error.marked)
    return ApiError(str(error), param=param or (named[1].rstrip("_") if named else None))


def not_found(what: str = "video") -> ApiError:
    """There is none of this id, whatever the reason."""
    return ApiError(f"there is no such {what}", status=404, code="not_found")
