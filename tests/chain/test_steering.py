"""A chain that says what differs before it makes finished clips again, and that can be led while it runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Seen, frames_in
from wan import Chain, Settings, cli
from wan.chain.changes import Change, find_change, in_words, other_run
from wan.chain.fingerprint import difference
from wan.chain.finished_clip import prune
from wan.chain.run import ChainRun
from wan.chain.run_folder import RunFolder
from wan.chain.storyboard import Scene, ahead, said_otherwise
from wan.chain.storyboard_file import read_storyboard
from wan.errors import UserError
from wan.pipeline import Pipeline
from wan.types import Step

pytestmark = pytest.mark.slow

Command = Callable[..., Seen]


def board(path: Path, *clips: Any) -> str:
    path.write_text(json.dumps(clips), encoding="utf-8")
    return f"--storyboard {path}"


def prompts(folder: Path) -> list[str]:
    return [json.loads(file.read_text())["prompt"].split()[-1] for file in sorted(folder.glob("video_*.json"))]


def stamps(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("video_*.safetensors"))}


def during(monkeypatch: pytest.MonkeyPatch, do: Mapping[int, Callable[[], object]]) -> list[str]:
    """Do something while clip N of the next command is made; returns the prompts that were made."""
    sampled, made = Pipeline.run, list[str]()

    def run(self: Any, request: Any, **options: Any) -> Any:
        made.append(request.prompt.split()[-1])
        do.get(len(made), lambda: None)()
        return sampled(self, request, **options)

    monkeypatch.setattr(Pipeline, "run", run)
    return made


# What differs


def test_changes_are_said_clip_by_clip_with_their_reasons() -> None:
    old = {"prompt": "a", "steps": 40, "parent": "x", "end_image": "1"}
    second = find_change(2, old, old | {"prompt": "b"}, None)
    third = find_change(3, old, old | {"parent": "y"}, second)
    fourth = find_change(4, old, old | {"parent": "z", "steps": 30}, third)
    fifth = find_change(5, old, old | {"parent": "z"}, None)
    assert in_words([second, third]) == ["clip 2: its prompt changed", "clip 3 continues clip 2"]
    assert in_words([fourth, fifth]) == ["clip 4: `sample_steps` 40, now 30", "clip 5 continues clip 4"]
    assert (
        in_words([second, *(Change(number, (), 2) for number in range(3, 13))])[1] == "clips 3 to 12 follow from clip 2"
    )
    assert in_words([find_change(1, old, old | {"end_image": "2"}, None)]) == [
        "clip 1: `until` or `end_image` or `end_images` changed"
    ]


def test_another_source_task_checkpoint_or_size_is_another_run() -> None:
    old = {"task": "v2v-5B", "checkpoint": "c", "width": 64, "height": 32, "parent": "x"}
    assert other_run(old, old | {"parent": "y"}, first=True) == "another video or another `from_`"
    assert other_run(old, old | {"parent": "y"}, first=False) is None
    assert other_run(old, old | {"parent": None}, first=True) is None  # a cut now
    assert other_run(old, old | {"checkpoint": "d"}, first=False) == "another checkpoint"
    assert other_run(old, old | {"height": 64}, first=False) == "another size (64x32, now 64x64)"
    assert other_run(old, old | {"task": "v2v-14B"}, first=False) == "`task` 'v2v-5B', now 'v2v-14B'"


def test_a_run_that_would_make_finished_clips_again_asks(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story, count = tmp_path / "story.json", "--num_videos 4"
    assert command(f"{count} {board(story, 'one', 'two', 'three', 'four')}").code == 0
    before = stamps(tmp_path / "out")
    seen = command(f"{count} {board(story, 'one', 'changed', 'three', 'four')}")
    assert seen.code == 2 and stamps(tmp_path / "out") == before
    assert "3 finished clips of" in seen.stderr and "give --yes" in seen.stderr and "redo" not in seen.stderr
    assert "(clip 2: its prompt changed; clips 3 to 4 follow from clip 2)" in seen.stderr
    assert "clip 2: its prompt changed" in command(f"{count} --storyboard {story} --dry_run").output
    monkeypatch.setattr("wan.commands.continuous.on_terminal", lambda: True)
    answers = iter(["n", "y"])
    monkeypatch.setattr("wan.commands.steering.ask", lambda question: next(answers))
    seen = command(f"{count} --storyboard {story}")
    assert seen.code == 2 and "nothing was made" in seen.stderr and stamps(tmp_path / "out") == before
    made = during(monkeypatch, {2: lambda: os.kill(os.getpid(), signal.SIGINT)})
    assert command(f"{count} --storyboard {story}").code == 130
    # it was agreed to: the run that goes on does not ask again
    monkeypatch.setattr("wan.commands.continuous.on_terminal", lambda: False)
    assert command(f"{count} --storyboard {story}").code == 0
    assert made == ["changed", "three", "three", "four"]
    # one clip alone is made again without a question, and says why
    seen = command(f"{count} {board(story, 'one', 'changed', 'three', 'last')}")
    assert seen.code == 0 and "clip 4: its prompt changed\n" in seen.stderr and len(made) == 5


def test_a_setting_that_was_not_there_is_said_so() -> None:
    assert difference("best_of", None, 3) == "`best_of` or `takes` not set, now 3"
    assert difference("steps", 4, 6) == "`sample_steps` 4, now 6"


def test_another_video_is_offered_a_folder_of_its_own(command: Command, tmp_path: Path) -> None:
    assert command("").code == 0
    seen = command("--video other.mp4")
    assert seen.code == 2 and "redo" not in seen.stderr
    assert f"the same command with --output_dir {tmp_path / 'out_other'} makes this one" in seen.stderr
    (tmp_path / "out_other").mkdir()
    assert f"--output_dir {tmp_path / 'out_other_2'} " in command("--video other.mp4").stderr


# The storyboard


def test_what_comes_ahead_is_found_by_name_or_by_number() -> None:
    a, b, c, x = (Scene(0, {"name": name, "prompt": name}) for name in "abcx")
    assert ahead((a, b, c), (a, x, b, c), 2) == (a, b, c)  # x lies behind
    assert ahead((a, b, c), (b, x, c), 2) == (a, b, x, c)
    one, two, three = (Scene(0, {"prompt": text}) for text in ("1", "2", "3"))
    assert ahead((one, two), (three, three, three), 1) == (one, three, three)
    assert ahead((), (one, two), 1) == (Scene(0), two)
    assert said_otherwise((one, a), (one, b, c)) == {2: ["name", "prompt"], 3: ["name", "prompt"]}


def test_a_name_is_there_once_and_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text("- {name: fog}\n- {name: fog}\n")
    with pytest.raises(UserError, match="line 2: name 'fog' is there twice, here and in line 1"):
        read_storyboard(tmp_path / "story.yaml")
    (tmp_path / "story.yaml").write_text("- {name: '7'}\n")
    with pytest.raises(UserError, match="name must not be a number"):
        read_storyboard(tmp_path / "story.yaml")


def test_the_storyboard_is_read_again_before_each_clip(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = tmp_path / "story.json"
    words = "--num_videos 4 " + board(story, "one", "two", "three", "four")
    made = during(
        monkeypatch,
        {
            1: lambda: board(story, "late", "two", "other", "four"),
            2: lambda: story.write_text('["late", "two", '),  # half of it is saved
            3: lambda: board(story, "late", "two", "other", "end"),
        },
    )
    seen = command(words)
    assert seen.code == 0 and made == ["one", "two", "other", "end"] == prompts(tmp_path / "out")
    assert "the storyboard has changed: clip 1 (prompt), clip 3 (prompt)" in seen.stderr
    assert "clips up to 1 are made already" in seen.stderr and "is not JSON" in seen.stderr
    assert "the storyboard has changed: clip 4 (prompt)" in seen.stderr
    # clip 1 is what the next run is about
    assert (
        "clip 1: its prompt changed; clips 2 to 4 follow" in command("--num_videos 4 --storyboard " + str(story)).stderr
    )


def test_a_storyboard_that_would_undo_finished_clips_waits_for_the_next_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = tmp_path / "story.json"
    assert command("--num_videos 4 " + board(story, "one", "two", "three", "four")).code == 0
    for number in (1, 2):
        next((tmp_path / "out").glob(f"video_0{number}*.mp4")).unlink()
    before = stamps(tmp_path / "out")
    board(story, "one", "two", "three", "four", "five")
    made = during(monkeypatch, {1: lambda: board(story, "one", "two", "changed", "four", "five")})
    seen = command(f"--num_videos 5 --storyboard {story}")
    assert seen.code == 0 and made == ["one", "two", "five"]
    assert "that waits for the next run" in seen.stderr
    after = stamps(tmp_path / "out")
    kept = {name: data for name, data in before.items() if name.startswith(("video_03", "video_04"))}
    assert len(kept) == 2 and {name: after[name] for name in kept} == kept


def test_clips_with_names_are_inserted_dropped_and_moved(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story, out = tmp_path / "story.json", tmp_path / "out"
    fog = {"name": "fog", "prompt": "fog"}
    night = {"name": "night", "prompt": "night", "cut": "red.png"}
    end = {"name": "end", "prompt": "end"}
    made = during(monkeypatch, {})
    (tmp_path / "red.png").write_bytes(Path("red.png").read_bytes())
    assert command("--num_videos 3 " + board(story, fog, night, end)).code == 0
    states = stamps(out)
    seen = command("--num_videos 4 " + board(story, fog, "new", night, end))
    assert seen.code == 0 and made == ["fog", "night", "end", "new"]
    assert prompts(out) == ["fog", "new", "night", "end"] and not list((out / "redone").glob("video_*"))
    assert set(states.values()) < set(stamps(out).values())  # they only have other numbers
    # the shot comes first now, the fog follows from something else
    seen = command("--num_videos 3 " + board(story, night, end, fog))
    assert seen.code == 0 and made[4:] == ["fog"] and prompts(out)[:3] == ["night", "end", "fog"]
    # and back: nothing is made, all of it lies in the folder
    seen = command("--num_videos 4 " + board(story, fog, "new", night, end))
    assert seen.code == 0 and len(made) == 5 and prompts(out) == ["fog", "new", "night", "end"]
    assert "clip 1 is there already: it is redone/video_01" in seen.stderr
    assert "changed" not in seen.stderr


def test_a_damaged_clip_that_was_replaced_is_not_used(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story, out = tmp_path / "story.json", tmp_path / "out"
    for clips in (("one", "two"), ("one", "other")):
        assert command(board(story, *clips)).code == 0
    old = next((out / "redone").glob("video_02*.safetensors"))
    old.write_bytes(old.read_bytes()[:-1] + b"x")
    made = during(monkeypatch, {})
    assert command(board(story, "one", "two")).code == 0
    assert made == ["two"] and prompts(out) == ["one", "two"]


def test_prompts_for_some_clips(command: Command) -> None:
    seen = command("--num_videos 3 --prompt on --prompt_for 2 turn --prompt_for 3 stop")
    assert [one.prompt.split()[-1] for one in seen.requests] == ["on", "turn", "stop"]
    for words, message in (
        ("--prompt_for 5 x", "--prompt_for 5 is beyond --num_videos 2"),
        ("--prompt_for x y", "--prompt_for must be a whole number, 'x' is not"),
        ("--prompt_for 0 y", "--prompt_for must be at least 1, 0 is not"),
        ("--prompt_for 1 x --prompt_for 1 y", "--prompt_for 1 is there twice"),
        ("--prompt_for 1 x --storyboard story.yaml", "for a chain without --storyboard"),
    ):
        seen = command(words)
        assert seen.code == 2 and message in seen.stderr


# Stop, pause, review


def test_files_and_a_signal_stop_a_run_after_the_clip(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    made = during(monkeypatch, {1: (out / "stop").touch, 2: lambda: os.kill(os.getpid(), signal.SIGUSR1)})
    for done in (1, 2, 3):
        seen = command("--num_videos 3 --prompt on")
        assert seen.code == 0 and len(made) == len(prompts(out)) == done
        assert seen.output.endswith("joined.mp4\n") and not (out / "stop").exists()
        assert (f"{done} of 3 clips are finished" in seen.stderr) == (done < 3)
    (out / "stop").touch()
    seen = command("--num_videos 4 --prompt on")
    assert seen.code == 2 and f"{out / 'stop'} asks a run to stop; remove it" in seen.stderr


def test_a_run_waits_while_it_is_paused(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.commands.steering._LOOK", 0.01)
    pause = tmp_path / "out" / "pause"

    def remove() -> None:
        assert len(made) == 1
        pause.unlink()

    timer = threading.Timer(0.5, remove)

    def ask() -> None:
        pause.touch()
        timer.start()

    made = during(monkeypatch, {1: ask})
    seen = command("--prompt on")
    timer.join()
    assert seen.code == 0 and len(made) == 2
    assert f"paused; remove {pause} to go on" in seen.stderr and "going on" in seen.stderr


def test_a_review_keeps_makes_again_edits_and_stops(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "which needs a terminal" in command("--review").stderr
    monkeypatch.setattr("wan.commands.continuous.on_terminal", lambda: True)
    answers = iter(["maybe", "again", "y", "e", "the ship turns", "s"])
    monkeypatch.setattr("wan.commands.steering.ask", lambda question: next(answers))
    monkeypatch.setattr("wan.commands.continuous.ask", lambda question: next(answers))
    made = during(monkeypatch, {})
    seen = command("--num_videos 4 --prompt on --review")
    assert seen.code == 0 and made == ["on", "on", "on", "turns"]
    seeds = [one.seed for one in seen.requests]
    assert seeds[0] == 3 and seeds[1] != 3 and seeds[2:] == [4, 4]
    assert prompts(out) == ["on", "turns"] and list(answers) == []
    # what was decided stays, and a run without a review goes on from it
    assert command("--num_videos 4 --prompt on").code == 0
    assert made[4:] == ["on", "on"] and prompts(out) == ["on", "turns", "on", "on"]


# Takes


def test_takes_are_kept_and_chosen(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, words = tmp_path / "out", "--num_videos 3 --prompt on --takes 2 --no_video_metadata"
    seen = command(words)
    assert seen.code == 0 and [one.seed for one in seen.requests] == [3, 1000003, 4, 1000004, 5, 1000005]
    assert sorted(path.name for path in (out / "takes" / "02").glob("*.mp4")) == [
        "take_1_seed4.mp4",
        "take_2_seed1000004.mp4",
    ]
    assert "clip 2/3 take 2, seam " in seen.stderr
    best = json.loads(next(out.glob("video_02*.json")).read_text())["seed"]
    before, made = stamps(out), during(monkeypatch, {})
    other, same = (2, 1) if best == 4 else (1, 2)
    assert command(f"{words} --take 2={same}").code == 0 and made == []  # it was that one
    assert "clip 3 continues clip 2" in command(f"{words} --take 2={other} --dry_run").output
    seen = command(f"{words} --take 2={other}")
    assert seen.code == 0 and len(made) == 2  # two takes of the clip that follows, none of the one that was chosen
    assert f"clip 2 is there already: it is takes/02/take_{other}_seed" in seen.stderr
    chosen = json.loads(next(out.glob("video_02*.json")).read_text())
    assert chosen["seed"] == {1: 4, 2: 1000004}[other]
    assert command(words).code == 0 and len(made) == 2  # the choice stays
    # and back: nothing is made, nothing is lost
    assert command(f"{words} --take 2={same}").code == 0 and len(made) == 2
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    for wrong, message in (("--take 2=3", "--take 2=3: the clip has 2"), ("--take 4=1", "--take 4=1 is beyond")):
        seen = command(f"{words} {wrong}")
        assert seen.code == 2 and message in seen.stderr
    assert "--take must be K=N" in command("--take 2").stderr
    assert "give one of them" in command("--takes 2 --best_of 2").stderr


def test_a_storyboard_asks_for_takes_of_one_clip(command: Command, tmp_path: Path) -> None:
    story = board(tmp_path / "story.json", "one", {"prompt": "two", "takes": 3})
    seen = command(story)
    assert [one.seed for one in seen.requests] == [3, 4, 1000004, 2000004]
    assert [path.name for path in (tmp_path / "out" / "takes").iterdir()] == ["02"]


# The joined video


def test_with_its_source_the_joined_video_is_renewed_after_each_clip(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, joined = list[int](), tmp_path / "out" / "joined.mp4"
    renew = ChainRun._renew_joined

    def counted(self: ChainRun) -> Path | None:
        path = renew(self)
        lengths.append(frames_in(joined))
        return path

    monkeypatch.setattr(ChainRun, "_renew_joined", counted)
    assert command("--num_videos 3 --prompt on --include_source").code == 0
    first, second, third, end = lengths
    assert first < second < third == end and second - first == third - second


# The size of a run


def test_a_run_keeps_no_more_state_than_it_was_told_to(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", "--prompt on --num_videos"
    assert command(f"{words} 4").code == 0
    whole = {number: clip.state.stat().st_size for number, clip in RunFolder(out).clips().items()}
    assert "with --keep_state last" in command(f"{words} 9 --dry_run").output
    capsys.readouterr()
    assert cli.continuous_main(["--prune", str(out)]) == 0
    stdout, clips = capsys.readouterr().out, RunFolder(out).clips()
    assert "the last two can be made again" in stdout and list(clips) == [1, 2, 3, 4]
    assert [clip.is_pruned for clip in clips.values()] == [True, True, False, False]
    assert clips[1].state.stat().st_size < whole[1] / 2 and len(clips[1].sheet) == 8
    made = during(monkeypatch, {})
    assert command(f"{words} 5 --keep_state last").code == 0 and len(made) == 1  # it goes on as if nothing had happened
    assert [clip.is_pruned for clip in RunFolder(out).clips().values()] == [True, True, True, False, False]
    assert command(f"{words} 5 --keep_state last --redo 5").code == 0 and len(made) == 2
    seen = command(f"{words} 5 --redo 3")
    assert seen.code == 2 and len(made) == 2 and "error: clip 3 would be made after clip 2" in seen.stderr
    assert "--redo 1 makes the chain again from there" in seen.stderr
    assert command(f"{words} 5 --redo 1").code == 0 and len(made) == 7
    assert cli.continuous_main(["--prune", str(tmp_path)]) == 2
    assert cli.continuous_main(["--prune", str(out), "--yes"]) == 2
    assert "--prune is given alone" in capsys.readouterr().err


def test_a_clip_is_whole_whenever_pruning_is_interrupted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("--prompt on --num_videos 3").code == 0
    with monkeypatch.context() as patch, RunFolder(tmp_path / "out") as folder:
        patch.setattr("wan.chain.finished_clip.write_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(folder.clips()[1])
        assert list(folder.clips()) == [1, 2, 3] and not folder.faults and not folder.clips()[1].is_pruned
    with RunFolder(tmp_path / "out") as folder:
        assert prune(folder.clips()[1]) > 0
        assert list(folder.clips()) == [1, 2, 3] and folder.clips()[1].is_pruned and prune(folder.clips()[1]) == 0


def test_a_preview_replaces_nobody_s_picture(command: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "preview.webp").touch()
    seen = command("--preview")
    assert seen.code == 2 and "preview.webp would be overwritten" in seen.stderr
    assert command("").code == 0


# From Python


def test_a_chain_is_made_in_five_lines(command: Command, tmp_path: Path) -> None:
    settings = Settings(
        video="source.mp4", ckpt_dir="ti2v", prompt="on", num_videos=3, frame_num=9, output_dir=str(tmp_path / "run")
    )
    numbers = list[int]()
    with Chain(settings) as chain:
        for clip in chain:
            numbers.append(clip.number)
            if len(numbers) == 1:
                break
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "stopped" and record["clips_finished"] >= 1
    steps = list[Step]()
    with Chain(settings, on_step=steps.append) as chain:
        assert [clip.number for clip in chain] == [1, 2, 3]
        assert chain.joined == tmp_path / "run" / "joined.mp4"
    assert any(step.prompt for step in steps)
    other = Chain(dataclasses.replace(settings, num_videos=5))
    assert any("2 of 5 clips are still to be made" in line for line in other.outline())
    for clip in other:
        if clip.number == 3:
            other.stop()
    assert clip.number == 3 and json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    with pytest.raises(UserError, match="give yes for that"):
        next(iter(Chain(dataclasses.replace(settings, prompt="changed"))))


def test_a_clip_that_changes_its_place_is_finished_somewhere_at_any_moment(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("--prompt on --num_videos 2").code == 0
    wanted = {clip.fingerprint for clip in RunFolder(tmp_path / "out").clips().values()}

    def change_places(folder: RunFolder) -> None:
        records = [folder.elsewhere.set_clip_aside(folder.clips()[number].record_path) for number in (1, 2)]
        for number, record in zip((2, 1), records, strict=True):
            folder.restore(number, 2, record)

    left = 0

    def event(*paths: Any, original: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return original(*paths, **options)

    for stop_at in range(1, 100, 5):
        home, left = Path(shutil.copytree(tmp_path / "out", tmp_path / str(stop_at))), stop_at
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "link", "unlink"):
                patch.setattr(os, name, functools.partial(event, original=getattr(os, name)))
            try:
                change_places(RunFolder(home))
            except KeyboardInterrupt:
                pass
            else:
                break
        folder = RunFolder(home)
        fingerprints = {clip.fingerprint for clip in (*folder.clips().values(), *folder.elsewhere.replaced())}
        assert wanted <= fingerprints, stop_at
    assert stop_at > 20 and [clip.record["seed"] for clip in RunFolder(home).clips().values()] == [4, 3]
