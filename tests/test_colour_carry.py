"""`colour_carry`: what a clip begins with is led back to the shot's first clip, and only that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tests.support.commands import Seen
from wan.colour_carry import lead_to
from wan.denoiser.conditioning import carried
from wan.quality import measure_colours
from wan.types import KnownFrames


def _stack(known: KnownFrames) -> torch.Tensor:
    return torch.stack([frame for frame in known.leading if isinstance(frame, torch.Tensor)], dim=1)


def test_latents_move_by_what_the_change_does_to_them_and_the_first_stays() -> None:
    torch.manual_seed(0)
    latents, plain, change = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6), torch.randn(4, 1, 1, 1)
    moved = carried(latents, plain, plain + change) - latents
    assert torch.allclose(moved, change * torch.tensor([0, 0.5, 1])[None, :, None, None], atol=1e-5)
    one = latents[:, :1], plain[:, :1]
    assert torch.allclose(carried(*one, one[1] + change), one[0] + change, atol=1e-5)
    assert torch.equal(carried(latents, plain, plain), latents)  # what encoding costs drops out
    fine = torch.ones(4, 3, 5, 6)
    fine[..., ::2] = -1  # detail, which is no colour
    assert float((carried(latents, plain, plain + fine) - latents)[..., 1:-1].abs().max()) < 0.4


def test_the_end_of_the_clip_before_stands_for_the_motion_of_svi2pro() -> None:
    tail, motion = torch.rand(7, 3, 16, 16) * 0.8 - 0.4, torch.zeros(4, 1, 2, 2)
    known = lead_to(
        measure_colours(tail.permute(0, 2, 3, 1) - 0.04), KnownFrames(motion=motion), tail.permute(0, 2, 3, 1), 1.0
    )
    assert len(known.leading) == 5 and known.graded is not None and known.graded.shape == (3, 5, 16, 16)
    assert known.motion is motion
    assert torch.allclose(known.graded, _stack(known) - 0.04, atol=1e-4)


SVI = "--ckpt_dir i2v --continuation svi2pro --lora_high svi_pro_high.safetensors --lora_low svi_pro_low.safetensors"


@pytest.mark.parametrize("words", ["", "--continuation tail", "--ckpt_dir i2v", SVI])
def test_each_clip_begins_nearer_to_the_first_one(command: Callable[..., Seen], words: str) -> None:
    seen = command(f"--colour_carry 0.5 --num_videos 3 {words}")
    assert seen.code == 0
    first, *later = seen.requests
    assert first.known.graded is None  # it is what the others are led back to
    wanted = measure_colours(seen.clips[1]._tensor("tail"))
    for number, clip in seen.clips.items():
        assert clip.colours is not None and torch.equal(clip.colours, wanted), number
        assert clip.record["colour_carry"] == 0.5 and clip.settings["colour_carry"] == 0.5
    second, third = later
    assert second.known.graded is None  # clip 1 itself is as it was
    assert third.known.graded is not None
    before = _stack(third.known)
    change = float((third.known.graded - before).abs().max())
    assert 0 < change < 0.2
    # what is shown and handed on is what the model made
    assert torch.equal(seen.clips[2]._tensor("tail"), seen.made[1].clip.frames[-17:])


def test_a_chain_without_it_is_as_before_and_one_that_was_interrupted_ends_alike(
    command: Callable[..., Seen],
) -> None:
    plain = command("")
    assert "colour_carry" not in plain.clips[1].settings and plain.clips[2].colours is None
    whole = command("--colour_carry --yes")
    before = load_file(whole.clips[2].state)
    assert [clip.settings["colour_carry"] for clip in whole.clips.values()] == [0.5, 0.5]
    whole.clips[2].record_path.unlink()  # as if it had been stopped before clip 2
    again = command("--colour_carry")
    assert len(again.requests) == 1
    after = load_file(again.clips[2].state)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_drift_correction_does_not_undo_it(command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = list[torch.Tensor]()

    def corrected(frames: torch.Tensor, condition: torch.Tensor, **given: object) -> torch.Tensor:
        assert given["device"] == torch.device("meta")  # of the models, which has time for it
        measured.append(condition)
        return frames

    monkeypatch.setattr("wan.candidates.correct_drift", corrected)
    seen = command("--colour_carry --drift_correction --num_videos 3")
    graded = seen.requests[2].known.graded
    assert graded is not None and torch.allclose(measured[2][-1], graded[:, -1].permute(1, 2, 0), atol=1e-6)
    assert torch.allclose(measured[1], seen.made[0].clip.frames[-17:], atol=1e-5)
