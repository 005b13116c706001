"""`upscale`: the finished video once more, larger, with its rate and sound; nothing of it goes back into a chain."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.commands import Seen, frames_in, metadata, nearest_upscaler
from tests.support.media_samples import beeps, beeps_in, recording
from wan import media
from wan.commands.finishing import Upscaling
from wan.errors import UserError
from wan.files import file_digest
from wan.options import Settings
from wan.types import Geometry, Step
from wan.upscaling import MOST_SIDE, Upscaler, _spans, made_of, open_upscaler, upscale

CPU = torch.device("cpu")


def twice(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)


def picture(height: int = 100, width: int = 150) -> npt.NDArray[Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


# --- one picture


def test_a_picture_is_the_same_whole_and_in_pieces() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def enlarge(tiles: tuple[int, ...]) -> npt.NDArray[Any]:
        with (
            torch.inference_mode(),
            Upscaler(Path("x"), 2, lambda x: twice(x) + layers(x) / 4, tiles).on(CPU) as larger,
        ):
            return larger(picture())

    whole = enlarge(())
    assert whole.shape == (200, 300, 3) and whole.std() > 20
    for tile in (64, 40):
        assert np.abs(enlarge((tile,)).astype(int) - whole).max() <= 1  # rounding


def test_smaller_pieces_are_tried_where_memory_is_short_and_then_it_is_said() -> None:
    largest = 150

    def short(pixels: torch.Tensor) -> torch.Tensor:
        if max(pixels.shape) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return twice(pixels)

    with Upscaler(Path("x.pth"), 2, short, (512, 128, 64)).on(CPU) as enlarge:
        given = picture(200, 300)
        assert np.array_equal(enlarge(given), given.repeat(2, 0).repeat(2, 1))
        largest = 50
        with pytest.raises(UserError, match="cpu has too little free memory for upscale x.pth: free some, or give a"):
            enlarge(given)


@pytest.mark.parametrize(
    ("length", "tile", "spans"),
    [
        (100, 100, [(0, 100)]),
        (101, 100, [(0, 50), (50, 101)]),
        (250, 100, [(0, 83), (83, 166), (166, 250)]),
        (1, 100, [(0, 1)]),
    ],
)
def test_pieces_are_about_one_size_and_none_is_larger_than_a_tile(length: int, tile: int, spans: Any) -> None:
    assert _spans(length, tile) == spans


def test_a_piece_is_seen_with_what_is_around_it() -> None:
    seen: list[tuple[int, ...]] = []

    def note(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(pixels.shape))
        assert pixels.dtype == torch.float32 and pixels.min() >= 0 and pixels.max() <= 1
        return twice(pixels)

    given = picture(200, 60)
    with Upscaler(Path("x"), 2, note, (64,)).on(CPU) as larger:
        assert np.array_equal(larger(given), given.repeat(2, 0).repeat(2, 1))
    # four of 50 rows, with 32 on either side as far as there are any
    assert seen == [(1, 3, 82, 60), (1, 3, 114, 60), (1, 3, 114, 60), (1, 3, 82, 60)]


def test_what_is_too_bright_is_white_and_levels_are_rounded() -> None:
    for made, level in ((2.0, 255), (-1.0, 0), (0.5, 128), (100.4 / 255, 100), (100.6 / 255, 101)):
        with Upscaler(Path("x"), 1, partial(torch.full_like, fill_value=made)).on(CPU) as larger:
            assert (larger(picture(8, 8)) == level).all()


def test_a_model_is_on_its_device_while_it_is_used() -> None:
    where: list[str] = []

    class Module:
        def to(self, device: torch.device) -> None:
            where.append(str(device))

        def cpu(self) -> None:
            where.append("home")

    module: Any = Module()
    with pytest.raises(KeyboardInterrupt), Upscaler(Path("x"), 2, twice, module=module).on(torch.device("meta")):
        raise KeyboardInterrupt
    assert where == ["meta", "home"]


def test_a_picture_of_another_size_is_none() -> None:
    with (
        Upscaler(Path("x.pth"), 4, twice).on(CPU) as enlarge,
        pytest.raises(UserError, match="makes no pictures of what it is given"),
    ):
        enlarge(picture(8, 8))
    assert Upscaler(Path("x"), 4, twice).size(MOST_SIDE // 4, 16) == (8192, 64)
    for size in ((2049, 16), (16, 2049)):
        with pytest.raises(UserError, match="players take 8192 pixels"):
            Upscaler(Path("x"), 4, twice).size(*size)


@pytest.mark.parametrize(
    ("channels", "tiling", "tiles"),
    [
        ((3, 3), "supported", (512, 256, 128)),
        ((3, 3), "internal", ()),
        ((1, 3), "supported", None),
        ((3, 4), "x", None),
    ],
)
def test_a_model_of_colour_pictures_may_be_given_pieces_where_it_says_so(
    channels: tuple[int, int], tiling: str, tiles: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Descriptor(SimpleNamespace):
        pass

    made = Descriptor(input_channels=channels[0], output_channels=channels[1], scale=4, tiling=tiling, model="module")
    package = SimpleNamespace(
        canonicalize_state_dict=lambda state: state,
        ModelLoader=lambda device: SimpleNamespace(load_from_state_dict=lambda state: made),
        UnsupportedModelError=KeyError,
        ImageModelDescriptor=Descriptor,
        ModelTiling=SimpleNamespace(SUPPORTED="supported"),
    )
    monkeypatch.setattr("wan.upscaling._spandrel", lambda: package)
    monkeypatch.setattr("wan.upscaling.read_state", lambda file: {})
    (file := tmp_path / "x.PTH").touch()
    if tiles is None:
        with pytest.raises(UserError, match="does not make colour pictures of colour pictures"):
            open_upscaler(str(file))
    else:
        upscaler: Any = open_upscaler(str(file))
        assert (upscaler.file, upscaler.scale, upscaler.tiles, upscaler.module) == (file, 4, tiles, "module")


def test_what_is_no_picture_is_refused() -> None:
    upscaler = Upscaler(Path("x.pth"), 2, lambda pixels: twice(pixels) * torch.nan)
    with upscaler.on(CPU) as enlarge, pytest.raises(UserError, match="makes no pictures"):
        enlarge(picture())


# --- a video


def test_rate_and_sound_stay_as_they_are(tmp_path: Path) -> None:
    source, target = tmp_path / "a.mp4", tmp_path / "larger.mp4"
    recording(source, [number / 24 for number in range(48)], sound=beeps(3, [0.5, 2.5]))  # also after the last picture
    upscale(source, target, Upscaler(tmp_path / "a.mp4", 2, twice), CPU, of="a")
    before, after = media.probe(source), media.probe(target)
    assert (after.width, after.height, after.fps) == (2 * before.width, 2 * before.height, before.fps)
    assert frames_in(target) == frames_in(source)
    assert beeps_in(target) == pytest.approx(beeps_in(source), abs=0.01)
    assert beeps_in(source) == pytest.approx([0.5, 2.5], abs=0.05)
    last = np.asarray(media.read_last_frame(target)).astype(int)
    wanted = np.asarray(media.read_last_frame(source)).repeat(2, 0).repeat(2, 1)
    assert np.abs(last - wanted).mean() < 2  # H.264 at crf 17
    record = json.loads((tmp_path / "larger.json").read_text())
    assert (record["upscaled"], record["of"], record["video_digest"]) == ("a.mp4", "a", file_digest(target))


# --- a file of weights


@pytest.fixture
def spandrel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself. Two of its models, which are not used here, take names from torchvision as it is imported,
    and PyTorch's builds for the CPU need another torchvision than the index has."""
    try:
        installed = [importlib.metadata.distribution(name) for name in ("spandrel", "einops")]
    except importlib.metadata.PackageNotFoundError:
        if "CI" in os.environ:  # `make test` installs them: there these tests may not be left out
            raise
        pytest.skip("spandrel is not installed")
    functional: Any = ModuleType("torchvision.transforms.functional")
    functional.InterpolationMode = functional.rotate = functional.normalize = None
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    package = importlib.import_module("spandrel")  # and no stand-in that another test has left
    assert package.__file__ == str(installed[0].locate_file("spandrel/__init__.py"))


@pytest.mark.parametrize("name", ["compact.safetensors", "compact.pth"])
def test_a_model_that_spandrel_knows_is_what_it_is(spandrel: None, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if file.suffix == ".pth":
        torch.save({"params_ema": nearest_upscaler(), "iter": 1000}, file)
    else:
        save_file(nearest_upscaler(), file)
    upscaler = open_upscaler(str(file))
    given = picture()
    with upscaler.on(CPU) as enlarge:
        assert upscaler.scale == 2 and np.array_equal(enlarge(given), given.repeat(2, 0).repeat(2, 1))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is none of the models that spandrel knows"):
        open_upscaler(str(tmp_path / "other.safetensors"))


class _Touches:
    """A pickle that does something when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_file_is_executed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(world))
    for name in ("model.pth", "model.pt"):
        for protocol in ("torch", "pickle"):
            file, mark = tmp_path / name, tmp_path / "mark"
            if protocol == "torch":
                torch.save({"params": _Touches(mark)}, file)
            else:
                file.write_bytes(pickle.dumps(_Touches(mark), protocol=2))
            with pytest.raises(UserError, match="cannot be read"):
                open_upscaler(str(file))
            assert not mark.exists()


# --- whole commands


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--upscale nowhere.pth",
            "error: --upscale nowhere.pth is no file of weights; give one in .safetensors or .pth",
        ),
        ("--upscale red.png", "error: --upscale red.png is no file of weights"),
        ("--upscale light.safetensors", "error: --upscale light.safetensors is none of the models that spandrel knows"),
    ],
)
@pytest.mark.parametrize("generate", [False, True])
def test_a_model_that_cannot_be_used_is_refused_before_any_work(
    command: Callable[..., Seen], words: str, message: str, generate: bool
) -> None:
    seen = command(words, generate=generate)
    assert seen.code == 2 and message in seen.output and not seen.requests and not seen.folder.exists()


def test_without_the_package_it_says_what_to_install(
    command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    seen = command("--upscale larger.safetensors")
    assert seen.code == 2 and not seen.requests
    assert '--upscale needs the package spandrel: pip install -e ".[finish]" in the project' in seen.output


def test_pictures_that_no_player_takes_are_refused() -> None:
    upscaler = Upscaler(Path("x4.pth"), 4, twice)
    assert upscaler.size(1280, 720) == (5120, 2880)
    with pytest.raises(UserError, match=f"x4.pth makes pictures of 8320x1920, and players take {MOST_SIDE} pixels a"):
        upscaler.size(2080, 480)


def test_a_chain_keeps_what_it_hands_on_and_its_larger_video_follows_it(command: Callable[..., Seen]) -> None:
    plain = command("")
    states = {number: file_digest(clip.state) for number, clip in plain.clips.items()}
    foreign = plain.folder / "joined_upscaled.mp4"
    foreign.write_bytes(b"theirs")

    dry = command("--upscale larger.safetensors --dry_run")
    assert "joined_upscaled.mp4: 128x64 by larger.safetensors, about 0 MiB" in dry.output.splitlines()

    first = command("--upscale larger.safetensors")
    larger = first.folder / "joined_upscaled.mp4"
    assert first.output.splitlines() == [str(first.folder / "joined.mp4"), str(larger)] and not first.requests
    assert (first.folder / "redone" / "joined_upscaled.mp4").read_bytes() == b"theirs"
    assert frames_in(larger) == frames_in(first.folder / "joined.mp4") == 17
    assert {number: file_digest(clip.state) for number, clip in first.clips.items()} == states
    assert json.loads(metadata(larger)["comment"])["model"] == "larger.safetensors"

    written = larger.stat().st_mtime_ns
    assert command("--upscale larger.safetensors").code == 0 and larger.stat().st_mtime_ns == written

    # it grows with the joined video
    assert command("--upscale larger.safetensors --num_videos 3 --no_video_metadata").code == 0
    assert frames_in(larger) == 25 and metadata(larger).get("comment") is None
    assert len(list((first.folder / "redone").glob("joined_upscaled*.mp4"))) == 1


def of_job(**settings: Any) -> Any:
    """The upscaling of a job with these settings, by a model that makes pictures twice as large."""
    job: Any = SimpleNamespace(settings=Settings(upscale="larger.safetensors", **settings))
    return Upscaling(job, Geometry(5, 480, 832, (4, 8, 8)))


def test_what_a_larger_video_takes_is_told_from_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.commands.finishing.open_upscaler", lambda path: Upscaler(Path(path), 2, twice))
    # 0.03 bytes for each of the 1664 x 960 pixels of 153 frames
    line = "joined_upscaled.mp4: 1664x960 by larger.safetensors, about 7 MiB"
    assert of_job().outline("joined_upscaled.mp4", 153) == line and round(0.03 * 1664 * 960 * 153 / 2**20) == 7


@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_counts_the_frames_that_are_made_larger(quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.commands.finishing.open_upscaler", lambda path: Upscaler(Path(path), 2, twice))
    monkeypatch.setattr(media, "probe", lambda video: SimpleNamespace(duration=1.25, fps=Fraction(24)))
    begun: list[Any] = []
    steps: list[Step] = []

    @contextmanager
    def watch(title: str, clips: int, quiet: bool) -> Iterator[Any]:
        begun.append((title, clips, quiet))
        yield steps.append

    with of_job(quiet=quiet)._progress(Path("a/joined.mp4"), watch) as on_frame:
        for _ in range(3):
            on_frame()
    assert begun == [("joined.mp4", 0, quiet)]
    assert [(step.index, step.total, step.stage) for step in steps] == [(n, 30, "upscale") for n in (0, 1, 2)]


def test_a_larger_video_is_made_again_unless_it_is_of_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.commands.finishing.open_upscaler", lambda path: Upscaler(Path(path), 2, twice))
    monkeypatch.setattr("wan.commands.finishing.main_device", lambda rank: CPU)
    made: list[Any] = []
    monkeypatch.setattr("wan.commands.finishing.upscale", lambda *what, **how: made.append((what[:2], how)))
    aside: list[Any] = []
    folder = SimpleNamespace(path=tmp_path, set_aside=lambda *names: aside.append(names))
    run: Any = SimpleNamespace(folder=folder, joined=SimpleNamespace(made_of=["a", "b"]))
    upscaling = of_job(no_video_metadata=True)
    upscaling._job.world = SimpleNamespace(local_rank=0)
    monkeypatch.setattr(upscaling, "_progress", lambda video, watch: nullcontext())
    target = tmp_path / "joined_upscaled.mp4"
    for before, is_made, is_aside in (
        (["a", "b"], False, False),
        (["a"], True, False),  # its beginning
        (["b"], True, True),
        ([], True, True),
        (None, True, True),
        ("a", True, True),
        (["a", "b", "c"], True, True),
    ):
        monkeypatch.setattr("wan.commands.finishing.made_of", lambda *_, before=before: before)
        made.clear()
        aside.clear()
        assert upscaling.of_chain(run, None) == target
        assert (bool(made), bool(aside)) == (is_made, is_aside), before
    ((files, how),) = made
    assert files == (tmp_path / "joined.mp4", target) and (how["of"], how["metadata"]) == (["a", "b"], False)


def test_what_a_larger_video_was_made_of_counts_while_it_is_what_was_written(tmp_path: Path) -> None:
    model, video = tmp_path / "x2.safetensors", tmp_path / "a.mp4"
    upscaler, record = Upscaler(model, 2, twice), video.with_suffix(".json")
    model.write_bytes(b"weights")
    video.write_bytes(b"a video")
    whole = {"of": ["a"], "model_digest": file_digest(model), "video_digest": file_digest(video)}
    for written, of in (
        (None, None),
        (whole, ["a"]),
        (whole | {"model_digest": "of another model"}, None),
        (whole | {"video_digest": "of another video"}, None),
        ([1], None),
    ):
        if written is not None:
            record.write_text(json.dumps(written))
        assert made_of(video, upscaler) == of
    record.write_text(json.dumps(whole))
    video.unlink()
    assert made_of(video, upscaler) is None


def test_a_chain_that_is_not_finished_is_not_enlarged(
    command: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    going = iter([True, False])
    monkeypatch.setattr("wan.commands.steering.Steering.goes_on", lambda self: next(going))
    seen = command("--upscale larger.safetensors")
    assert seen.code == 0 and len(seen.clips) == 1 and not (seen.folder / "joined_upscaled.mp4").exists()


def test_a_single_clip_is_enlarged_beside_its_own_file(command: Callable[..., Seen], world: Path) -> None:
    seen = command("--save_file small.mp4 --upscale larger.safetensors", generate=True)
    assert seen.output.splitlines() == ["small.mp4", "small_upscaled.mp4"]
    with av.open(str(world / "small_upscaled.mp4")) as opened:
        assert (opened.streams.video[0].width, opened.streams.video[0].height) == (128, 64)
    assert command("--save_file small.mp4 --upscale larger.safetensors", generate=True).code == 0  # ours
    dry = command("--save_file small.mp4 --upscale larger.safetensors --dry_run", generate=True).output
    assert dry.endswith("\nsmall_upscaled.mp4: 128x64 by larger.safetensors, about 0 MiB\n")
    (world / "new_upscaled.mp4").write_bytes(b"theirs")
    seen = command("--save_file new.mp4 --upscale larger.safetensors", generate=True)
    assert seen.code == 2 and "new_upscaled.mp4 is there already" in seen.output and not seen.requests
