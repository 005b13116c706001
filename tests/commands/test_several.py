"""The commands in several processes, as torchrun starts them, on tiny checkpoints of both families; on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ranks as support
from tests.support.golden import ROOT
from tests.support.ranks import Ranks
from wan import cli
from wan.device.ranks import Sizes, World, choose_sizes
from wan.errors import UserError

FAMILIES = {"5b": ROOT / "models" / "tiny-Wan2.2-TI2V-5B", "14b": ROOT / "models" / "tiny-Wan2.2-I2V-A14B"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as found:
        yield found


def words(family: str, output: Path, *more: str) -> list[str]:
    common = ["--ckpt_dir", str(FAMILIES[family]), "--vlm_path", str(ROOT / "models" / "tiny-InternVL")]
    common += ["--video", str(ROOT / "examples" / "shapes.mp4"), "--base_seed", "3", "--frame_num", "5"]
    return [*common, "--sample_steps", "2", "--sample_guide_scale", "2", "--output_dir", str(output), *more]


def latents(folder: Path) -> list[torch.Tensor]:
    return [load_file(file)["latents"] for file in sorted(folder.glob("video_*.safetensors"))]


def prompts(folder: Path) -> str:
    return (folder / "prompts_log.txt").read_text()


def run(ranks: Ranks, size: int, given: list[str], folder: Path) -> list[tuple[int, str]]:
    folder.mkdir(exist_ok=True)
    return ranks.run(support.command, size, "continuous_main", given, str(folder))


@pytest.mark.parametrize(
    ("family", "size", "plan", "more"),
    [
        ("5b", 2, "--cfg_size 2, --ulysses_size 1", []),
        ("5b", 2, "--cfg_size 1, --ulysses_size 2", ["--ulysses_size", "2", "--cache", "first_block:0.01"]),
        pytest.param("14b", 2, "--cfg_size 1, --ulysses_size 2", ["--cfg_size", "1"], marks=pytest.mark.slow),
        pytest.param("14b", 4, "--cfg_size 2, --ulysses_size 2", [], marks=pytest.mark.slow),
        pytest.param("5b", 4, "--cfg_size 1, --ulysses_size 4", ["--ulysses_size", "4"], marks=pytest.mark.slow),
    ],
)
def test_a_chain_of_several_processes_is_that_of_one_and_goes_on_with_another_count(
    family: str, size: int, plan: str, more: list[str], ranks: Ranks, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    cached = more[more.index("--cache") :] if "--cache" in more else []
    assert cli.continuous_main(words(family, alone, "--num_videos", "2", *cached)) == 0
    said = run(ranks, size, words(family, together, "--num_videos", "1", *more), tmp_path / "said")
    assert [code for code, _ in said] == [0] * size
    assert f"{size} GPUs: {plan}" in said[0][1] and str(together / "joined.mp4") in said[0][1]
    assert [text for _, text in said[1:]] == [""] * (size - 1)
    # the second clip with one process again: none of the first is made again
    made = (together / "video_01_seed3.mp4").stat().st_mtime_ns
    assert cli.continuous_main(words(family, together, "--num_videos", "2", *cached)) == 0
    assert (together / "video_01_seed3.mp4").stat().st_mtime_ns == made
    assert prompts(together) == prompts(alone)
    for one, other in zip(latents(alone), latents(together), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_what_is_wrong_is_said_once(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="process 1 of 2 is not done"):  # it waits for the launcher to end it
        run_wrong = words("5b", tmp_path / "out", "--sample_steps", "0")
        ranks.run(support.command, 2, "continuous_main", run_wrong, str(tmp_path), seconds=8)
    assert (tmp_path / ".said_0").read_text() == "error: --sample_steps must be at least 1, 0 is not\n"
    assert (tmp_path / ".said_1").read_text() == ""


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
    ],
)
def test_the_fastest_sizes_are_chosen(
    ranks: int, heads: int, guided: float, given: dict[str, int], sizes: tuple[int, int]
) -> None:
    assert choose_sizes(ranks, heads, guided, **given) == Sizes(*sizes)


def test_sizes_that_do_not_go_are_refused_with_those_that_do() -> None:
    with pytest.raises(UserError) as caught:
        choose_sizes(4, 40, 1.0, ulysses=3)
    said = "ulysses_size 3 does not go with 4 GPUs and 40 heads; what goes: cfg_size 1, ulysses_size 4; "
    assert str(caught.value) == said + "cfg_size 2, ulysses_size 2"
    with pytest.raises(UserError, match="cfg_size 2 does not go with 2 GPUs and 40 heads, without guidance"):
        choose_sizes(2, 40, 0.0, cfg=2)
    with pytest.raises(UserError, match="7 GPUs cannot share a clip of a model with 40 heads; give it 2, 4, 5, 8, 10"):
        choose_sizes(7, 40, 1.0)


def test_a_launcher_s_environment_is_read() -> None:
    there = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert World.read(there) == World(1, 2, 1) and World.read({}) == World() and World.read({"RANK": ""}).is_first
    with pytest.raises(UserError, match="WORLD_SIZE is 2 without MASTER_PORT: start the command with torchrun"):
        World.read(there | {"MASTER_PORT": ""})
    with pytest.raises(UserError, match="RANK='one' is no number"):
        World.read({"RANK": "one"})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--ulysses_size", "2"],
            "--ulysses_size 2 needs 2 processes: start the command with torchrun --nproc_per_node=2",
        ),
        (["--dit_fsdp"], "--dit_fsdp: sharded weights are not supported yet"),
    ],
)
def test_one_process_is_told_how_to_start_several(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.continuous_main(words("5b", tmp_path, *more)) == 2
    assert said in capsys.readouterr().err


def test_a_dry_run_tells_the_sizes_without_other_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--dry_run", "--ulysses_size", "2", "--cfg_size", "2"]
    assert cli.continuous_main(words("5b", tmp_path, *more)) == 0
    assert "4 GPUs: --cfg_size 2, --ulysses_size 2" in capsys.readouterr().out
