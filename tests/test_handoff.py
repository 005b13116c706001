"""A program between two clips: what it gets, what of its work is known, and how it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support.commands import Seen
from wan.chain.draft import ClipDraft
from wan.errors import UserError
from wan.handoff import arguments, check_program, hand_off
from wan.options import OPTIONS, Settings
from wan.prompting import ClipPrompt
from wan.types import Sampled

PYTHON = sys.executable
FRAMES = torch.rand(5, 6, 8, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1


def program(tmp_path: Path, code: str) -> str:
    """A command whose program runs this code, with `home` for the folder and `paths` for its pictures."""
    (tmp_path / "program.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom PIL import Image\n"
        f"home = Path(sys.argv[1])\npaths = sorted(home.glob('*.png'))\n{code}\n"
    )
    return f"{PYTHON} {tmp_path / 'program.py'} {{frames}}"


def test_what_a_program_changes_is_known_and_the_rest_stays_unrounded(tmp_path: Path) -> None:
    frames = hand_off(program(tmp_path, "Image.new('RGB', Image.open(paths[4]).size, 'red').save(paths[4])"), FRAMES)
    assert torch.equal(frames[:4], FRAMES[:4])
    assert torch.equal(frames[4], torch.tensor([1.0, -1.0, -1.0]).expand(6, 8, 3))
    assert torch.equal(hand_off(program(tmp_path, "print('nothing')"), FRAMES), FRAMES)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("print('a')\nsys.exit('no model')", "failed with exit code 1: no model"),
        ("sys.exit(3)", "failed with exit code 3, and said nothing"),
        ("paths[2].unlink()", "left no picture 002.png"),
        ("paths[2].write_text('x')", "left no picture 002.png"),
        ("Image.new('RGB', (4, 6)).save(paths[0])", "changed the size of 000.png from 8x6 to 4x6"),
    ],
)
def test_a_program_that_fails_is_said_with_its_last_line(code: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        hand_off(program(tmp_path, code), FRAMES)


def test_no_shell_reads_the_command_and_the_folder_is_one_argument() -> None:
    assert arguments("a 'b c' --dir={frames};rm", "/t m p/$(x)", windows=False) == ["a", "b c", "--dir=/t m p/$(x);rm"]
    # as Windows programs read it, with its backslashes
    assert arguments(r"C:\tools\fix.exe {frames}", r"C:\te mp\x", windows=True) == r'C:\tools\fix.exe "C:\te mp\x"'


@pytest.mark.parametrize("folder", [r"C:\temp\x", r"C:\te mp\wan x"])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fix.exe {frames}", ["fix.exe", "FOLDER"]),
        ('fix.exe "{frames}"', ["fix.exe", "FOLDER"]),
        (
            r'"C:\my tools\fix.exe" --in={frames}\000.png {frames}',
            [r"C:\my tools\fix.exe", r"--in=FOLDER\000.png", "FOLDER"],
        ),
        (r'fix.exe "--in={frames}" -x', ["fix.exe", "--in=FOLDER", "-x"]),
        (r"fix.exe \"{frames} b", ["fix.exe", '"FOLDER', "b"]),
        (r'fix.exe "a b\\" {frames}', ["fix.exe", "a b\\", "FOLDER"]),
    ],
)
def test_a_windows_program_gets_the_folder_in_one_piece(command: str, words: list[str], folder: str) -> None:
    line = arguments(command, folder, windows=True)
    assert isinstance(line, str)
    assert taken_apart(line) == [word.replace("FOLDER", folder) for word in words]


def taken_apart(line: str) -> list[str]:
    """A command line as Microsoft's C library takes it apart, which is what `subprocess.list2cmdline` writes for."""
    words, word, quoted = list[str](), "", False
    for backslashes, mark in re.findall(r"(\\*)([^\\]|$)", line):
        if mark == '"':
            word += "\\" * (len(backslashes) // 2)
            if len(backslashes) % 2:
                word += '"'
            else:
                quoted = not quoted
        elif mark in ("", " ") and not quoted:
            words, word = [*words, word + backslashes] if word + backslashes else words, ""
        else:
            word += backslashes + mark
    return words


def test_a_command_is_refused_before_hours_of_work_and_is_no_client_s_to_choose() -> None:
    with pytest.raises(UserError, match="no program 'nowhere-to-be-found'"):
        check_program("nowhere-to-be-found {frames}")
    for wrong, problem in (
        ("restore.sh", "must hold {frames}"),
        ("x 'y {frames}", "taken apart"),
        ("{frames}", "begin"),
    ):
        with pytest.raises(UserError, match=problem):
            Settings(handoff_command=wrong)
    assert OPTIONS["handoff_command"].setters == {"command line"}
    # what it is told may be secret
    assert OPTIONS["handoff_command"].kind.public(f"{os.sep}opt{os.sep}fix --key abc {{frames}}") == "fix {frames}"


def test_a_run_keeps_what_a_program_left_and_knows_when_it_is_another(
    command: Callable[..., Seen], world: Path, tmp_path: Path
) -> None:
    shutil.copy(world / "paint.py", world / "mine.py")
    words = f"--continuation tail --frame_num 13 --handoff_command '{PYTHON} mine.py {{frames}}'"
    seen = command(words)
    assert seen.code == 0, seen.output
    for request, clip in zip(seen.requests, seen.clips.values(), strict=True):
        leading: Any = request.known.leading
        known = torch.stack([frame.permute(1, 2, 0) for frame in leading])
        assert len(known) == 5 and torch.allclose(known.mean((0, 1, 2)), torch.tensor([1.0, -1.0, -1.0]))
        with safe_open(clip.state, framework="pt") as opened:
            assert torch.equal(opened.get_tensor("handed"), known)
    told = json.loads((seen.folder / "run.json").read_text())["arguments"]["handoff_command"]
    assert told == f"{Path(PYTHON).name} {{frames}}"
    again = command(words)
    assert (again.code, again.requests) == (0, [])
    (world / "mine.py").write_text("import sys\nsys.exit('the disk is full')\n")
    changed = command(f"{words} --yes")
    assert changed.code == 2 and "--handoff_command failed with exit code 1: the disk is full" in changed.stderr


def test_a_draft_keeps_what_a_program_left_with_the_latents_that_began_with_it(tmp_path: Path) -> None:
    draft = ClipDraft(tmp_path, 2, {"steps": 4})
    assert draft.handed is None
    latents = torch.rand(4, 3, 2, 2)
    draft.keep(7, Sampled(latents), ClipPrompt("it goes on"), FRAMES)
    again = ClipDraft(tmp_path, 2, {"steps": 4})
    sampled = again.find(7)
    assert sampled is not None and torch.equal(sampled.latents, latents)
    assert again.handed is not None and torch.equal(again.handed, FRAMES)
    (path,) = tmp_path.glob(".draft_2_*")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert again.find(7) is None and again.handed is None
