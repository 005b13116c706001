"""The commands in several processes, as torchrun starts them, on tiny checkpoints of both families; on a CPU."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ranks as support
from tests.support.golden import ROOT
from tests.support.ranks import Ranks
from wan import cli
from wan.device.budget import CONTEXT, FITTING, MemoryBudget, StageMemory
from wan.device.ranks import Sizes, World, choose_sizes, possible_sizes
from wan.errors import UserError
from wan.settings import Geometry

pytestmark = pytest.mark.slow

FAMILIES = {"5b": ROOT / "models" / "tiny-Wan2.2-TI2V-5B", "14b": ROOT / "models" / "tiny-Wan2.2-I2V-A14B"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def words(family: str, output: Path, *more: str) -> list[str]:
    common = ["--ckpt_dir", str(FAMILIES[family]), "--vlm_path", str(ROOT / "models" / "tiny-InternVL")]
    common += ["--video", str(ROOT / "examples" / "shapes.mp4"), "--base_seed", "3", "--frame_num", "5"]
    return [*common, "--sample_steps", "2", "--sample_guide_scale", "2", "--output_dir", str(output), *more]


def latents(folder: Path) -> list[torch.Tensor]:
    return [load_file(file)["latents"] for file in sorted(folder.glob("video_*.safetensors"))]


def prompts(folder: Path) -> str:
    return (folder / "prompts_log.txt").read_text()


Alone = Callable[..., Path]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The folder of a chain of two clips that one process has made, by family and further flags."""

    @functools.cache
    def made(family: str, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        assert cli.continuous_main(words(family, folder, "--num_videos", "2", *more)) == 0
        return folder

    return made


def run(ranks: Ranks, size: int, given: list[str], folder: Path) -> list[tuple[int, str]]:
    folder.mkdir(exist_ok=True)
    return ranks.run(support.command, size, "continuous_main", given, str(folder))


@pytest.mark.parametrize(
    ("family", "size", "plan", "more"),
    [
        ("5b", 2, "--cfg_size 2, --ulysses_size 1", []),
        ("5b", 2, "--cfg_size 1, --ulysses_size 2", ["--ulysses_size", "2", "--cache", "first_block:0.01"]),
        ("14b", 2, "--cfg_size 2, --ulysses_size 1", ["--dit_fsdp", "--t5_fsdp"]),
        ("14b", 2, "--cfg_size 1, --ulysses_size 2", ["--cfg_size", "1"]),
        ("14b", 4, "--cfg_size 2, --ulysses_size 2", []),
        ("5b", 2, "--cfg_size 1, --ulysses_size 1, --ring_size 2", ["--ring_size", "2"]),
        ("5b", 4, "--cfg_size 1, --ulysses_size 4", ["--ulysses_size", "4"]),
    ],
)
def test_a_chain_of_several_processes_is_that_of_one_and_goes_on_with_another_count(
    family: str, size: int, plan: str, more: list[str], ranks: Ranks, alone: Alone, tmp_path: Path
) -> None:
    together = tmp_path / "together"
    cached = [one for one in more if "cache" in one or "first_block" in one]
    ended = run(ranks, size, words(family, together, "--num_videos", "1", *more), tmp_path / "output")
    assert [code for code, _ in ended] == [0] * size
    assert f"{size} GPUs: {plan}" in ended[0][1] and str(together / "joined.mp4") in ended[0][1]
    assert [text for _, text in ended[1:]] == [""] * (size - 1)
    # the second clip with one process again: none of the first is made again
    made = (together / "video_01_seed3.mp4").stat().st_mtime_ns
    assert cli.continuous_main(words(family, together, "--num_videos", "2", *cached)) == 0
    assert (together / "video_01_seed3.mp4").stat().st_mtime_ns == made
    expected = alone(family, *cached)
    assert prompts(together) == prompts(expected)
    for one, other in zip(latents(expected), latents(together), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_what_is_wrong_is_said_once(ranks: Ranks, tmp_path: Path) -> None:
    run_wrong = words("5b", tmp_path / "out", "--sample_steps", "0")
    pipes, running = ranks.start(support.command, 2, "continuous_main", run_wrong, str(tmp_path))
    try:
        assert pipes[0].poll(60) and pipes[0].recv()[0]
        assert not pipes[1].poll(1)  # it waits for the launcher to end it
    finally:
        for process in running:
            process.kill()
    assert (tmp_path / ".output_0").read_text() == "error: --sample_steps must be at least 1, 0 is not\n"
    assert (tmp_path / ".output_1").read_text() == ""


# --- what goes wrong in one process

FAULTS = [
    (1, "sample", "kill", "process 1 on HOST has died: it was killed, is out of memory, or its machine is gone; what"),
    *(
        pytest.param(*case, marks=pytest.mark.rare)
        for case in (
            (1, "load", "kill", "process 1 on HOST has died"),
            (1, "wait", "kill", "process 1 on HOST has died"),
            (1, "sample", "raise", "process 1 on HOST has failed: ValueError: a bug"),
            (1, "sample", "hang", "process 1 on HOST lets the others wait for more than 3 s (--collective_timeout)"),
            (0, "sample", "kill", ""),
            (0, "write", "kill", ""),
            (0, "sample", "hang", ""),
        )
    ),
]


@pytest.mark.parametrize(("who", "stage", "do", "line"), FAULTS)
def test_a_fault_in_one_process_ends_all_and_the_same_command_goes_on(
    who: int, stage: str, do: str, line: str, ranks: Ranks, alone: Alone, tmp_path: Path
) -> None:
    folder, outputs = tmp_path / "run", tmp_path / "output"
    outputs.mkdir()
    given = words("5b", folder, "--num_videos", "2", "--cfg_size", "2", "--collective_timeout", "3")
    codes = ranks.codes(support.faulty_command, 2, given, str(outputs), who, stage, do, seconds=60)
    assert None not in codes and 0 not in codes
    by_first, by_second = ((outputs / f".output_{rank}").read_text() for rank in (0, 1))
    name = platform.node()
    if who:
        assert f"error: {line.replace('HOST', name)}" in by_first and by_first.count("process 1 on") == 1
        assert "Traceback" not in by_first + by_second
    else:
        assert by_second.count(f"process 0 on {name if do == 'hang' else '127.0.0.1'}") == (do != "hang")
    finished = sorted(folder.glob("video_*.json"))
    times = [file.with_suffix(".mp4").stat().st_mtime_ns for file in finished]
    if stage not in ("load", "wait"):  # it waits for the second clip while the first is decoded
        assert len(finished) == 1
    assert cli.continuous_main(words("5b", folder, "--num_videos", "2")) == 0
    assert [file.with_suffix(".mp4").stat().st_mtime_ns for file in finished] == times
    for one, other in zip(latents(alone("5b")), latents(folder), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.rare
def test_nothing_is_lost_by_twenty_kills_at_random_moments(ranks: Ranks, alone: Alone, tmp_path: Path) -> None:
    draw, kills, chains = random.Random(25), 0, 0
    slowest = 0.0
    while kills < 20:
        folder, chains = tmp_path / f"run_{chains}", chains + 1
        given = words("5b", folder, "--num_videos", "2", "--ulysses_size", "2", "--collective_timeout", "10")
        ended = False
        while not ended:
            before = {file.name: file.read_bytes() for file in folder.glob("video_*.json")}
            killed_at = 0.0

            def kill(pids: list[int]) -> None:
                nonlocal killed_at
                time.sleep(draw.uniform(0.5, 12))
                killed_at = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(pids), signal.SIGKILL)

            codes = ranks.codes(support.command, 2, "continuous_main", given, str(tmp_path), meanwhile=kill)
            # `command` returns its code, so that a process that ended with an error of one line ends with 0, too
            died = -9 in codes
            kills += died
            assert None not in codes
            if died:
                slowest = max(slowest, time.monotonic() - killed_at)
            after = {file.name: file.read_bytes() for file in folder.glob("video_*.json")}
            assert before == {name: after[name] for name in before}
            ended = not died and (folder / "joined.mp4").exists()
        for one, other in zip(latents(alone("5b")), latents(folder), strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()
    assert slowest < 60
    print(f"{kills} kills in {chains} chains; all had ended {slowest:.1f} s after one at the latest")


# --- which sizes


@pytest.mark.parametrize(
    ("ranks", "heads", "guided", "given", "sizes"),
    [
        (1, 40, 1.0, {}, (1, 1)),
        (2, 40, 1.0, {}, (2, 1)),
        (4, 24, 1.0, {}, (2, 2)),
        (8, 40, 1.0, {"ulysses": 8}, (1, 8)),  # as in Wan2.2
        (8, 40, 1.0, {"ulysses": 4}, (2, 4)),
        (6, 24, 1.0, {}, (2, 3)),
        (3, 24, 1.0, {}, (1, 3)),
        (4, 40, 0.0, {}, (1, 4)),  # no guidance
        (4, 40, 0.5, {}, (1, 4)),  # in half of the steps one of two groups would idle
        (5, 40, 1.0, {}, (1, 5)),
        (7, 40, 1.0, {}, (1, 1, 7)),  # heads do not allow more
        (6, 40, 1.0, {}, (2, 1, 3)),
        (12, 40, 1.0, {}, (2, 2, 3)),
        (16, 40, 1.0, {}, (2, 8)),
        (4, 40, 1.0, {"ring": 2}, (2, 1, 2)),
        (4, 40, 1.0, {"ring": 2, "cfg": 1}, (1, 2, 2)),
    ],
)
def test_the_fastest_sizes_are_chosen(
    ranks: int, heads: int, guided: float, given: dict[str, int], sizes: tuple[int, ...]
) -> None:
    possible = possible_sizes(ranks, heads, guided, **given)
    assert choose_sizes(possible, guided) == choose_sizes(possible, guided, 75_600) == Sizes(*sizes)


@pytest.mark.parametrize(
    ("ranks", "guided", "tokens", "sizes"),
    [
        (8, 0.5, 64, (1, 8)),
        (8, 0.5, 9, (2, 4)),  # eight would compute two each
        (4, 0.25, 11, (1, 4)),
        (4, 0.25, 10, (2, 2)),  # the last of four would have one, and two to fill it up
        (4, 0.25, 9, (2, 2)),  # or none
        (4, 0.0, 9, (1, 4)),  # but without guidance there is no other way
        (2, 0.9, 32_760, (1, 2)),
        (2, 0.9, 3, (2, 1)),
    ],
)
def test_tokens_that_have_to_be_filled_up_cost_as_much_as_others(
    ranks: int, guided: float, tokens: int, sizes: tuple[int, ...]
) -> None:
    assert choose_sizes(possible_sizes(ranks, 24, guided), guided, tokens) == Sizes(*sizes)


def test_of_sizes_that_a_gpu_has_the_memory_for_the_fastest_are_chosen() -> None:
    possible = possible_sizes(4, 40, 1.0)
    chosen = choose_sizes(possible, 1.0, fits=lambda sizes: sizes.tokens > 2)
    assert chosen == Sizes(1, 4) and chosen.faster == Sizes(2, 2)
    why = "; a GPU has too little memory for `cfg_size` 2, `ulysses_size` 2, which is faster"
    assert str(chosen) == f"`cfg_size` 1, `ulysses_size` 4{why}"
    assert str(choose_sizes(possible, 1.0, fits=lambda sizes: sizes.ring == 1)) == "`cfg_size` 2, `ulysses_size` 2"
    none = choose_sizes(possible, 1.0, fits=lambda _: False)  # those that need the least
    assert none == Sizes(1, 4) and str(none).endswith(why)


def test_sizes_that_do_not_go_are_refused_with_those_that_do() -> None:
    with pytest.raises(UserError) as caught:
        possible_sizes(4, 40, 1.0, ulysses=3)
    message = (
        "ulysses_size 3 does not go with 4 GPUs and 40 heads; what goes: cfg_size 1, ulysses_size 1, ring_size 4; "
    )
    message += "cfg_size 1, ulysses_size 2, ring_size 2; cfg_size 1, ulysses_size 4; cfg_size 2, ulysses_size 1, "
    assert str(caught.value) == message + "ring_size 2; cfg_size 2, ulysses_size 2"
    with pytest.raises(UserError, match="cfg_size 2 does not go with 2 GPUs and 40 heads, without guidance"):
        possible_sizes(2, 40, 0.0, cfg=2)


def test_a_launcher_s_environment_is_read() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert World.read(environment) == World(1, 2, 1) and World.read({}) == World() and World.read({"RANK": ""}).is_first
    assert World.read(environment).local_size == 0
    assert World.read(environment | {"LOCAL_WORLD_SIZE": "2"}).local_size == 2
    with pytest.raises(UserError, match="WORLD_SIZE is 2 without MASTER_PORT: start the command with torchrun"):
        World.read(environment | {"MASTER_PORT": ""})
    with pytest.raises(UserError, match="RANK='one' is no number"):
        World.read({"RANK": "one"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--ulysses_size", "2"],
            "--ulysses_size 2 needs 2 processes: start the command with torchrun --nproc_per_node=2",
        ),
        (["--dit_fsdp"], "--dit_fsdp: weights are shared among GPUs; start the command with torchrun"),
    ],
)
def test_one_process_is_told_how_to_start_several(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.continuous_main(words("5b", tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_tells_the_sizes_without_other_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--dry_run", "--ulysses_size", "2", "--cfg_size", "2"]
    assert cli.continuous_main(words("5b", tmp_path, *more)) == 0
    assert "4 GPUs: --cfg_size 2, --ulysses_size 2" in capsys.readouterr().out


@pytest.mark.parametrize("room", [1.5, 0.5, -0.5])
def test_a_dry_run_says_where_memory_has_chosen(
    room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2), ("MASTER_ADDR", "x"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    small = StageMemory(0, 0)  # tiny VAEs take more than tiny denoisers
    monkeypatch.setattr("wan.device.budget.vae_memory", lambda *_: (small, small))

    def with_a_gpu(*given: Any) -> MemoryBudget:
        budget = MemoryBudget(*given)
        geometry = Geometry(1001, 96, 160, budget.config.vae_stride, budget.config.patch_size)
        shared, whole = (replace(budget, token_ranks=count).gpu_bytes(geometry, False) for count in (2, 1))
        return replace(budget, free=int(CONTEXT + (shared + room * (whole - shared)) / FITTING))

    monkeypatch.setattr("wan.pipeline.MemoryBudget", with_a_gpu)
    given = words("5b", tmp_path, "--dry_run", "--prompt", "a ball", "--frame_num", "1001", "--num_videos", "1")
    assert cli.continuous_main(given) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "GPUs" in line]
    why = "; a GPU has too little memory for --cfg_size 2, --ulysses_size 1, which is faster"
    chosen = "--cfg_size 2, --ulysses_size 1" if room > 1 else "--cfg_size 1, --ulysses_size 2" + why
    assert line == f"2 GPUs: {chosen}"
