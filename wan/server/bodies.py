"""What a request says, as JSON or as a form with files."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from wan.errors import UserError
from wan.foreign import parse_json
from wan.server.errors import ApiError
from wan.server.jobs import Upload

_MOST_FILES, _MOST_FIELDS, _LONGEST_FIELD = 60, 1000, 1 << 20
_NESTED = re.compile(r"([a-z_]+)\[([a-z_]+)\]")


@dataclass
class Body:
    """The fields of a request by name, and its files by the name of their field."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Upload]] = field(default_factory=dict)

    def file(self, name: str) -> Upload | None:
        """The one file of a field. Raises ApiError where there are several."""
        values = self.files.get(name, [])
        if len(values) > 1:
            raise ApiError(f"{name} must be one file", param=name)
        return values[0] if values else None

    def text(self, name: str, *, required: bool = False) -> str | None:
        """A field of text, taken out. Raises ApiError."""
        value = self.fields.pop(name, None)
        if value is None or value == "":
            if required:
                raise ApiError(f"{name} is missing", param=name, code="missing_required_parameter")
            return None
        if not isinstance(value, str):
            raise ApiError(f"{name} must be text", param=name)
        return value

    def number(self, name: str) -> float | None:
        """A field with a positive number, which OpenAI's API writes as text, taken out. Raises ApiError."""
        value = self.fields.pop(name, None)
        if value is None or value == "":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if isinstance(value, bool) or not 0 < number < 1e6:
            raise ApiError(f"{name} must be a positive number", param=name)
        return number

    def whole(self, name: str) -> int | None:
        """A field with a positive whole number, taken out. Raises ApiError."""
        number = self.number(name)
        if number is not None and number != int(number):
            raise ApiError(f"{name} must be a whole number", param=name)
        return None if number is None else int(number)

    def json(self, name: str, kind: type) -> Any:
        """A field of JSON, in a form as text, taken out; None where it is not there. Raises ApiError."""
        value = self.fields.pop(name, None)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            value = _parse(value, name)
        if not isinstance(value, kind):
            raise ApiError(f"{name} must be a JSON {'list' if kind is list else 'object'}", param=name)
        return value


@asynccontextmanager
async def body_of(request: Request) -> AsyncIterator[Body]:
    """The body of a request; its files are there in the block. Raises ApiError."""
    headers = request.headers.mutablecopy()
    kind, *parameters = headers.get("content-type", "").split(";", 1)
    if kind.lower().startswith("multipart/"):
        headers["content-type"] = ";".join([kind.lower(), *parameters])  # old python-multipart minds capital letters
        request = Request({**request.scope, "headers": headers.raw}, request.receive)
        try:
            form = await request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=_LONGEST_FIELD)
        except HTTPException as error:
            raise ApiError(f"the form cannot be read: {error.detail}") from error
        try:
            body = Body()
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if value.size:
                        body.files.setdefault(name, []).append(Upload(value.filename or "", value.file))
                elif nested := _NESTED.fullmatch(name):
                    body.fields.setdefault(nested[1], {})[nested[2]] = value
                else:
                    body.fields[name] = value
            yield body
        finally:
            await form.close()
        return
    raw = await request.body()
    fields = _parse(raw, "the request") if raw.strip() else {}
    if not isinstance(fields, dict):
        raise ApiError("the request must be a JSON object")
    yield Body(fields)


def _parse(text: str | bytes, name: str) -> Any:
    try:
        return parse_json(text, name)
    except (UserError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ApiError(f"{error}") from error
