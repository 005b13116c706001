"""What a clip is made with: only what is used is said, and everything that changes a result changes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from wan.chain.fingerprint import clip_settings, difference, fingerprint, picture_digest
from wan.chain.plan import LaterPicture, Plan
from wan.configs import WAN_CONFIGS
from wan.files import sampled_digest
from wan.settings import Context, LoraFile, Sampling, StepCache
from wan.types import Geometry

PLAIN = Sampling(4, 5.0, (1.0, 2.0))
ROW = WAN_CONFIGS["v2v-5B"]


def continuation(folder: Path, **more: Any) -> Any:
    weights = folder / "weights.safetensors"
    weights.write_bytes(b"weights")
    part = SimpleNamespace(files=[weights])
    vlm = {"path": None, "url": None, "question": "what?", "fallback": None, "trust_remote_code": False}
    return SimpleNamespace(
        **{
            "checkpoint": SimpleNamespace(experts={"model": part}, vae=part, text_encoder=part),
            "convert_model_dtype": False,
            "device": torch.device("cpu"),
            "text_device": torch.device("cpu"),
            "video_reader": "auto",
            "config": ROW,
            **more,
            "vlm": SimpleNamespace(**vlm | more.get("vlm", {})),
        }
    )


def made(folder: Path, of: Any = None, sampling: Sampling = PLAIN, frames: int = 17, **plan: Any) -> dict[str, Any]:
    one = Plan(Geometry(frames, 32, 64, (4, 16, 16)), sampling, "blurred", **{"prompt": "a boat"} | plan)
    (settings,) = clip_settings(ROW, of or continuation(folder), [one])
    return settings


def test_what_is_not_used_is_not_said(tmp_path: Path) -> None:
    settings = made(tmp_path)
    assert settings.pop("checkpoint") != settings.pop("config")
    assert settings == {
        "task": "v2v-5B",
        "convert_model_dtype": False,
        "device": "cpu",
        "text_device": "cpu",
        "width": 64,
        "height": 32,
        "frames": 17,
        "steps": 4,
        "shift": 5.0,
        "guidance": [1.0, 2.0],
        "solver": "unipc",
        "negative_prompt": "blurred",
        "prompt": "a boat",
        "custom_prompt": "",
        "num_segments": None,  # as 0.1.0 did
        "vlm": None,
        "vlm_question": None,
    }


@pytest.mark.parametrize(
    ("plan", "and_more"),
    [
        ({"context": Context("tail", 9)}, {"continuation": "tail", "context_frames": 9}),
        ({"context": Context("svi2pro", 5)}, {"continuation": "svi2pro"}),
        ({"cut": True}, {"cut": True}),
        ({"end": LaterPicture("a digest", lambda: torch.zeros(3, 1, 1))}, {"end_image": "a digest"}),
        ({"prompt_mode": "continue"}, {"prompt_mode": "continue"}),
        ({"motion_amplitude": 1.2}, {"motion_amplitude": 1.2}),
        ({"discard": 4}, {"discard": 4}),
        ({"drift_correction": 0.5}, {"drift_correction": 0.5}),
        ({"colour_carry": 0.25}, {"colour_carry": 0.25}),
        ({"best_of": 2}, {"best_of": 2}),
        ({"prefix": "continue video"}, {"custom_prompt": "continue video"}),
        ({"sampling": Sampling(4, 5.0, (1.0, 2.0), guidance_interval=(0.25, 1.0))}, {"guidance_interval": [0.25, 1.0]}),
        ({"sampling": Sampling(4, 5.0, (1.0, 2.0), cache=StepCache("first_block", 0.1))}, {"cache": "first_block:0.1"}),
        # these change no result
        ({"offload": False}, {}),
        ({"fade": 4}, {}),
        ({"take": 1}, {}),
        ({"keeps_takes": True}, {}),
        ({"cut": True, "handoff": "program {frames}"}, {"cut": True}),
    ],
)
def test_what_is_used_is_said(plan: dict[str, Any], and_more: dict[str, Any], tmp_path: Path) -> None:
    plain, other = made(tmp_path), made(tmp_path, **plan)
    described = {"num_segments": 8, "vlm": "", "vlm_question": "what?"} if plan.get("prompt_mode") else {}
    assert other == plain | and_more | described


def test_a_captioner_is_said_where_it_is_asked(tmp_path: Path) -> None:
    vlm = {"path": "org/model", "question": "what?", "fallback": "x", "trust_remote_code": True}
    of = continuation(tmp_path, vlm=vlm, video_reader="decord")
    plain, asked = made(tmp_path, of), made(tmp_path, of, prompt=None, num_segments=3)
    assert plain == made(tmp_path)
    assert asked == plain | {
        "prompt": None,
        "num_segments": 3,
        "vlm": "org/model",
        "vlm_question": "what?",
        "vlm_fallback": "x",
        "video_reader": "decord",
        "vlm_trust_remote_code": True,
    }
    assert "video_reader" not in made(tmp_path, continuation(tmp_path, video_reader="pyav"), prompt=None)


def test_a_captioner_is_known_by_its_weights_its_name_or_its_address(tmp_path: Path) -> None:
    def vlm(**more: Any) -> Any:
        return made(tmp_path, continuation(tmp_path, vlm=more), prompt=None)["vlm"]

    folder = tmp_path / "vlm"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"one")
    one = vlm(path=str(folder))
    (folder / "a.safetensors").write_bytes(b"two")
    assert one != vlm(path=str(folder)) and "vlm" not in one
    assert vlm(path="org/model") == "org/model"
    assert vlm(url="http://user:password@host/v1", path="model") == "http://host/v1 model"
    assert vlm(url="http://host/v1") == "http://host/v1"


def test_a_magcache_is_known_by_its_table_too(tmp_path: Path) -> None:
    sampling = Sampling(4, 5.0, (1.0, 2.0), cache=StepCache("magcache", 0.06))
    one = made(tmp_path, sampling=sampling)
    of = continuation(tmp_path, config=ROW.variant(mag_ratios=()))
    other = made(tmp_path, of, sampling=sampling)
    assert one["mag_ratios"] != other["mag_ratios"] and one | {"mag_ratios": ""} == other | {"mag_ratios": ""}


def test_weights_pictures_and_loras_are_known_by_their_contents(tmp_path: Path) -> None:
    before = made(tmp_path)
    other = continuation(tmp_path)
    for part in ("vae", "text_encoder"):
        file = tmp_path / f"{part}.safetensors"
        file.write_bytes(b"other")
        changed = continuation(tmp_path)
        setattr(changed.checkpoint, part, SimpleNamespace(files=[file]))
        assert made(tmp_path, changed)["checkpoint"] != before["checkpoint"] == made(tmp_path, other)["checkpoint"]
    red, green = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    for name, key in (("anchor", "anchor"), ("end", "end_image"), ("cut", "cut")):
        plans: list[dict[str, Any]] = [{name: picture} for picture in (red, green)]
        one, two = (made(tmp_path, **plan) for plan in plans)
        assert one[key] != two[key] and one | {key: ""} == two | {key: ""} == before | {key: ""}
    lora = tmp_path / "a.safetensors"
    lora.write_bytes(b"lora")
    with_lora = made(tmp_path, loras={"model": (LoraFile(lora, 0.5),)})
    assert with_lora["loras"]["model"][0]["strength"] == 0.5 and sampled_digest(lora) in str(with_lora["loras"])


def test_a_row_is_known_by_all_that_makes_a_result(tmp_path: Path) -> None:
    one = Plan(Geometry(17, 32, 64, (4, 16, 16)), PLAIN, "")

    def config(**changed: Any) -> Any:
        return clip_settings(ROW.variant(**changed), continuation(tmp_path), [one])[0]["config"]

    assert config() == config(mag_ratios=()) != config(low_precision="fp8")


def test_a_picture_is_known_by_its_pixels_and_its_shape() -> None:
    assert picture_digest(None) is None
    picture = Image.new("RGB", (4, 2), "red")
    assert picture_digest(picture) == picture_digest(picture.copy()) != picture_digest(Image.new("RGB", (2, 4), "red"))
    assert picture_digest(torch.zeros(3, 2, 4)) != picture_digest(torch.zeros(3, 4, 2))


def test_a_fingerprint_is_the_same_for_equal_values() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
    # the first digits of SHA-256 of the JSON in ASCII with sorted keys, as releases have written it
    assert fingerprint({"seed": 7, "prompt": "ü"}) == "6919e334b097e896"


@pytest.mark.parametrize(
    ("key", "old", "new", "words"),
    [
        ("steps", 4, 6, "`sample_steps` 4, now 6"),
        ("steps", None, 6, "`sample_steps` not set, now 6"),
        ("solver", "unipc", "euler", "`sample_solver` 'unipc', now 'euler'"),
        ("parent", "a", "b", "another video or another `from_`"),
        ("checkpoint", "a", "b", "another checkpoint"),
        ("config", "a", "b", "another wan_config.json, `precision` or `vae_dtype`"),
        ("device", "cpu", "cuda", "device 'cpu', now 'cuda'"),
        ("loras", 1, 2, "`lora` or `lora_high` or `lora_low` 1, now 2"),
    ],
)
def test_a_difference_is_in_the_words_of_the_settings(key: str, old: Any, new: Any, words: str) -> None:
    assert difference(key, old, new) == words
