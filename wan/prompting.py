"""The captioner's device and life, and a clip's prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from wan.captioner import (
    Captioner,
    Memory,
    NextPrompt,
    compose_prompt,
    local_folder,
    next_prompt,
    open_captioner,
    refusal,
    weight_bytes,
    working_bytes,
)
from wan.captioner.base import BackEnd, LocalModel, Pictures, Viewer
from wan.captioner.shared import Ask, open_shared
from wan.device.hardware import drop_cache, free_bytes, same_device
from wan.errors import UserError
from wan.options import LONGEST_CONTEXT
from wan.quality import measure_motion
from wan.types import Footage, as_picture

if TYPE_CHECKING:
    from wan.chain.plan import Plan

log = logging.getLogger(__name__)

RECENT_SECONDS = 2.0  # what the VLM looks at to say what happens next
ASK_AGAIN = "\n\nDescribe only what is visible: the subjects, the place, the light, the colours and the movement."
VLM_BYTES = 17_060_000_000  # of InternVL3_5-8B's weights, for one whose size nobody can say


@dataclass(frozen=True)
class ClipPrompt:
    """The prompt of a clip, what the next one is to remember, how it came about, and the seconds that took.

    `memory` and `notes` are JSON values.
    """

    text: str
    memory: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Description:
    """What stands for a description, all that the VLM said, and why it is the fallback where it is."""

    text: str
    answers: tuple[str, ...]
    fallback: str | None = None


class CaptionerOwner:
    """Opens the captioner when it is first used, on the device where it has room, and lets it go.

    `path` is a folder or a hub id, with `url` the endpoint's name for its model. `main` is the device of the other
    models and `vram` the bytes that all may take there, None for no limit. `device` places the captioner elsewhere.
    `fallback` takes the place of a description that it declines to give.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        url: str | None,
        question: str,
        fallback: str | None = None,
        trust_remote_code: bool,
        main: torch.device,
        device: torch.device | None = None,
        vram: int | None = None,
    ) -> None:
        self.path, self.url, self.trust_remote_code = path, url, trust_remote_code
        self.question, self.fallback = question, fallback
        self._main, self._vram = main, vram
        self._given = self._device = device
        self._pictures = 8  # of a question, at most; 8 unless one says more
        self._captioner: Captioner | None = None
        self._ask: Ask | None = None
        self.takes_turns = False  # leaves host memory too after each description

    def share(self, ask: Ask) -> None:
        """Ask a captioner in another process for `path`, unless there is an endpoint."""
        if self.url is None:
            self._ask = ask

    @property
    def is_elsewhere(self) -> bool:
        """Whether it takes nothing of this process's memory."""
        return bool(self.url) or self._ask is not None

    def expect(self, pictures: int) -> None:
        """Be ready for questions with so many pictures: more than before may leave its weights less room."""
        if pictures > self._pictures:
            self._pictures = pictures
            if self._captioner is None:
                self._device = self._given
            elif self.device.type == "cuda":
                self._captioner.close()  # it loads again with the room that it has then

    @property
    def host_bytes(self) -> int:
        """What a folder's weights take of host memory: where it describes on the CPU, or layers wait for their turn."""
        if self.path is None or self.is_elsewhere or not Path(self.path).expanduser().is_dir():
            return 0
        size = weight_bytes(self.path) or 0
        if isinstance(self._captioner, LocalModel) and self._captioner.is_loaded:
            waits = self._captioner.waits_in_host_memory
        else:
            waits = self.device.type == "cpu" or (self.device.type == "cuda" and size > self._room())
        return size if waits else 0

    @property
    def is_beside(self) -> bool:
        """Whether it lives where the other models do."""
        return not self.is_elsewhere and same_device(self.device, self._main)

    @property
    def device(self) -> torch.device:
        """Where it lives: as given, with the other models, or in host memory where it is larger than their budget."""
        if self._device is None:
            self._device = self._main if self._fits() else torch.device("cpu")
        return self._device

    def _fits(self) -> bool:
        if self._vram is None or self.path is None or self.is_elsewhere:
            return True
        fits = (weight_bytes(self.path) or VLM_BYTES) + self._working <= self._vram
        if not fits:
            log.warning(
                "%s does not fit into `vram` and describes on the CPU, which takes minutes a clip: a smaller InternVL "
                "with `vlm_path`, a server with `vlm_url` or your own `prompt` is quicker",
                self.path,
            )
        return fits

    def _room(self) -> int:
        """What its weights may take of its GPU now."""
        drop_cache(self.device)
        return free_bytes(self.device) - self._working

    @property
    def _working(self) -> int:
        """Bytes of its device beside its weights."""
        return working_bytes(None if self.path is None else local_folder(self.path), self._pictures)

    @property
    def captioner(self) -> Captioner:
        """The captioner; a wrong path is said when it is opened, its weights load at the first description."""
        if self._captioner is None and self._ask is not None and self.path is not None:
            self._captioner = open_shared(str(self.path), self.trust_remote_code, self._ask)
        if self._captioner is None:
            self._captioner = open_captioner(
                self.path,
                url=self.url,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                # a budget that nobody gave never moves it elsewhere: what does not fit comes layer by layer
                room=self._room if self.device.type == "cuda" else None,
            )
        return self._captioner

    def use(self, captioner: Captioner) -> None:
        """Use a captioner that is there already."""
        self._captioner = captioner

    def forget(self) -> None:
        """Let the captioner go; it is opened again when it is next used."""
        if self._captioner is not None:
            self._captioner.close()
            self._captioner = None

    @property
    def leaves_the_disk_alone(self) -> bool:
        """Whether the host's disk and memory are the other models' while it describes."""
        return self.is_elsewhere or self.device.type != "cpu"

    def load(self, pictures: int) -> None:
        """Have the weights of a model of this process in memory, for questions with so many pictures."""
        self.expect(pictures)
        if isinstance(captioner := self.captioner, BackEnd):
            captioner.prepare_weights()

    def describe(self, frames: Pictures, question: str | None = None) -> Description:
        """What it says about frames. One that declines is asked again, as decoding is greedy with other words.

        Raises UserError, with what it says, where it declines again and there is no fallback.
        """
        self.expect(len(frames))
        question = question or self.question
        answers: list[str] = []
        for asked in (question, question + ASK_AGAIN):
            answers.append(self.captioner.describe(frames, asked))
            declined = refusal(answers[-1])
            if declined is None:
                return Description(answers[-1], tuple(answers))
        if self.fallback is None:
            raise UserError(
                f"the VLM declines to describe the video ({declined!r}): ask with another `vlm_question`, give "
                "`vlm_fallback`, a description for such a case, or `prompt` to go on without captioning"
            )
        log.warning("the VLM declines to describe the video (%r); `vlm_fallback` takes its place", declined)
        return Description(self.fallback, tuple(answers), f"the VLM declined: {declined}")

    def make_room(self, stays: Callable[[], bool]) -> None:
        """Free a model that shares the GPU with the others, unless it `stays`, and one that takes turns with them."""
        if self.is_elsewhere:
            return
        if self.takes_turns or (self._main.type == "cuda" and same_device(self.device, self._main) and not stays()):
            self.captioner.close()


class PromptBuilder:
    """Makes the prompt of a clip: the plan's, or what the captioner says of the footage before it.

    `count_tokens` counts as the text encoder does, which takes `limit` of them; `fps` is the model's rate.
    """

    def __init__(self, owner: CaptionerOwner, count_tokens: Callable[[str], int], limit: int, fps: Fraction) -> None:
        self.owner, self.fps = owner, fps
        self._count_tokens, self._limit = count_tokens, limit

    def build(
        self,
        footage: Footage,
        plan: Plan,
        stays: Callable[[], bool],
        memory: Mapping[str, Any] = MappingProxyType({}),
    ) -> ClipPrompt:
        """The plan's prompt, or what the captioner says, cut to what the text encoder takes; prefix first.

        `memory` is what the clip before noted for this one; `stays` whether the captioner may stay on the GPU.
        """
        if not plan.described:
            return ClipPrompt(f"{plan.prefix} {plan.prompt}".strip())
        try:
            if plan.prompt_mode == "continue":
                # after a cut nothing of the old shot is to be kept up
                following = self._next_prompt(footage, plan, Memory() if plan.is_cut else Memory.from_json(memory))
                summary = following.prompt
                remembered: Mapping[str, Any] = following.memory.as_json()
                notes: dict[str, Any] = {"answers": list(following.answers), "fallback": following.fallback}
            else:
                described = self.owner.describe(footage.samples(plan.num_segments))
                summary, remembered = described.text, {}
                notes = {"answers": list(described.answers)}
                notes |= {"fallback": described.fallback} if described.fallback else {}
            if plan.likeness is not None and isinstance(captioner := self.owner.captioner, Viewer):
                views = [captioner.view(as_picture(frame)) for frame in (plan.likeness, footage.last)]
                notes["identity"] = round(float(views[0] @ views[1]), 4)
        finally:
            self.owner.make_room(stays)
        prompt = compose_prompt(plan.prefix, summary, self._count_tokens, self._limit)
        return ClipPrompt(prompt, remembered, notes)

    def _next_prompt(self, footage: Footage, plan: Plan, memory: Memory) -> NextPrompt:
        frames = footage.samples(plan.num_segments, RECENT_SECONDS)
        apart = RECENT_SECONDS / max(plan.num_segments - 1, 1)
        tail = footage.tail(LONGEST_CONTEXT, self.fps)
        motion = measure_motion(tail, self.fps) if len(tail) > 1 else None  # a picture has none
        return next_prompt(
            self.owner.captioner,
            frames,
            [apart * (index + 1 - len(frames)) for index in range(len(frames))],
            motion=motion.sentence() if motion else "",
            still=motion is None or motion.still,
            memory=memory,
            goal=plan.prompt or "",
            clip=plan.number,
            clips=plan.count,
            seconds=float(plan.geometry.frames / self.fps),
            describe=lambda: self.owner.describe(frames).text,  # those that a finished clip keeps
        )
