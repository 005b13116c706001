"""What a chain's command decides between its clips, without making one."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan.chain.changes import Change
from wan.chain.run_folder import RunFolder
from wan.chain.storyboard import Scene
from wan.chain.written import Written
from wan.commands import continuous, steering
from wan.commands.continuous import (
    _agree,
    _check_preview,
    _edited,
    _say_how_to_go_on,
    _say_what_is_there,
    _saying_what_is_there,
    _Scripts,
)
from wan.commands.preview import Preview
from wan.commands.steering import Steering
from wan.errors import UserError
from wan.options import Settings
from wan.types import Step


def inventory(folder: Path, *remade: int, changes: Sequence[Change] = (), **settings: Any) -> Any:
    """A folder whose finished clips of these numbers would be made again."""
    again = [Change(number, ("its prompt changed",), number) for number in remade]
    return SimpleNamespace(
        folder=SimpleNamespace(path=folder),
        settings=Settings(**settings),
        remade=again,
        again=again,
        changes=changes or again,
        moved=[],
        clips=dict.fromkeys(range(1, 4)),
        count=5,
    )


@pytest.mark.parametrize(
    ("remade", "yes", "terminal", "answer", "asked", "refused"),
    [
        ((), False, True, "", 0, None),
        ((2,), False, True, "", 0, None),  # one clip is soon made again
        ((2, 3), True, True, "", 0, None),
        ((2, 3), False, True, "y", 1, None),
        ((2, 3), False, True, "n", 1, "nothing was made; the old settings keep them"),
        (
            (2, 3),
            False,
            False,
            "",
            0,
            r"2 finished clips of out would be made again \(clips 2 to 3: its prompt changed",
        ),
        ((2, 3), True, False, "", 0, None),
    ],
)
def test_several_finished_clips_are_made_again_only_where_that_is_agreed_to(
    remade: tuple[int, ...],
    yes: bool,
    terminal: bool,
    answer: str,
    asked: int,
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    questions: list[str] = []

    def confirm(question: str) -> bool:
        questions.append(question)
        return answer == "y"

    monkeypatch.setattr(continuous, "on_terminal", lambda: terminal)
    monkeypatch.setattr(continuous, "confirm", confirm)
    of = inventory(Path("out"), *remade, yes=yes)
    if refused is None:
        _agree(of)
    else:
        with pytest.raises(UserError, match=refused):
            _agree(of)
    assert len(questions) == asked
    shown = capsys.readouterr().err.splitlines()
    phrase = {0: [], 1: ["clip 2: its prompt changed"], 2: ["clips 2 to 3: its prompt changed"]}[len(remade)]
    if asked:
        phrase = ["2 finished clips of out would be made again:", f"  {phrase[0]}"]
    expected = [*phrase, "what is replaced moves to redone/"] if phrase else []
    assert shown == ([] if refused and not asked else expected)


def test_a_change_of_a_clip_that_is_right_elsewhere_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    of = inventory(Path("out"), changes=[Change(2, (), 1)])
    of.moved = ["clip 2 is there already: it is redone/a.mp4"]
    _agree(of)
    assert capsys.readouterr().err.splitlines() == [*of.moved, "what is replaced moves to redone/"]


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({}, "the same command goes on from there"),
        ({"redo": 2}, "the same command without --redo 2 goes on from there"),
        ({"redo": 2, "keep_following": True}, "the same command without --redo 2 --keep_following goes on from there"),
    ],
)
def test_how_to_go_on_is_said(settings: dict[str, Any], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _say_how_to_go_on(inventory(Path("out"), **settings))
    assert capsys.readouterr().err.splitlines() == ["3 of 5 clips are finished in out", command]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (GeneratorExit(), "stopped"),
        (OSError("disk"), "failed: OSError"),
        (UserError("x"), "failed: UserError"),
    ],
)
def test_whatever_stops_a_run_is_written_down(
    error: BaseException, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []
    progress: Any = SimpleNamespace(rest=lambda: events.append("rest"))
    for fault in (None, "clip 4 could not be written: disk full"):
        events.clear()
        writer = SimpleNamespace(settle=lambda fault=fault: fault)
        run: Any = SimpleNamespace(inventory=inventory(Path("out")), writer=writer, finish=events.append)
        with pytest.raises(type(error)), _saying_what_is_there(run, progress):
            raise error
        assert events == ["rest", status]
        assert (fault in capsys.readouterr().err.splitlines()) == (fault is not None)


def test_a_run_without_a_clip_has_nothing_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    run: Any = SimpleNamespace(inventory=SimpleNamespace(clips={}))
    _say_what_is_there(run, KeyboardInterrupt())
    assert capsys.readouterr().err == ""


def test_clips_that_cannot_be_joined_are_not_the_news(capsys: pytest.CaptureFixture[str]) -> None:
    def finish(status: str) -> None:
        raise OSError("disk full")

    run: Any = SimpleNamespace(inventory=inventory(Path("out")), finish=finish)
    _say_what_is_there(run, KeyboardInterrupt())
    assert capsys.readouterr().err.splitlines()[-1] == "they are not joined: disk full"


def test_prompts_that_were_edited_hold_as_long_as_the_others_are_the_same() -> None:
    scenes = (Scene(1, {"name": "fog", "prompt": "a"}), Scene(2, {"prompt": "b"}), Scene(3))
    edited = {
        "fog": {"prompt": "A", "over": "a"},
        "2": {"prompt": "B", "over": "another by then"},
        "3": {"prompt": "C", "over": "usual"},
        "5": {"prompt": "E", "over": "usual"},
    }
    followed = _edited(scenes, edited, "usual")
    assert [scene.values.get("prompt") for scene in followed] == ["A", "b", "C", None, "E"]
    assert [scene.line for scene in followed] == [1, 2, 3, 0, 0] and followed[0].values["name"] == "fog"
    assert _edited(scenes, {}, "usual") == scenes
    assert [scene.values.get("prompt") for scene in _edited((), {"1": {"prompt": "x", "over": None}}, None)] == ["x"]
    assert _edited((), {"1": {"prompt": "x", "over": None}}, "usual") == (Scene(0),)


def test_a_preview_is_for_latents_that_it_can_show() -> None:
    def check(preview: bool, channels: int) -> None:
        job: Any = SimpleNamespace(settings=Settings(preview=preview), config=SimpleNamespace(z_dim=channels))
        _check_preview(job)

    check(True, 16)
    check(True, 48)
    check(False, 32)
    with pytest.raises(UserError, match="preview shows latents of 16 and 48 channels, this model has 32"):
        check(True, 32)


def scripts(scenes: Sequence[Scene] = (), ends: Sequence[str] = (), **settings: Any) -> Any:
    config = SimpleNamespace()
    job: Any = SimpleNamespace(settings=Settings(**settings), scenes=tuple(scenes), ends=tuple(ends), config=config)
    nothing: Any = None
    return _Scripts(job, nothing, nothing)


@pytest.mark.parametrize(
    ("scenes", "ends", "settings", "begun", "count"),
    [
        (0, 0, {}, 1, 12),
        (0, 0, {"num_videos": 3}, 1, 3),
        (0, 0, {"until": "b.mp4"}, 1, 1),
        (2, 0, {"storyboard": "s.yaml"}, 1, 2),
        (2, 0, {"storyboard": "s.yaml", "num_videos": 5}, 1, 5),
        (2, 0, {"storyboard": "s.yaml"}, 4, 4),  # of which four are begun
        (2, 0, {}, 1, 12),  # prompts for some clips
        (0, 3, {}, 1, 3),
        (2, 3, {}, 1, 3),
        (5, 0, {"storyboard": "s.yaml", "num_videos": 2}, 1, 2),
    ],
)
def test_how_many_clips_a_chain_has(
    scenes: int,
    ends: int,
    settings: dict[str, Any],
    begun: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    planned: list[Any] = []

    def plans_of(job: Any, continuation: Any, footage: Any, scenes: Any, count: int) -> list[str]:
        planned.append((len(scenes), count))
        return ["plan"] * count

    monkeypatch.setattr(continuous, "plans_of", plans_of)
    monkeypatch.setattr(continuous, "clip_settings", lambda config, continuation, plans: [{}] * len(plans))
    script = scripts([Scene(1)] * scenes, ["a.png"] * ends, **settings).script([Scene(1)] * scenes, begun)
    assert planned == [(min(scenes, count), count)] and len(script.plans) == count
    assert ("`num_videos` makes the first 2 of them" in caplog.text) == (scenes > count)


def test_ends_are_one_for_each_clip() -> None:
    with pytest.raises(UserError, match="end_images ends holds 2 pictures, and 3 clips are to be made"):
        scripts(ends=["a.png", "b.png"], end_images="ends", num_videos=3).script(())


@pytest.mark.parametrize(
    ("answer", "text", "goes_on", "steps"),
    [
        ("yes", None, True, []),
        ("stop", None, False, []),
        ("again", None, True, ["drawn 2", "follow 1", "give up"]),
        ("edit", "a storm", True, ["follow 1", "give up"]),
        ("edit", "", True, ["give up"]),
    ],
)
def test_a_review_does_as_it_is_answered(
    answer: str, text: str | None, goes_on: bool, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    asked: list[str] = []
    clip = SimpleNamespace(video=Path("out/2.mp4"), record={"prompt": "as it was described"})
    edited: dict[str, Any] = {}
    of: Any = SimpleNamespace(
        clips={2: clip},
        count=3,
        prompt=lambda number: None,
        script=SimpleNamespace(key=lambda number: "fog"),
        choices=SimpleNamespace(edited=edited),
        seeds=SimpleNamespace(draw_again=lambda number: done.append(f"drawn {number}")),
        follow=lambda script, begun: done.append(f"follow {begun}"),
    )
    run: Any = SimpleNamespace(inventory=of, give_up=lambda: done.append("give up"))

    def review(title: str) -> str:
        asked.append(title)
        return answer

    def ask(question: str) -> str | None:
        asked.append(question)
        return text

    monkeypatch.setattr(continuous, "review", review)
    monkeypatch.setattr(continuous, "ask", ask)
    one = scripts([Scene(1), Scene(2, {"name": "fog", "prompt": "fog"})])
    monkeypatch.setattr(one, "script", lambda scenes, begun: None)
    assert one.review(run, 2) == goes_on and done == steps
    assert asked[0] == "clip 2/3 out/2.mp4"
    assert asked[1:] == (["the prompt was: as it was described\nthe new one:"] if answer == "edit" else [])
    assert of.choices.edited == ({"fog": {"prompt": "a storm", "over": "fog"}} if text else {})


def test_the_prompt_that_an_edited_one_is_over_is_the_scene_s_or_the_command_s() -> None:
    one = scripts([Scene(1, {"prompt": "fog"}), Scene(2)], prompt="usual")
    assert [one._usual_prompt(number) for number in (1, 2, 3)] == ["fog", "usual", "usual"]


@pytest.mark.parametrize("remade", [0, 1, 2])
def test_a_storyboard_that_changed_is_followed_unless_finished_clips_would_be_made_again(
    remade: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wan.commands.progress")
    before, after = (Scene(1), Scene(2, {"prompt": "b"})), (Scene(1, {"prompt": "x"}), Scene(2, {"prompt": "c"}))
    followed: list[Any] = []
    changes = [Change(number, ("its prompt changed",), number) for number in range(2, 2 + remade)]
    of: Any = SimpleNamespace(
        script="old script",
        choices=SimpleNamespace(edited={}),
        follow=lambda script, begun: followed.append((script, begun)),
        remade=changes,
        moved=["clip 2 is there already"],
        put_in_place=lambda: followed.append("put in place"),
    )
    run: Any = SimpleNamespace(to_make=2, inventory=of, writer=SimpleNamespace(wait=lambda: followed.append("wait")))
    read = [before, after, after]
    monkeypatch.setattr(continuous, "read_scenes", lambda settings: read.pop(0))
    monkeypatch.setattr(continuous, "check_storyboard", lambda path, scenes, config: None)
    one = scripts(before, storyboard="s.yaml")
    monkeypatch.setattr(one, "script", lambda scenes, begun: (scenes, begun))
    one.read_again(run)
    assert followed == [] and not caplog.messages, "it is as it was"
    one.read_again(run)
    following = (Scene(1), after[1])  # clip 1 is begun, and stays what it was
    if remade < 2:
        assert followed == ["wait", ((following, 1), 1), "put in place"] and one.scenes == following
        assert caplog.messages == [
            "the storyboard has changed: clip 1 (prompt), clip 2 (prompt)",
            "clips up to 1 are made already; what changed of them waits for the next run",
            "clip 2 is there already",
        ]
    else:
        assert followed == ["wait", ((following, 1), 1), ("old script", 1)] and one.scenes == before
        assert "finished clips would be made again (clips 2 to 3: its prompt changed)" in caplog.text
    followed.clear()
    one.read_again(run)
    assert followed == [], "it is said once"


def test_a_storyboard_with_a_mistake_waits_for_its_mending(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    followed: list[Any] = []

    def follow(script: Any, begun: int) -> None:
        followed.append(script)
        if script == "new":
            raise UserError("`redo` is needed")

    of: Any = SimpleNamespace(script="old", choices=SimpleNamespace(edited={}), follow=follow)
    run: Any = SimpleNamespace(to_make=2, inventory=of, writer=SimpleNamespace(wait=lambda: None))
    one = scripts([Scene(1)], storyboard="s.yaml")
    monkeypatch.setattr(continuous, "check_storyboard", lambda path, scenes, config: None)
    monkeypatch.setattr(one, "script", lambda scenes, begun: "new")

    def broken(settings: Any) -> Any:
        raise UserError("line 3: this is not YAML")

    for read, begins in ((broken, "line 3"), (lambda settings: (Scene(1), Scene(2, {"prompt": "c"})), "`redo`")):
        monkeypatch.setattr(continuous, "read_scenes", read)
        one.read_again(run)
        assert caplog.messages[-1].startswith(begins) and caplog.messages[-1].endswith(
            "what the storyboard said before"
        )
    assert followed == ["new", "old"] and one.scenes == (Scene(1),)
    scripts([Scene(1)]).read_again(run)  # without a storyboard nothing is read
    assert len(caplog.messages) == 2


# Steering


def answered(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("y\n", "yes"),
        ("YES\n", "yes"),
        ("a\n", "again"),
        ("ed\n", "edit"),
        ("s\n", "stop"),
        ("\nwhat\ns\n", "stop"),
        ("e\ns\n", "edit"),
        ("", "stop"),  # nobody is there any more
    ],
)
def test_a_review_takes_the_beginning_of_an_answer(typed: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, typed)
    assert steering.review("clip 2/3") == answer


@pytest.mark.parametrize(
    ("typed", "agrees"), [("y\n", True), (" Yes \n", True), ("\n", False), ("", False), ("n\n", False)]
)
def test_only_a_yes_confirms(
    typed: str, agrees: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(monkeypatch, typed)
    assert steering.confirm("make them again?") == agrees
    assert capsys.readouterr().err == "make them again? [y/N] "


def test_somebody_can_be_asked_where_both_streams_are_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin, stderr, can in (
        (Terminal(), Terminal(), True),
        (io.StringIO(), Terminal(), False),
        (Terminal(), None, False),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdin", stdin)
            patched.setattr(sys, "stderr", stderr)
            assert steering.on_terminal() == can


def test_a_file_a_signal_and_a_call_stop_a_run_between_two_clips(tmp_path: Path) -> None:
    one = Steering(tmp_path)
    one.check()
    assert one.goes_on() and one.goes_on()
    (tmp_path / "stop").touch()
    with pytest.raises(UserError, match="stop asks a run to stop; remove it to go on"):
        one.check()
    assert not one.goes_on() and not (tmp_path / "stop").exists(), "the next run goes on"
    assert one.goes_on()
    before = signal.getsignal(signal.SIGUSR1)
    with one.listening():
        assert one.goes_on()
        signal.raise_signal(signal.SIGUSR1)
        assert not one.goes_on()
    assert signal.getsignal(signal.SIGUSR1) is before
    called = Steering(tmp_path)
    called.stop()
    assert not called.goes_on()
    heard: list[Any] = []

    def in_a_thread() -> None:  # which gets no signals
        with Steering(tmp_path).listening():
            heard.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert heard == [before]


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_waits_as_long_as_it_is_paused(
    stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (tmp_path / "stop").touch() if stops else (tmp_path / "pause").unlink()

    caplog.set_level("INFO", "wan.commands.progress")
    monkeypatch.setattr(steering, "time", SimpleNamespace(sleep=sleep))
    (tmp_path / "pause").touch()
    assert Steering(tmp_path).goes_on() is not stops
    assert naps == [0.5] * 3 and caplog.messages == [f"paused; remove {tmp_path / 'pause'} to go on", "going on"]
    caplog.clear()
    Steering(tmp_path).stop()
    (tmp_path / "pause").touch()
    stopped = Steering(tmp_path)
    stopped.stop()
    assert not stopped.goes_on() and not caplog.messages, "what stops waits for nothing"


# Preview


def test_a_preview_takes_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]

    def preview(latents: torch.Tensor) -> Any:
        now[0] += 0.25  # what a picture takes
        return latents

    rates: list[Fraction] = []

    def as_webp(pictures: Any, fps: Fraction) -> bytes:
        rates.append(fps)
        return f"picture {len(rates)}".encode()

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("wan.commands.preview.preview", preview)
    monkeypatch.setattr("wan.media.as_webp", as_webp)
    folder = RunFolder(tmp_path)
    written = Written(folder, {})
    shows = Preview(tmp_path / "preview.webp", Fraction(16), written)
    step = Step(1, 4, "sample", torch.zeros(16, 3, 4, 4))
    shows(Step(0, 4, "load"))
    assert not rates
    shows(step)
    assert rates == [Fraction(4)] and (tmp_path / "preview.webp").read_bytes() == b"picture 1"
    assert len(json.loads(json.dumps(written.as_json()))["written"]["preview.webp"]) == 1
    now[0] = 10.25 + 24.9
    shows(step)
    assert len(rates) == 1
    now[0] = 10.25 + 25
    shows(step)
    assert len(rates) == 2 and (tmp_path / "preview.webp").read_bytes() == b"picture 2"
