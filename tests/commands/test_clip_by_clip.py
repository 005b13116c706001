"""What a storyboard changes of the way from clip to clip, with stand-ins for the models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.commands import Seen, Speaking, frames_in
from wan import media
from wan.chain.plan import LaterPicture, Plan
from wan.commands.flags import check_prompts_for, check_together
from wan.commands.plans import plans_of
from wan.errors import UserError
from wan.media import PIECE, writing
from wan.options import Settings

SVI = "--ckpt_dir i2v --continuation svi2pro --lora_high svi_pro_high.safetensors --lora_low svi_pro_low.safetensors"


def told(world: Path, *clips: dict[str, object]) -> str:
    (world / "clips.json").write_text(json.dumps(clips))
    return f"--frame_num 13 --num_videos {len(clips)} --storyboard clips.json"


def test_the_first_clip_goes_without_svi_and_anchors_change_without_a_cut(
    command: Callable[..., Seen], world: Path
) -> None:
    clips = told(world, {"continuation": "last_frame"}, {}, {"anchor": "red.png"}, {}, {"cut": "small.png"}, {})
    seen = command(f"{SVI} {clips}")
    assert seen.code == 0, seen.output
    first, *others = seen.requests
    known: list[Any] = [one.known for one in others]
    assert len(first.known.leading) == 1 and first.known.anchor is None and not any(first.loras.values())
    assert all(one.known.anchor is not None and len(one.loras) == 2 for one in others)
    assert torch.equal(known[0].motion, seen.made[0].motion)
    anchors = [float(one.anchor.mean()) for one in known]
    red = torch.tensor(-1 / 3)
    assert [bool(torch.isclose(torch.tensor(one), red, atol=0.01)) for one in anchors] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert anchors[3] == anchors[4]  # of the new shot
    kept = command(f"{SVI} {clips}")
    assert (kept.code, kept.requests) == (0, [])


def test_a_clip_of_svi_after_others_holds_on_to_the_picture_of_its_shot(
    command: Callable[..., Seen], world: Path
) -> None:
    both = {"lora_high": "svi_pro_high.safetensors", "lora_low": "svi_pro_low.safetensors"}
    clips = told(world, {"cut": "red.png"}, {"continuation": "svi2pro", **both})
    seen = command(f"--ckpt_dir i2v {clips}")
    assert seen.code == 0, seen.output
    assert seen.requests[0].known.anchor is None
    known: Any = seen.requests[1].known
    assert float(known.anchor.mean()) == seen.mean(seen.requests[0].known.leading[0])
    wrong = command(f"--ckpt_dir i2v {told(world, {'anchor': 'red.png'})} --output_dir wrong")
    assert wrong.code == 2 and "clips.json, line 1: anchor goes with --continuation svi2pro" in wrong.stderr


def test_what_is_discarded_is_in_no_file_and_the_next_clip_starts_before_it(
    command: Callable[..., Seen], world: Path
) -> None:
    seen = command(told(world, {"discard": 4}, {}))
    assert seen.code == 0, seen.output
    assert [frames_in(seen.clips[number].video) for number in (1, 2)] == [9, 13]
    known: Any = seen.requests[1].known.leading[0]
    frames = seen.made[0].clip.frames  # as they were sampled
    assert torch.equal(known, frames[8].permute(2, 0, 1))
    assert frames_in(seen.folder / "joined.mp4") == 9 + 12
    assert [one["new_frames"] for one in json.loads((seen.folder / "report.json").read_text())["clips"]] == [8, 12]


def test_cuts_fade_and_nothing_but_the_fade_is_encoded_again(
    command: Callable[..., Seen], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, int]] = []
    write = writing.write_video

    def counted(path: Any, *options: Any, **more: Any) -> int:
        written.append((Path(path).name, write(path, *options, **more)))
        return written[-1][1]

    monkeypatch.setattr(writing, "write_video", counted)
    words = told(world, {}, {"cut": "red.png"}, {"cut": "red.png"}, {})
    seen = command(f"{words} --fade 4")
    assert seen.code == 0, seen.output
    assert frames_in(seen.folder / "joined.mp4") == 13 + 9 + 9 + 12
    assert {count for name, count in written if name.endswith(PIECE)} == {4} and not list(seen.folder.glob(".joined*"))
    assert [clip.settings.get("fade") for clip in seen.clips.values()] == [None] * 4
    # nothing is made again for it
    plain = command(words)
    assert (plain.code, plain.requests) == (0, []) and frames_in(plain.folder / "joined.mp4") == 13 + 13 + 13 + 12
    for wrong, problem in (
        (f"{words} --fade 7 --output_dir a", "--fade 7 is more than half of clip 2"),
        (f"{words} --fade 4 --include_source --output_dir b", "leave --include_source out"),
    ):
        refused = command(wrong)
        assert refused.code == 2 and problem in refused.stderr


def test_a_bridge_ends_on_the_first_frame_of_what_follows_and_joins_all(
    command: Callable[..., Seen], world: Path
) -> None:
    seen = command("--until other.mp4")
    assert seen.code == 0, seen.output
    first, last = seen.requests
    end: Any = last.known.end
    assert first.known.end is None
    picture = seen.pipeline.frame_for(media.read_first_frame(world / "other.mp4"), 64, 32)
    assert torch.equal(end, picture)
    # the model and the source have 24 frames per second, what follows has 30: no picture of it is lost at 48
    parts = [frames_in(world / name) for name in ("source.mp4", "other.mp4")]
    assert frames_in(seen.folder / "joined.mp4") == 2 * (parts[0] + 2 * 8) + round((parts[1] - 1) / 30 * 48)
    again = command("--until other.mp4")
    assert (again.code, again.requests) == (0, [])
    for wrong, problem in (
        ("--until other.mp4 --end_image red.png", "leave --end_image and --end_images out"),
        ("--until nowhere.mp4", "cannot read video 'nowhere.mp4'"),
        (f"--until other.mp4 {told(world, {'end_image': 'red.png'})}", "ends with the first frame of --until"),
    ):
        refused = command(f"{wrong} --output_dir {world / 'none'}")
        assert refused.code == 2 and problem in refused.stderr, refused.stderr


def test_a_folder_of_end_images_says_how_many_clips_may_have_prompts() -> None:
    settings = Settings(video="a.mp4", ckpt_dir="m", end_images="ends", prompt_for=((15, "x"),))
    check_together("continuous", settings)  # twelve, where nothing says how many there are, is no limit here
    check_prompts_for(settings, 15)
    with pytest.raises(UserError, match="prompt_for 15 is beyond num_videos 14"):
        check_prompts_for(settings, 14)
    with pytest.raises(UserError, match="prompt_for 15 is beyond num_videos 12"):
        check_together("continuous", dataclasses.replace(settings, end_images=None))


def test_identity_is_measured_against_the_shot_s_first_picture(
    command: Callable[..., Seen], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def view(self: Speaking, picture: Image.Image) -> torch.Tensor:
        seen = torch.tensor(np.asarray(picture).mean((0, 1)) / 255, dtype=torch.float32)
        return torch.nn.functional.normalize(seen, dim=0)

    words = told(world, {}, {}, {"cut": "red.png"}, {}, {"prompt": "it-goes-on"})
    plain = command(f"{words} --output_dir {world / 'plain'}")
    assert plain.code == 0 and not any("identity" in clip.record for clip in plain.clips.values())
    monkeypatch.setattr(Speaking, "view", view, raising=False)
    seen = command(words)
    assert seen.code == 0, seen.output
    measured = [clip.record.get("identity") for clip in seen.clips.values()]
    assert measured[0] == measured[2] == 1  # a shot's first clip begins with the picture itself
    assert measured[4] is None  # nobody looked
    red, grey = torch.tensor([1.0, 0, 0]), seen.made[2].clip.frames[-1].mean((0, 1)) / 2 + 0.5
    assert measured[3] == pytest.approx(float(red @ grey / grey.norm()), abs=0.01)
    report = json.loads((seen.folder / "report.json").read_text())
    assert report["drift"]["identity"] == measured and "Identity" in (seen.folder / "report.html").read_text()
    assert report["clips"][0]["new_frames"] == 12
    assert "Identity" not in (world / "plain" / "report.html").read_text()


def test_end_images_are_read_when_their_clip_comes(
    command: Callable[..., Seen], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = list[Plan]()

    def spy(*given: Any) -> list[Plan]:
        plans[:] = plans_of(*given)
        return list(plans)

    monkeypatch.setattr("wan.commands.continuous.plans_of", spy)
    seen = command("--end_images ends")
    assert seen.code == 0 and [type(plan.end) for plan in plans] == [LaterPicture, LaterPicture]  # and no pixels
    end = plans[1].end
    assert isinstance(end, LaterPicture) and isinstance(end.read(), torch.Tensor)
    file = world / "ends" / "10.png"
    before = file.read_bytes()
    try:
        Image.new("RGB", (64, 32), "blue").save(file)
        with pytest.raises(UserError, match="10.png is another picture than when the run began"):
            end.read()
    finally:
        file.write_bytes(before)
