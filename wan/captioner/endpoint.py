"""A captioner behind an OpenAI-compatible HTTP endpoint: vLLM, SGLang, LMDeploy, llama.cpp or a hosted one."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable
from concurrent import futures
from http.client import HTTPMessage, IncompleteRead
from threading import Thread
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import parse_qsl, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from PIL import Image

from wan.captioner.base import BackEnd, Pictures, one_line, to_images
from wan.errors import UserError
from wan.foreign import parse_json
from wan.public import public_url

FRAME_SIZE = 448  # pixels; a square of this size stays one tile, servers cut others into up to 13
MOST_BYTES = 4 << 20  # of an answer
SECONDS = 300.0  # for one answer, with all its bytes
KEY = "OPENAI_API_KEY"


class EndpointCaptioner(BackEnd):
    """Asks `url` (its /v1 or all of /v1/chat/completions) about frames.

    A user and a password in the address go along as basic authorization, a query is kept, and neither is shown.
    `model` None takes the first that the server offers. The key in the environment variable KEY, if it is set, goes
    along, to this address alone: redirects are refused. An answer may take SECONDS and MOST_BYTES. Raises UserError for
    what is not an http(s) address.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        shown = public_url(url)
        if shown is None:  # which is not quoted: there may be a password in it
            raise UserError("`vlm_url` is not an address: give one such as http://127.0.0.1:8000/v1")
        self.url = shown.rstrip("/").removesuffix("/chat/completions")
        parts = urlsplit(url)
        self._query = f"?{parts.query}" if parts.query else ""
        self._login = ":".join(unquote(one or "") for one in (parts.username, parts.password)) if parts.username else ""
        self.source = self.url
        self.model = model

    def answer(self, frames: Pictures, question: str, system: str | None, max_new_tokens: int) -> str:
        content: list[dict[str, Any]] = []
        for number, image in enumerate(to_images(frames), 1):
            content += [
                {"type": "text", "text": f"Frame{number}: "},
                {"type": "image_url", "image_url": {"url": jpeg_url(image)}},
            ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        if self.model is None:
            self.model = str(self.first(self.call("/models"), "data", "id"))
        reply = self.call(
            "/chat/completions",
            {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_new_tokens},
        )
        message = self.first(reply, "choices", "message")
        # OpenAI's API has a field of its own for a refusal
        text = (message.get("content") or message.get("refusal")) if isinstance(message, dict) else None
        if isinstance(text, list):  # some servers answer in parts
            text = " ".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        return text if isinstance(text, str) else ""

    def close(self) -> None:
        """Nothing to free here."""

    def first(self, reply: Any, items: str, key: str) -> Any:
        """reply[items][0][key]. Raises UserError."""
        try:
            if isinstance(reply, dict) and reply.get("error"):  # some servers say so with HTTP 200
                error = reply["error"]
                reason = error.get("message", error) if isinstance(error, dict) else error
                reason = one_line(ValueError(self._without_secrets(str(reason))))
                raise UserError(f"{self.url} answered with an error ({reason}): check `vlm_url`")
            return reply[items][0][key]
        except (LookupError, TypeError) as error:
            raise UserError(f"{self.url} answered without {items}: give an OpenAI-compatible `vlm_url`") from error

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers. Raises UserError, OSError and HTTPException."""
        key = self._key()
        headers = {"Content-Type": "application/json"}
        if self._login:
            headers["Authorization"] = f"Basic {base64.b64encode(self._login.encode()).decode()}"
        elif key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path + self._query, data, headers)
        try:
            content = _within(SECONDS, lambda: _ask(request, SECONDS))
        except HTTPError as error:
            reason = one_line(ValueError(self._without_secrets(error.reason)))
            unnamed = "name its model with `vlm_path`, or " if path == "/models" else ""
            raise UserError(
                f"{self.url} refused with HTTP {error.code} ({reason}): {unnamed}check `vlm_url`"
            ) from error
        if len(content) > MOST_BYTES:
            raise UserError(f"{self.url} answered with more than {MOST_BYTES >> 20} MiB: check `vlm_url`")
        try:
            return parse_json(content, "the answer")
        except UserError as error:
            raise UserError(f"{self.url} did not answer in JSON: give an OpenAI-compatible `vlm_url`") from error

    def _key(self) -> str:
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):  # the HTTP library's own complaint would print the key
            raise UserError(f"{KEY} holds characters that no key has: set it again")
        return key

    def _without_secrets(self, text: str) -> str:
        """What a server says, without the key and what else it was sent that is secret."""
        query = [value for _, value in parse_qsl(self._query[1:])]
        for secret in (self._key(), self._login.partition(":")[2], *query):
            text = text.replace(secret, "***") if len(secret) >= 4 else text
        return text


class _NoRedirects(HTTPRedirectHandler):
    """The key is for the address that was given, and for no other that an answer names."""

    def redirect_request(
        self, request: Request, opened: IO[bytes], code: int, message: str, headers: HTTPMessage, url: str
    ) -> None:
        raise HTTPError(
            request.full_url, code, f"it sends on to {public_url(url) or 'another address'}", headers, opened
        )

    http_error_308 = HTTPRedirectHandler.http_error_302  # which Python 3.10 does not follow


def _ask(request: Request, timeout: float) -> bytes:
    """What a server answers, up to a byte more than it may. An HTTPError has what it says as its reason."""
    until = time.monotonic() + timeout
    try:
        with build_opener(_NoRedirects).open(request, timeout=timeout) as response:
            content = b""
            while len(content) <= MOST_BYTES and time.monotonic() < until:
                if not (block := response.read1(MOST_BYTES + 1 - len(content))):
                    if response.length:  # what it announced and did not send; read1 does not mind
                        raise IncompleteRead(content, response.length)
                    return content
                content += block
            return content
    except HTTPError as error:
        if error.code // 100 != 3:
            error.msg = error.read(2000).decode(errors="replace").strip() or error.msg
        raise


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """What `work` returns, in so many seconds. Raises TimeoutError: a socket's own limit is for each of its reads."""
    done: futures.Future[bytes] = futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()  # left behind where it hangs
    try:
        return done.result(seconds)
    except futures.TimeoutError as error:  # which is no TimeoutError before Python 3.11
        raise TimeoutError(f"timed out: no whole answer in {seconds:g} s") from error


def jpeg_url(image: Image.Image) -> str:
    """An image, squashed to FRAME_SIZE x FRAME_SIZE, as a data URL."""
    buffer = io.BytesIO()
    image.resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
