"""A captioner behind an OpenAI-compatible HTTP endpoint: vLLM, SGLang, LMDeploy, llama.cpp or a hosted one."""

from __future__ import annotations

import base64
import io
import json
import os
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from wan.captioner.base import BackEnd, Pictures, one_line, to_images
from wan.errors import UserError

FRAME_SIZE = 448  # pixels; a square of this size stays one tile, servers cut others into up to 13


class EndpointCaptioner(BackEnd):
    """Asks `url` (its /v1 or all of /v1/chat/completions) about frames.

    `model` None takes the first that the server offers. The key in the environment variable `api_key_env`, if it is
    set, goes along. `timeout` is in seconds, for one answer. Raises UserError for what is not an http(s) address.
    """

    def __init__(
        self, url: str, model: str | None = None, api_key_env: str = "OPENAI_API_KEY", timeout: float = 300
    ) -> None:
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise UserError(f"`vlm_url` {url!r} is not an address ({error})") from error
        if not url.isascii() or parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"`vlm_url` {url!r} is not an address: give one such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.source = self.url
        self.model = model
        self.api_key_env = api_key_env
        self.timeout = timeout

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
        said = message.get("content") if isinstance(message, dict) else None
        if isinstance(said, list):  # some servers answer in parts
            said = " ".join(str(part.get("text", "")) for part in said if isinstance(part, dict))
        return said if isinstance(said, str) else ""

    def close(self) -> None:
        """Nothing to free here."""

    def first(self, reply: Any, items: str, key: str) -> Any:
        """reply[items][0][key]. Raises UserError."""
        try:
            return reply[items][0][key]
        except (LookupError, TypeError) as error:
            raise UserError(f"{self.url} answered without {items}: give an OpenAI-compatible `vlm_url`") from error

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers. Raises UserError, OSError and HTTPException."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_env, "").strip():
            if not (key.isascii() and key.isprintable()):  # the HTTP library's own complaint would print the key
                raise UserError(f"{self.api_key_env} holds characters that no key has: set it again")
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, headers), timeout=self.timeout) as response:
                content = response.read()
        except HTTPError as error:
            reason = one_line(ValueError(error.read(2000).decode(errors="replace")))
            unnamed = "name its model with `vlm_path`, or " if path == "/models" else ""
            raise UserError(
                f"{self.url} refused with HTTP {error.code} ({reason}): {unnamed}check `vlm_url`"
            ) from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise UserError(f"{self.url} did not answer in JSON: give an OpenAI-compatible `vlm_url`") from error


def jpeg_url(image: Image.Image) -> str:
    """An image, squashed to FRAME_SIZE x FRAME_SIZE, as a data URL."""
    buffer = io.BytesIO()
    image.resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
