"""Every command and program of the README runs, with tiny checkpoints in the place of the released ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from examples.make_tiny_checkpoint import write_all
from wan import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.startswith("python ")]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
# The released sizes would take hours here; a second GPU is not there.
SMALLER = {"704*1280": "96*160", "1280*704": "160*96", "cuda:1": "cpu", "--num_videos 12": "--num_videos 2"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the README's reader's."""
    folder = tmp_path_factory.mktemp("reader")
    write_all(folder)
    for name in ("Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B"):
        (folder / f"tiny-{name}").rename(folder / name)
        declaration = folder / name / "wan_config.json"
        declaration.write_text(json.dumps(json.loads(declaration.read_text()) | {"frame_num": 5, "sample_steps": 2}))
    (folder / "tiny-InternVL").rename(folder / "InternVL3_5-8B")
    (folder / "input.mp4").symlink_to(ROOT / "examples" / "ball.mp4")
    (folder / "first.png").symlink_to(ROOT / "tests" / "data" / "golden" / "14b" / "image.png")
    return folder


def smaller(text: str) -> str:
    for released, tiny in SMALLER.items():
        text = text.replace(released, tiny)
    return text


def test_the_readme_shows_what_it_should() -> None:
    assert len(COMMANDS) >= 7 and len(PROGRAMS) == 1
    assert all(name in README for name in ("make demo", "make test", "docs/demo.png"))
    assert (ROOT / "docs" / "demo.png").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    _, script, *flags = shlex.split(smaller(command))
    main = {"generate.py": cli.generate_main, "generate_continuous.py": cli.continuous_main}[script]
    before = set(world.rglob("*.mp4"))
    if script == "generate_continuous.py":
        flags += ["--frame_num", "5"]
    assert main(flags) == 0
    assert set(world.rglob("*.mp4")) - before


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    # a script says for itself that a folder's declaration counts
    program = program.replace('WAN_CONFIGS["v2v-14B"], ', 'config_for("v2v-14B", "./Wan2.2-I2V-A14B"), ')
    exec(f"from wan.configs import config_for\n{program}", {})
    assert (world / "next.mp4").is_file()


def test_every_flag_of_the_readme_exists_and_every_flag_is_in_the_readme() -> None:
    from wan.flags import continuous_flags, generate_flags

    known = {name for parser in (generate_flags(), continuous_flags()) for name in parser._option_string_actions}
    known -= {"-h", "--help"}
    others = {"--local-dir", "--scenario", "--stock"}
    mentioned = set(re.findall(r"--[A-Za-z_0-9]+(?:-[a-z]+)*", README)) - others
    assert mentioned - known == set()
    assert known - mentioned == set()
