"""Frames and a question -> text: what a vision-language model says about a video, and the prompt made of it."""

from wan.captioner.base import Captioner
from wan.captioner.endpoint import EndpointCaptioner
from wan.captioner.factory import local_folder, open_captioner, weight_bytes
from wan.captioner.frames import build_transform, dynamic_preprocess
from wan.captioner.generic import GenericCaptioner, RemoteCodeCaptioner
from wan.captioner.internvl import InternVLCaptioner
from wan.captioner.memory import working_bytes
from wan.captioner.next_prompt import Memory, NextPrompt, next_prompt
from wan.captioner.text import clean_caption, compose_prompt, refusal
from wan.compat import hide_broken_torchvision
from wan.types import frame_indices

__all__ = [
    "NextPrompt",
    "Captioner",
    "EndpointCaptioner",
    "GenericCaptioner",
    "InternVLCaptioner",
    "Memory",
    "RemoteCodeCaptioner",
    "build_transform",
    "clean_caption",
    "compose_prompt",
    "dynamic_preprocess",
    "frame_indices",
    "hide_broken_torchvision",
    "local_folder",
    "next_prompt",
    "open_captioner",
    "refusal",
    "weight_bytes",
    "working_bytes",
]
