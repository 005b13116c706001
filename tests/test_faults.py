"""Small faults that no other test would notice: each of these tests fails when one line is left out or turned round."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.commands import Seen, Speaking, frames_in
from tests.support.media_samples import numbered
from wan import cli, media
from wan.captioner import EndpointCaptioner, endpoint
from wan.captioner.next_prompt import IDENTITY_QUESTION
from wan.chain.dry_run import flops, size_in_words
from wan.chain.inventory import _free
from wan.device.budget import StageMemory
from wan.device.layers import SLOTS
from wan.device.placement import Placement
from wan.errors import UserError
from wan.files import file_digest, publish, sampled_digest, write_json, write_text
from wan.media import writing

A14B = "--ckpt_dir i2v --num_videos 3"


def story(world: Path, *clips: dict[str, Any]) -> str:
    (world / "faults.json").write_text(json.dumps(clips))
    return "--storyboard faults.json"


# --- continuation


def test_the_end_image_of_the_command_line_is_where_the_whole_chain_ends(command: Callable[..., Seen]) -> None:
    seen = command(f"{A14B} --end_image red.png")
    assert [request.known.end is not None for request in seen.requests] == [False, False, True]
    assert ["end_image" in settings for settings in seen.fingerprinted.values()] == [False, False, True]


def test_a_clip_that_begins_with_a_cut_still_ends_with_its_end_image(command: Callable[..., Seen], world: Path) -> None:
    seen = command(f"{A14B} " + story(world, {}, {}, {"cut": "picture.png", "end_image": "red.png"}))
    last = seen.requests[-1].known
    assert len(last.leading) == 1 and last.end is not None
    assert torch.allclose(torch.as_tensor(last.end).mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]))


def test_the_prompt_is_the_goal_that_the_captioner_is_given_for_every_clip(command: Callable[..., Seen]) -> None:
    seen = command("--num_videos 3 --prompt_mode continue --prompt the-boat-lands")
    goals = [question for _, question in seen.asked if "the-boat-lands" in question]
    assert {number for number in (1, 2, 3) if any(f"part {number} of 3" in goal for goal in goals)} == {1, 2, 3}


def test_after_a_cut_nothing_of_the_old_shot_is_kept_up(
    command: Callable[..., Seen], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = iter(["boat", "lamp", "never asked"])

    def describe(self: Speaking, frames: Any, question: str, *_: Any, **__: Any) -> str:
        self.seen.asked.append((len(frames), question))
        if question == IDENTITY_QUESTION:
            thing = next(things)
            return json.dumps({"identity": f"One {thing} on a plain table, soft light.", "subject": f"the {thing}"})
        (subject,) = re.findall(r'exactly "(.*?)"', question)
        extra = ["stays in the soft light of the room", "is lit from the left side by the sun"][
            len(self.seen.asked) % 2
        ]
        prompt = f"{subject.capitalize()} {extra}, and a hand comes near to touch it. The camera stays static."
        return json.dumps({"prompt": prompt, "camera": "static", "end_state": f"{subject} is touched"})

    monkeypatch.setattr(Speaking, "describe", describe)
    seen = command("--num_videos 4 --prompt_mode continue " + story(world, {}, {}, {"cut": "red.png"}, {}))
    assert seen.code == 0, seen.output
    questions = [question for _, question in seen.asked]
    assert questions.count(IDENTITY_QUESTION) == 2  # of the first shot and of the second
    later = questions[len(questions) - 1 - questions[::-1].index(IDENTITY_QUESTION) :]
    assert any("lamp" in question for question in later) and not any("boat" in question for question in later)
    remembered = [clip.record["memory"]["subject"].rstrip(".") for clip in seen.clips.values()]
    assert remembered == ["the boat", "the boat", "the lamp", "the lamp"]


def test_clips_after_a_gap_are_not_joined(command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = command("--num_videos 3")
    (third,) = seen.folder.glob("video_03_*.json")
    for file in seen.folder.glob("video_02_*"):
        file.unlink()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wan.continuation.VideoContinuation.extend", interrupted)
    again = command("--num_videos 3")
    assert again.code == 130 and third.exists()
    assert frames_in(again.folder / "joined.mp4") == 9
    run = json.loads((again.folder / "run.json").read_text())
    assert run["status"] == "interrupted" and run["clips_finished"] == 2


# --- LoRAs


def test_after_a_merge_that_failed_the_weights_hold_the_loras_that_are_wanted_next(world: Path) -> None:
    from wan import WanI2V
    from wan.configs import config_for
    from wan.settings import LoraFile

    light = load_file(world / "light_high.safetensors")
    down = sorted(key for key in light if light[key].ndim == 2)[-1]
    save_file(light | {down: light[down] * float("nan")}, world / "nan_high.safetensors")
    models = WanI2V(config_for("i2v-A14B", world / "i2v"), world / "i2v").models
    name = "high_noise_model"

    def weights() -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in models[name].state_dict().items()}

    plain = weights()
    good = {name: (LoraFile(world / "light_high.safetensors"),)}
    models.merge_loras(good)
    merged = weights()
    assert any(not torch.equal(plain[key], merged[key]) for key in plain)
    for wanted, expected in ((good, merged), ({}, plain)):
        models.merge_loras(good)
        with pytest.raises(UserError, match="infinite or NaN"):
            models.merge_loras({name: (LoraFile(world / "nan_high.safetensors", 2.0),)})
        models.merge_loras(wanted)
        again = weights()
        assert all(torch.equal(expected[key], again[key]) for key in expected)
        assert tuple(match.lora for match in models.merged.get(name, [])) == wanted.get(name, ())


def test_each_expert_gets_its_own_loras_when_only_those_of_the_other_stay(world: Path) -> None:
    from wan import WanI2V
    from wan.configs import config_for
    from wan.settings import LoraFile

    models = WanI2V(config_for("i2v-A14B", world / "i2v"), world / "i2v").models
    wanted = {f"{noise}_noise_model": (LoraFile(world / f"light_{noise}.safetensors"),) for noise in ("high", "low")}
    for changed in wanted:
        models.merge_loras(wanted)
        stronger = {changed: (LoraFile(wanted[changed][0].path, 0.5),)}
        models.merge_loras(wanted | stronger)
        for name, files in (wanted | stronger).items():
            assert models[name].loras == files
            assert tuple(match.lora for match in models.merged[name]) == files


# --- files


@pytest.mark.parametrize("write", ["json", "text", "publish", "video", "joined"])
def test_what_gets_its_name_is_on_the_disk_before(write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media.write_video(tmp_path / "clip.mp4", numbered(range(5), 64, 36), 16, keyframes=frozenset({0, 1}))
    synced: dict[int, int] = {}  # inode -> size
    named: list[tuple[int, int]] = []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_size
        fsync(descriptor)

    def naming(part: Any, path: Any) -> None:
        stat = os.stat(part)
        named.append((synced.get(stat.st_ino, -1), stat.st_size))
        replace(part, path)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", naming)
    target = tmp_path / "new.mp4"
    if write == "json":
        write_json(target, {"a": 1})
    elif write == "text":
        write_text(target, "a")
    elif write == "publish":
        (tmp_path / "part").write_bytes(b"abc")
        publish(tmp_path / "part", target)
    elif write == "video":
        media.write_video(target, numbered(range(5), 64, 36), 16)
    else:
        media.join_videos([tmp_path / "clip.mp4"] * 2, target)
    ((before, size),) = named
    assert before == size > 0 and target.stat().st_size == size


@pytest.mark.parametrize("fault", ["fewer pictures", "another size", "no sound"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_video_that_reads_back_otherwise_gets_no_name(
    fault: str, joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media.write_video(tmp_path / "clip.mp4", numbered(range(5), 64, 36), 16, keyframes=frozenset({0, 1}))
    verify = writing._verify

    def verified(path: str, count: int, size: tuple[int, int], sound: float | None = None) -> None:
        wrong = {"fewer pictures": (count + 1, size, sound), "another size": (count, (64, 64), sound)}
        verify(path, *wrong.get(fault, (count, size, 1.0)))

    monkeypatch.setattr(writing, "_verify", verified)
    with pytest.raises(RuntimeError, match="reads back"):
        if joined:
            media.join_videos([tmp_path / "clip.mp4"] * 2, tmp_path / "new.mp4")
        else:
            media.write_video(tmp_path / "new.mp4", numbered(range(5), 64, 36), 16)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_digest_is_of_all_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "source.mp4"
    content = bytearray(3 * 2**20 + 5)
    digests = set()
    for place in (None, 0, 2**20, 2**21 + 7, len(content) - 1):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        file.write_bytes(changed)
        digests.add(file_digest(file))
    assert len(digests) == 5


def test_a_digest_of_weights_is_of_their_size_and_their_beginning_middle_and_end(tmp_path: Path) -> None:
    size, digests = 5 * 2**20, set()
    for number, place in enumerate((None, 0, size // 2, size - 1)):
        file = tmp_path / f"{number}.safetensors"
        with file.open("wb") as opened:
            opened.truncate(size)
            if place is not None:
                opened.seek(place)
                opened.write(b"x")
        digests.add(sampled_digest(file))
    longer = tmp_path / "0.safetensors"  # by a zero more, so that only the size tells
    os.truncate(longer, size + 1)
    assert len(digests | {sampled_digest(longer)}) == 5


def test_a_source_that_differs_only_at_its_end_is_another_video(command: Callable[..., Seen], world: Path) -> None:
    box = b"free"
    source = (world / "source.mp4").read_bytes() + (2**21).to_bytes(4, "big") + box + bytes(2**21 - 8)
    (world / "long.mp4").write_bytes(source)
    assert command("--video long.mp4").code == 0
    (world / "long.mp4").write_bytes(source[:-1] + b"x")
    again = command("--video long.mp4")
    assert again.code == 2 and "another video" in again.output


@pytest.mark.parametrize(
    "part", ["Wan2.1_VAE.pth", "models_t5_*.pth", "high_noise_model/*.safetensors", "low_noise_model/*.safetensors"]
)
def test_every_file_of_weights_tells_one_checkpoint_from_another(
    part: str, command: Callable[..., Seen], world: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(world / "i2v", tmp_path / "checkpoint")
    words = f"--ckpt_dir {checkpoint}"
    assert command(words).code == 0
    file = max(checkpoint.glob(part))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = command(words)
    assert again.code == 2 and "another checkpoint" in again.output


def test_a_free_name_is_looked_for_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain_2").mkdir()
    tried, with_name = list[str](), Path.with_name

    def note(path: Path, name: str) -> Path:
        tried.append(name)
        return with_name(path, name)

    monkeypatch.setattr(Path, "with_name", note)
    assert _free(tmp_path / "chain") == tmp_path / "chain_3"
    assert tried == ["chain", "chain_2", "chain_3"]  # and not a million, as once before every refusal


# --- what is refused, and how


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_nothing_is_the_users_to_put_right(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(_: Any) -> None:
        raise OSError(number, os.strerror(number), "x.mp4")

    assert cli.run(failing, []) == 2
    assert capsys.readouterr().err.endswith("x.mp4; free space or choose another folder\n")


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENOENT, errno.ECONNREFUSED, errno.EPIPE, errno.EACCES, errno.EROFS]
)
def test_another_error_of_the_system_is_not_called_a_full_disk(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(_: Any) -> None:
        raise OSError(number, os.strerror(number), "x.mp4")

    assert cli.run(failing, []) == 2
    error = capsys.readouterr().err
    assert error.endswith("x.mp4; look at the disk, or choose another folder\n") and "free space" not in error


def test_an_endpoint_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        monkeypatch.setattr(endpoint, "SECONDS", 0.2)
        captioner = EndpointCaptioner(url, "m")
        start = time.monotonic()
        socket.setdefaulttimeout(20)  # so that a missing limit fails here, late, and not never
        try:
            with pytest.raises(UserError, match="timed out"):
                captioner.describe(np.zeros((1, 8, 8, 3), np.uint8), "What is it?")
        finally:
            socket.setdefaulttimeout(None)
        assert time.monotonic() - start < 10


def test_an_endpoint_has_minutes_and_no_more() -> None:
    assert 60 <= endpoint.SECONDS <= 600


# --- footage


@pytest.mark.parametrize(
    ("width", "height", "matrix"),
    [(720, 1280, 1), (480, 640, 1), (1280, 720, 1), (1280, 536, 1), (720, 576, 5), (320, 240, 5), (240, 320, 5)],
)
def test_footage_without_tags_has_the_colours_of_its_size_upright_or_not(
    width: int, height: int, matrix: int, tmp_path: Path
) -> None:
    colour = np.full((height, width, 3), (40, 180, 60), np.uint8)  # (34, 190, 60) by the other matrix, or so
    with av.open(str(tmp_path / "untagged.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(colour, "rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
            frame.colorspace = frame.color_primaries = frame.color_trc = 2
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    shown = np.asarray(media.read_last_frame(tmp_path / "untagged.mp4"))
    assert np.abs(shown.astype(int) - colour).max() <= 4


# --- what is told beforehand


@pytest.mark.parametrize("budget", [None, 1250, 1240, 1239, 1200, 1000, 700, 520])
def test_the_memory_that_is_told_is_what_a_placement_takes(budget: int | None) -> None:
    """Ten layers of 90 bytes and 100 bytes more, of which a real placement keeps and brings layers."""
    weights, layer, count, working, beside = 1000, 90, 10, 200, 40
    part = StageMemory(weights, working, layer, count, beside)
    model = Layered(count, layer, weights - count * layer)
    left = None if budget is None else part.weight_budget(budget)
    placed = Placement(torch.device("cpu"), weight_budget=left)
    stay = len(placed._layers_that_stay(model))
    # what stays, two places for what comes, and the rest; what is kept beside the weights is kept where all stay
    taken = weights if stay == count else weights - (count - stay - SLOTS) * layer
    assert part.peak(budget) == taken + working + (beside if stay == count else 0)
    assert budget is None or part.peak(budget) <= budget


class Layered(torch.nn.Module):
    """Layers of so many bytes, and the rest."""

    def __init__(self, count: int, layer: int, rest: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(self._bytes(layer) for _ in range(count))
        self.rest = self._bytes(rest)

    @staticmethod
    def _bytes(count: int) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_buffer("weight", torch.zeros(count, dtype=torch.uint8))
        return module


def test_a_dry_run_tells_the_numbers_of_the_run(command: Callable[..., Seen], world: Path) -> None:
    board = story(world, {}, {"seed": 77, "cut": "red.png", "fade": 2}, {"context": 5}, {"frames": 13})
    dry = command(f"--num_videos 4 {board} --dry_run")
    lines = dry.output.splitlines()
    table = [line.split()[:5] for line in lines[2:6]]
    assert dry.requests == [] and not dry.folder.exists()
    sums, disk = lines[6], lines[7]

    run = command(f"--num_videos 4 {board}")
    start = 0.0
    for row, (number, clip) in zip(table, sorted(run.clips.items()), strict=True):
        frames = frames_in(clip.video)
        new = frames - clip.dropped - (2 if number == 2 else 0)  # which fade in over frames of the clip before
        assert row == [str(number), str(frames), str(new), f"{start:.2f}", str(clip.record["seed"])]
        start += new / 24
    assert sums == f"{start:.2f} s of new video; 4 of 4 clips are still to be made"
    assert abs(frames_in(run.folder / "joined.mp4") / 24 - start) < 0.05
    assert re.fullmatch(r"about \d+ MiB of disk, of which .*; \d+ MiB with --keep_state last", disk)

    finished = command(f"--num_videos 4 {board} --dry_run")
    assert finished.output.splitlines()[6:] == [f"{start:.2f} s of new video; 0 of 4 clips are still to be made"]


def test_a_dry_run_tells_the_disk_that_clips_take(
    command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.chain.dry_run.MP4_BYTES", 0.0)  # how far footage can be compressed is a guess
    words = "--num_videos 5 --frame_num 33 --size 128*64"
    (told,) = re.findall(r"about (\d+) MiB of disk", command(f"{words} --dry_run").output)
    written = sum(clip.state.stat().st_size for clip in command(words).clips.values())
    assert written / 2**20 > 8 and abs(int(told) - written / 2**20) < 1


def test_a_forward_is_the_products_of_all_matrices_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (8, 4, 1, 2, 2), "blocks.0.q.bias": (8,)}
    shapes |= {f"blocks.{number}.q.weight": (8, 8) for number in range(2)}
    continuation: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(experts={"model": SimpleNamespace(shapes=shapes, path="x")}),
        rules=SimpleNamespace(shares=lambda sampling: sampling),
    )
    clip: Any = SimpleNamespace(geometry=SimpleNamespace(tokens=10), candidates=2, sampling=SimpleNamespace(cache=None))
    monkeypatch.setattr("wan.chain.dry_run.forwards", lambda *_: 3)
    products, attention = 2 * (2 * 8 * 8) * 10, 2 * (2 * 2 * 8 * 10 * 10)  # of two blocks
    assert flops(continuation, clip) == 2 * 3 * (products + attention)


def test_sizes_are_in_gib_from_half_of_one_on() -> None:
    assert [size_in_words(size) for size in (2**20, 2**29, 2**29 + 2**25, 2**31)] == [
        "1 MiB",
        "512 MiB",
        "0.5 GiB",
        "2.0 GiB",
    ]


def test_a_dry_run_counts_the_steps_of_every_candidate(
    command: Callable[..., Seen], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.chain.dry_run.H200_FLOPS", 1.0)

    def hours(words: str) -> float:
        (told,) = re.findall(r"about ([\d.]+) h of sampling on one H200", command(f"{words} --dry_run").output)
        return float(told)

    once = hours("--sample_steps 4")
    assert hours("--sample_steps 8") == pytest.approx(2 * once, rel=1e-3)
    assert hours("--sample_steps 4 --best_of 3") == pytest.approx(3 * once, rel=1e-3)
    assert hours("--sample_steps 4 --num_videos 6") == pytest.approx(3 * once, rel=1e-3)
    cut = story(world, {}, {"cut": "red.png"})  # which has no seam to choose by
    assert hours(f"--sample_steps 4 --best_of 3 {cut}") == pytest.approx(2 * once, rel=1e-3)
