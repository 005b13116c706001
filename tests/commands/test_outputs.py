"""Nothing of the user's is replaced: not what a command reads, and not what no run of ours has made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.commands import Seen, frames_in
from wan.chain.finished_clip import FinishedClip
from wan.chain.run_folder import RunFolder
from wan.chain.storyboard import Scene
from wan.cli import continuous_main
from wan.commands import outputs
from wan.errors import UserError
from wan.options import Settings

OF_THE_RUN = ("joined.mp4", "run.json", "prompts_log.txt", "report.html", "report.json")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what a chain reads


@pytest.mark.parametrize("name", ["video_02_seed4.mp4", "VIDEO_7_SEED1.MP4", "joined.mp4"])
def test_a_source_under_a_name_of_the_run_is_refused(command: Callable[..., Seen], tmp_path: Path, name: str) -> None:
    source = tmp_path / "out" / name
    source.parent.mkdir()
    shutil.copy("source.mp4", source)
    before = content(source.parent)
    seen = command(f"--video {source} --include_source")
    assert seen.code == 2 and not seen.requests
    assert f"{source} would be overwritten: --video needs it" in seen.output
    assert content(source.parent) == before


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("--ckpt_dir i2v --end_image {}", "red.png"),
        ("--storyboard {}", "story.yaml"),
        ("--lora {}:0.5", "light.safetensors"),
        ("--dit {}", "dit.safetensors"),
    ],
)
def test_so_is_any_other_file_that_it_reads(
    command: Callable[..., Seen], tmp_path: Path, words: str, file: str
) -> None:
    name = "video_01_seed3.safetensors" if file.endswith("safetensors") else "report.html"
    given = tmp_path / "out" / name
    given.parent.mkdir()
    shutil.copy(file, given)
    seen = command(words.format(given))
    assert seen.code == 2 and not seen.requests
    assert f"{given} would be overwritten: --{words.split(' {}')[0].split('--')[-1]} needs it" in seen.output
    assert given.read_bytes() == Path(file).read_bytes()


def test_so_is_a_picture_that_only_the_storyboard_names(command: Callable[..., Seen], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy("red.png", folder / "video_02_seed4.mp4")  # a picture, whatever it is called
    (tmp_path / "story.yaml").write_text(f"- {{cut: {folder / 'video_02_seed4.mp4'}}}\n")
    seen = command(f"--storyboard {tmp_path / 'story.yaml'}")
    assert seen.code == 2 and "the storyboard needs it" in seen.output and not seen.requests


def test_a_link_does_not_hide_it(command: Callable[..., Seen], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy("source.mp4", folder / "video_01_seed3.mp4")
    (tmp_path / "link.mp4").symlink_to(folder / "video_01_seed3.mp4")
    seen = command(f"--video {tmp_path / 'link.mp4'}")
    assert seen.code == 2 and "would be overwritten" in seen.output


def test_a_source_in_the_folder_under_another_name_is_continued(command: Callable[..., Seen], tmp_path: Path) -> None:
    source = tmp_path / "out" / "holiday.mp4"
    source.parent.mkdir()
    shutil.copy("source.mp4", source)
    assert command(f"--video {source} --include_source").code == 0
    assert source.read_bytes() == Path("source.mp4").read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".MP4"])
def test_nor_does_a_take_that_is_the_source(command: Callable[..., Seen], tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "out" / "takes" / "01" / f"take_1_seed3{suffix}"
    source.parent.mkdir(parents=True)
    shutil.copy("source.mp4", source)
    seen = command(f"--video {source} --takes 2")
    assert seen.code == 2 and not seen.requests and f"{source} would be overwritten: --video needs it" in seen.output


def test_what_only_bears_a_clips_name_stays_where_it_is(command: Callable[..., Seen], tmp_path: Path) -> None:
    source = tmp_path / "out" / "video_02_seed4.mov"
    source.parent.mkdir()
    shutil.copy("source.mp4", source)
    for suffix in (".srt", ".txt", ".png"):
        source.with_suffix(suffix).write_bytes(b"theirs")
    before = content(source.parent)
    assert command(f"--video {source} --include_source").code == 0
    assert before.items() <= content(source.parent).items()


# --- what nobody here made


@pytest.mark.parametrize("name", OF_THE_RUN)
def test_a_file_without_a_run_of_ours_is_refused(command: Callable[..., Seen], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text('{"epoch": 3, "loss": 0.1}')
    seen = command("")
    assert seen.code == 2 and not seen.requests
    assert f"{folder / name} would be overwritten, and no run of ours made it" in seen.output
    assert content(folder) == {name: b'{"epoch": 3, "loss": 0.1}'}


def test_clips_whose_run_json_was_removed_are_gone_on_with(command: Callable[..., Seen], tmp_path: Path) -> None:
    assert command("").code == 0
    (tmp_path / "out" / "run.json").unlink()
    seen = command("")
    assert seen.code == 0 and not seen.requests


@pytest.mark.parametrize("suffix", [".mp4", ".safetensors", ".json"])
def test_a_file_under_a_clips_name_moves_away_and_this_is_said(
    command: Callable[..., Seen], tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "out" / f"video_02_seed4{suffix}"
    file.parent.mkdir()
    file.write_bytes(b"theirs")
    assert command("").code == 0
    assert (file.parent / "redone" / file.name).read_bytes() == b"theirs"
    assert len(command("").clips) == 2
    if suffix != ".json":
        assert "has no record of a run; it moves to redone/" in caplog.text


# --- one clip


@pytest.mark.parametrize(
    ("weights", "words", "lines"),
    [
        (
            "ti2v",
            "",
            ["a clip of 9 frames of 64x32 at 24", "3 steps of unipc, seed drawn, known: nothing", "prompt: x"],
        ),
        (
            "ti2v",
            "--frame_num 1 --base_seed 7",
            ["a clip of 1 frame of 64x32", "3 steps of unipc, seed 7", "prompt: x"],
        ),
        ("ti2v", "--image red.png --cfg_size 2", ["a clip of 9 frames", "known: the image\n", "prompt: x", "2 GPUs: "]),
        ("ti2v", "--end_image red.png", ["known: the end image\n"]),
        ("ti2v", "--image red.png --end_image red.png", ["known: the image and the end image\n"]),
        ("i2v", "--task i2v-A14B --image red.png", ["a clip of 9 frames of 32x16 at 16", "known: the image"]),
        ("ti2v", "--task v2v-5B --video source.mp4 --vlm_path vlm", ["a clip of 9 frames", "known: last_frame 1\n"]),
        (
            "ti2v",
            "--task v2v-5B --video source.mp4 --vlm_path vlm --end_image red.png",
            ["known: last_frame 1 and the end image\n"],
        ),
    ],
)
def test_a_dry_run_tells_of_a_clip_and_makes_nothing(
    weights: str, words: str, lines: list[str], command: Callable[..., Seen], world: Path
) -> None:
    before = content(world)
    words = f"--frame_num 9 --sample_steps 3 --save_file plan.mp4 {words}"
    seen = command(f"{words} --dry_run", generate=True, weights=f"--ckpt_dir {weights}")
    assert seen.code == 0 and seen.requests == [] and content(world) == before
    assert ", in plan.mp4\n" in seen.output and all(line in seen.output for line in lines), seen.output
    for part in ("MiB of disk", "of sampling on one H200", "GiB of GPU memory (", "GiB of host memory"):
        assert seen.output.count(part) == 1
    made = command(words.replace("--cfg_size 2", ""), generate=True, weights=f"--ckpt_dir {weights}").first
    assert (made.geometry.frames, made.sampling.steps) == (1 if "--frame_num 1" in words else 9, 3)
    for name in ("plan.mp4", "plan.json"):
        (world / name).unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size 640*480", "size 640*480 is not one of"),
        ("--lora nowhere.safetensors", "LoRA nowhere.safetensors does not exist"),
        ("--task v2v-5B --video nowhere.mp4", "cannot read video 'nowhere.mp4'"),
        ("--save_file source.mp4", "source.mp4 is there already"),
        ("--cfg_size 2 --ulysses_size 7 --ring_size 1", "--ulysses_size 7"),
    ],
)
def test_a_dry_run_refuses_what_the_clip_would_be_refused_for(
    words: str, message: str, command: Callable[..., Seen]
) -> None:
    seen = command(f"{words} --dry_run", generate=True)
    assert seen.code == 2 and seen.output.startswith("error: ") and message in seen.output


def test_a_save_file_of_ours_is_replaced_and_another_is_not(command: Callable[..., Seen], tmp_path: Path) -> None:
    target = tmp_path / "movie.mp4"
    words = f"--save_file {target}"
    assert command(words, generate=True).code == 0
    assert command(f"{words} --base_seed 1", generate=True).code == 0  # made here, as its json says
    for lost in ("movie.json", "movie.mp4"):  # the mp4 alone; a json of someone else alone
        shutil.copy("source.mp4", target)
        target.with_suffix(".json").write_text('{"seed": 1}')
        (tmp_path / lost).unlink()
        before = content(tmp_path)
        seen = command(words, generate=True)
        assert seen.code == 2 and not seen.requests
        assert "is there already" in seen.output and "or --overwrite to replace it" in seen.output
        assert content(tmp_path) == before
    assert command(f"{words} --overwrite", generate=True).code == 0
    assert frames_in(target) > 1 and "seed" in json.loads(target.with_suffix(".json").read_text())


def test_one_that_was_changed_since_is_not_ours(command: Callable[..., Seen], tmp_path: Path) -> None:
    target = tmp_path / "movie.mp4"
    assert command(f"--save_file {target}", generate=True).code == 0
    shutil.copy("source.mp4", target)  # graded, and saved under the same name
    before = content(tmp_path)
    seen = command(f"--save_file {target}", generate=True)
    assert seen.code == 2 and not seen.requests and f"{target} is there already" in seen.output
    assert content(tmp_path) == before


def test_a_larger_video_has_a_record_of_its_own(command: Callable[..., Seen], tmp_path: Path) -> None:
    target, larger = tmp_path / "movie.mp4", tmp_path / "movie_upscaled.mp4"
    words = f"--save_file {target} --upscale larger.safetensors"
    assert command(words, generate=True).code == 0
    assert command(words, generate=True).code == 0  # both are ours
    for theirs in (larger, larger.with_suffix(".json")):
        kept = theirs.read_bytes()
        theirs.write_bytes(b"{}")
        before = content(tmp_path)
        seen = command(words, generate=True)
        assert seen.code == 2 and not seen.requests and f"{larger} is there already" in seen.output
        assert content(tmp_path) == before
        theirs.write_bytes(kept)


@pytest.mark.parametrize("flag", ["--video {}", "--ckpt_dir i2v --task i2v-A14B --image {}", "--lora {}"])
def test_what_one_clip_is_made_from_is_never_replaced(command: Callable[..., Seen], tmp_path: Path, flag: str) -> None:
    given = tmp_path / "in.mp4"
    shutil.copy({"--video": "source.mp4", "--lora": "light.safetensors"}.get(flag.split()[0], "red.png"), given)
    task = " --task v2v-5B" if flag.startswith("--video") else ""
    before = content(tmp_path)
    seen = command(flag.format(given) + f"{task} --save_file {given} --overwrite", generate=True)
    name = flag.split(" {}")[0].split("--")[-1]
    # a LoRA of that name is refused before the output is looked at
    refused = (
        f"LoRA {given} is no .safetensors file" if name == "lora" else f"would replace {given}, which --{name} needs"
    )
    assert seen.code == 2 and refused in seen.output
    assert content(tmp_path) == before


# --- the joined video


def test_a_joined_video_that_only_grew_is_replaced(command: Callable[..., Seen], tmp_path: Path) -> None:
    assert command("").code == 0
    assert command("--num_videos 3").code == 0
    assert not (tmp_path / "out" / "redone").exists()


@pytest.mark.parametrize("more", ["--redo 2", "--include_source", "--num_videos 1"])
def test_one_that_lacks_or_remakes_a_clip_leaves_the_old_one(
    command: Callable[..., Seen], tmp_path: Path, more: str
) -> None:
    assert command("").code == 0
    old = (tmp_path / "out" / "joined.mp4").read_bytes()
    assert command(more).code == 0
    assert (tmp_path / "out" / "redone" / "joined.mp4").read_bytes() == old
    assert (tmp_path / "out" / "joined.mp4").read_bytes() != old
    assert command(more.replace("--redo 2", "")).code == 0  # the same again: nothing moves
    assert not (tmp_path / "out" / "redone" / "joined_2.mp4").exists()


# --- what somebody has changed of what a run renews


@pytest.mark.parametrize("more", ["", "--num_videos 3", "--include_source --redo 2"])
def test_what_was_edited_in_the_runs_folder_moves_away_and_this_is_said(
    command: Callable[..., Seen], tmp_path: Path, caplog: pytest.LogCaptureFixture, more: str
) -> None:
    assert command("").code == 0
    out, edited = tmp_path / "out", [name for name in OF_THE_RUN if name != "run.json"]
    for name in edited:
        (out / name).write_bytes(f"their {name}".encode())
    assert command(more).code == 0
    for name in edited:
        assert (out / "redone" / name).read_bytes() == f"their {name}".encode()
        assert (
            not (out / name).read_bytes().startswith(b"their")
            and f"{out / name} is not what was written" in caplog.text
        )
    caplog.clear()
    assert command(more.replace("--redo 2", "")).code == 0  # what is there now is ours
    assert "is not what was written" not in caplog.text
    assert not list((out / "redone").glob("report_2*"))


def test_what_is_edited_while_the_run_goes_on_is_kept_too(
    command: Callable[..., Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined, save = tmp_path / "out" / "joined.mp4", RunFolder.save

    def edited_before(folder: RunFolder, number: int, *rest: Any) -> FinishedClip:
        if number == 2:
            joined.write_bytes(b"graded")
        return save(folder, number, *rest)

    monkeypatch.setattr(RunFolder, "save", edited_before)
    assert command("--num_videos 3 --include_source").code == 0
    assert (tmp_path / "out" / "redone" / "joined.mp4").read_bytes() == b"graded"
    assert frames_in(joined) == frames_in(Path("source.mp4")) + 3 * 8


def test_a_run_that_noted_no_digests_goes_on_as_before(command: Callable[..., Seen], tmp_path: Path) -> None:
    assert command("").code == 0
    record = tmp_path / "out" / "run.json"
    run = json.loads(record.read_text())
    assert set(run.pop("written")) == {name for name in OF_THE_RUN if name != "run.json"}
    record.write_text(json.dumps(run))
    assert command("--num_videos 3").code == 0
    assert not (tmp_path / "out" / "redone").exists()
    assert "written" in json.loads(record.read_text())


# --- temporary files


@pytest.mark.parametrize(("flag", "left"), [("", False), ("--no_lock", True)])
def test_temporary_files_go_only_where_the_lock_keeps_other_runs_out(
    command: Callable[..., Seen], tmp_path: Path, flag: str, left: bool
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    names = (".video_09_seed1.mp4.0123abcd.part", "..joined.mp4.3.piece.mp4.0123abcd.part", ".joined.mp4.3.piece.mp4")
    for name in names:  # of a run that was killed, or of one that is at work
        (folder / name).touch()
    assert command(flag).code == 0
    assert [(folder / name).exists() for name in names] == [left] * 3


# --- what is no run's


def test_only_a_run_of_ours_is_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"epoch": 3}')
    assert continuous_main(["--prune", str(tmp_path)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err
    assert content(tmp_path) == {"run.json": b'{"epoch": 3}'}


# --- each rule by itself


def job(*scenes: Scene, **settings: Any) -> Any:
    return SimpleNamespace(settings=Settings(**settings), scenes=scenes)


@pytest.mark.parametrize(
    ("record", "video", "overwrite", "ours"),
    [
        (None, None, False, True),  # nothing is there
        (None, b"theirs", False, False),
        (None, b"theirs", True, True),
        ({"versions": {"wan-continue": "1"}, "seed": 1}, b"x", False, True),  # earlier releases noted no digest
        ({"versions": {"wan-continue": "1"}, "seed": 1, "digests": {"mp4": "right"}}, b"x", False, True),
        ({"versions": {"wan-continue": "1"}, "seed": 1, "digests": {"mp4": "wrong"}}, b"x", False, False),
        ({"versions": {"wan-continue": "1"}, "seed": 1, "digests": {"mp4": "wrong"}}, None, False, True),  # it is gone
        ({"versions": {"other": "1"}, "seed": 1}, b"x", False, False),
        ({"versions": "1", "seed": 1}, b"x", False, False),
        ({"versions": {"wan-continue": "1"}}, b"x", False, False),
        ({"name": "of somebody's package"}, None, False, False),
    ],
)
def test_a_clip_is_replaced_only_where_it_is_ours(
    record: Any, video: bytes | None, overwrite: bool, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "file_digest", lambda path: "right")
    target = tmp_path / "a.mp4"
    if video is not None:
        target.write_bytes(video)
    if record is not None:
        target.with_suffix(".json").write_text(json.dumps(record))
    if ours:
        outputs.check_file(job(overwrite=overwrite), target)
    else:
        first = target if video is not None else target.with_suffix(".json")
        with pytest.raises(UserError, match=f"{first} is there already, and no record beside it says"):
            outputs.check_file(job(overwrite=overwrite), target)


@pytest.mark.parametrize(
    ("record", "video", "ours"),
    [
        ({"model_digest": "m", "video_digest": "right"}, b"x", True),
        ({"model_digest": "m", "video_digest": "wrong"}, b"x", False),
        ({"model_digest": "m", "video_digest": "wrong"}, None, True),
        ({"video_digest": "right"}, b"x", False),
        (None, b"x", False),
    ],
)
def test_a_larger_video_is_replaced_only_where_it_is_ours(
    record: Any, video: bytes | None, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "file_digest", lambda path: "right")
    larger = tmp_path / "a_upscaled.mp4"
    if video is not None:
        larger.write_bytes(video)
    if record is not None:
        larger.with_suffix(".json").write_text(json.dumps(record))
    outputs.check_file(job(), tmp_path / "a.mp4")  # nobody makes a larger one
    if ours:
        outputs.check_file(job(upscale="x.pth"), tmp_path / "a.mp4")
    else:
        with pytest.raises(UserError, match="a_upscaled.mp4 is there already"):
            outputs.check_file(job(upscale="x.pth"), tmp_path / "a.mp4")


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    (video := tmp_path / "a.mp4").write_bytes(b"x")
    (lora := tmp_path / "b.json").write_bytes(b"x")
    (linked := tmp_path / "c.mp4").symlink_to(video)
    with pytest.raises(UserError, match=f"save_file {linked} would replace {video}, which video needs"):
        outputs.check_file(job(video=str(video), overwrite=True), linked)
    with pytest.raises(UserError, match="which lora needs"):
        outputs.check_file(job(lora=(f"{lora}:0.5",), overwrite=True), tmp_path / "b.mp4")
    (picture := tmp_path / "d.json").write_bytes(b"x")
    with pytest.raises(UserError, match="which the storyboard needs"):
        outputs.check_file(job(Scene(1, {"cut": str(picture)}), overwrite=True), tmp_path / "d.mp4")
    outputs.check_file(
        job(Scene(1, {"cut": True}), video=str(video), save_file=str(linked), overwrite=True), tmp_path / "e.mp4"
    )


def folder(path: Path, foreign: Any = None, writes: Any = ()) -> Any:
    checked: list[str] = []
    return SimpleNamespace(
        path=path,
        checked=checked,
        check_names=lambda: checked.append("names"),
        writes=lambda file: file.name in writes,
        foreign=lambda preview, upscaled: foreign if (preview, upscaled) == (True, False) else None,
    )


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    one = folder(tmp_path / "a" / "b")
    outputs.check_folder(job(), one)
    assert list(tmp_path.iterdir()) == [] and one.checked == ["names"]
    (tmp_path / "a").mkdir()
    outputs.check_folder(job(), one)
    assert [file.name for file in tmp_path.rglob("*")] == ["a"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "a").touch()
    with pytest.raises(UserError, match="output_dir .*a is a file; give a folder"):
        outputs.check_folder(job(), folder(file))
    with pytest.raises(UserError, match="cannot be made: .*a is a file"):
        outputs.check_folder(job(), folder(file / "b"))
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: False)
        with pytest.raises(UserError, match=f"cannot be used: {tmp_path} is not writable"):
            outputs.check_folder(job(), folder(tmp_path / "b"))

    def temporary(dir: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", temporary)
    with pytest.raises(UserError, match="cannot be written to: No space left on device; give another"):
        outputs.check_folder(job(), folder(tmp_path / "b"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_in_which_something_would_be_lost_is_refused(tmp_path: Path) -> None:
    (video := tmp_path / "a.mp4").touch()
    (link := tmp_path / "b.mp4").symlink_to(video)
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(UserError, match=f"{link} would be overwritten: video needs it"):
            outputs.check_folder(job(video=str(link)), folder(tmp_path, writes=[name]))
    foreign = folder(tmp_path, foreign="report.html")
    outputs.check_folder(job(), foreign)
    outputs.check_folder(job(preview=True, upscale="x.pth"), foreign)
    with pytest.raises(UserError, match="report.html would be overwritten, and no run of ours made it"):
        outputs.check_folder(job(preview=True), foreign)
