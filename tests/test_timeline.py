"""The planner of joined videos, by itself and with numbered frames in real files."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.media_samples import number, numbered
from wan import media
from wan.errors import UserError
from wan.timeline import Part, Timeline, shared_rate

RATES = [Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(50)]
RATES += [Fraction(60), Fraction(10), Fraction(25, 2), Fraction(15)]
MODELS = [Fraction(16), Fraction(24)]
DROPS = [0, 1, 5, 9, 13, 17]


def test_counts_are_those_of_every_mode() -> None:
    def total(drop: int, clips: int, first: int = 0) -> int:
        parts = [Part(81, Fraction(16), first), *[Part(81, Fraction(16), drop)] * (clips - 1)]
        return Timeline(parts, Fraction(16)).count

    assert total(1, 12) == 81 + 80 * 11 and total(5, 12) == 81 + 76 * 11 and total(9, 12) == 81 + 72 * 11
    assert total(5, 12, first=5) == 76 * 12  # continuing a video: 57 seconds at 16 frames per second
    assert total(0, 2) == 162


def test_more_cannot_be_left_out_than_is_there() -> None:
    with pytest.raises(ValueError, match="17 of 17"):
        Part(17, Fraction(16), 17)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("source", RATES)
def test_the_shared_rate_shows_source_frames_equally_often(source: Fraction, model: Fraction) -> None:
    rate = shared_rate(source, model)
    assert (rate / source).denominator == 1 and rate >= model * Fraction(99, 100)
    assert rate == source or rate - source < model * Fraction(99, 100)  # the smallest such multiple


@settings(max_examples=300, deadline=None)
@given(
    source=st.sampled_from([None, *RATES]),
    model=st.sampled_from(MODELS),
    source_frames=st.integers(1, 90),
    clips=st.lists(st.tuples(st.integers(5, 31), st.sampled_from(DROPS)), min_size=1, max_size=6),
)
def test_every_new_frame_is_shown_once_in_order_and_at_its_own_time(
    source: Fraction | None, model: Fraction, source_frames: int, clips: list[tuple[int, int]]
) -> None:
    parts = [Part(4 * length + 1, model, drop) for length, drop in clips]
    if source is not None:
        parts.insert(0, Part(source_frames, source))
    rate = model if source is None else shared_rate(source, model)
    timeline = Timeline(parts, rate)
    shown = list(timeline.frames())
    assert len(shown) == timeline.count
    assert all(a <= b for a, b in pairwise(shown))
    new = [(index, frame) for index, part in enumerate(parts) for frame in range(part.drop, part.frames)]
    missing = len(new) - len(dict.fromkeys(shown))
    assert set(shown) <= set(new)
    assert missing <= max(0, float(len(new) * (1 - rate / model))) + 1 if rate < model else missing == 0
    if source is not None:  # every source frame equally long, but the last, which stays for a frame of the model
        lengths = [shown.count((0, frame)) for frame in range(source_frames)]
        assert set(lengths[:-1]) <= {int(rate / source)}
    starts = timeline.starts
    for output, (index, frame) in enumerate(shown):
        moment = starts[index] + parts[index].moment(frame) - parts[index].moment(parts[index].drop)
        assert moment <= Fraction(output) / rate + Fraction(1, 2) / rate  # never early by more than half a frame
        assert Fraction(output) / rate - moment <= 1 / min(parts[index].fps, model) + Fraction(1, 2) / rate
    seconds = sum((part.new / part.fps for part in parts), Fraction(0))
    if source is not None and parts[1].drop:
        seconds += 1 / model - 1 / source  # the source's last frame is the model's first
    assert abs(Fraction(timeline.count) / rate - seconds) <= Fraction(1, 2) / rate


def clip(path: Path, numbers: range, fps: Fraction, drop: int) -> Path:
    media.write_video(path, numbered(numbers, 64, 36), fps, keyframes=frozenset({0, drop}))
    return path


def numbers_in(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


@pytest.mark.parametrize("drop", [1, 5, 9, 17])
@pytest.mark.parametrize("count", [1, 3])
def test_joined_clips_hold_every_frame_once(count: int, drop: int, tmp_path: Path) -> None:
    """Frame n of the story is drawn as number n; each clip repeats `drop` frames of the one before."""
    frames, begin, paths = 21, 0, []
    for index in range(count):
        paths.append(clip(tmp_path / f"{index}.mp4", range(begin, begin + frames), Fraction(16), drop))
        begin += frames - drop
    written = media.join_videos(paths, tmp_path / "joined.mp4", drops=[0] + [drop] * (count - 1))
    story = list(range(frames + (count - 1) * (frames - drop)))
    assert numbers_in(tmp_path / "joined.mp4") == story and written == len(story)
    parts = [Part(frames, Fraction(16), drop if index else 0) for index in range(count)]
    assert Timeline(parts, Fraction(16)).count == written


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from(RATES),
    model=st.sampled_from(MODELS),
    source_frames=st.integers(2, 20),
    drops=st.lists(st.sampled_from([1, 5, 9]), min_size=1, max_size=2),
)
def test_assembled_with_its_source_every_frame_is_where_the_planner_says(
    source: Fraction, model: Fraction, source_frames: int, drops: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("assembly")
    media.write_video(folder / "source.mp4", numbered(range(source_frames), 128, 72), source)
    paths, begin, parts = [], 1000, [Part(source_frames, source)]
    for index, drop in enumerate(drops):
        paths.append(clip(folder / f"{index}.mp4", range(begin, begin + 13), model, drop))
        parts.append(Part(13, model, drop))
        begin += 1000
    written = media.assemble(folder / "source.mp4", paths, folder / "joined.mp4", drops=drops)
    expected = [frame + 1000 * part for part, frame in Timeline(parts, shared_rate(source, model)).frames()]
    assert numbers_in(folder / "joined.mp4") == expected and written == len(expected)


def test_the_source_is_cropped_to_the_size_of_the_clips_and_keeps_its_colours(tmp_path: Path) -> None:
    wide = np.full((90, 320, 3), 128, np.uint8)
    wide[:, :80], wide[:, 240:] = 255, 0  # outside the middle half
    media.write_video(tmp_path / "source.mp4", [wide] * 4, 16)
    clip(tmp_path / "clip.mp4", range(5), Fraction(16), 1)
    media.assemble(tmp_path / "source.mp4", [tmp_path / "clip.mp4"], tmp_path / "joined.mp4", drops=[1])
    first = media.sample_frames(tmp_path / "joined.mp4", 8)[0]
    assert first.shape == (36, 64, 3) and abs(first[8:28, 8:56].astype(int) - 128).max() <= 3
    assert media.probe(tmp_path / "joined.mp4").fps == 16


def with_sound(path: Path, codec: str, seconds: int = 2, delay: float = 0.0) -> None:
    """A video of 25 frames per second with a tone that begins after a second."""
    container = av.open(str(path), "w")
    video = container.add_stream("libx264", rate=25)
    video.width, video.height, video.pix_fmt = 64, 36, "yuv420p"
    audio = container.add_stream(codec, rate=48000)
    audio.layout = "mono"
    samples = np.sin(np.arange(48000 * seconds) / 48000 * 2 * np.pi * 440)
    samples[: 48000 - round(48000 * delay)] = 0
    for picture in numbered(range(25 * seconds), 64, 36):
        container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
    container.mux(video.encode(None))
    levels = (samples * 20000).astype(np.int16)
    for start in range(0, len(levels), 1024):
        frame = av.AudioFrame.from_ndarray(levels[None, start : start + 1024], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, start + round(48000 * delay), Fraction(1, 48000)
        container.mux(audio.encode(frame))
    container.mux(audio.encode(None))
    container.close()


def tone_begins(path: Path) -> tuple[str, float, float]:
    """Codec, the second at which the sound gets loud, and its end."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        found, end = -1.0, 0.0
        for frame in container.decode(stream):
            levels = frame.to_ndarray().astype(np.float64).ravel()
            loud = np.flatnonzero(np.abs(levels) > (2000 if levels.max() > 2 else 0.1))
            if found < 0 and len(loud):
                found = frame.time + loud[0] / frame.sample_rate
            end = frame.time + frame.samples / frame.sample_rate
        return stream.codec_context.name, found, end


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("b.mkv", "flac"), ("c.mov", "pcm_s16le"), ("d.mkv", "mp3")]
)
@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_the_sound_of_the_source_stays_with_its_pictures(name: str, codec: str, delay: float, tmp_path: Path) -> None:
    with_sound(tmp_path / name, codec, delay=delay)
    clip(tmp_path / "clip.mp4", range(81), Fraction(16), 1)
    media.assemble(tmp_path / name, [tmp_path / "clip.mp4"], tmp_path / "joined.mp4", drops=[1])
    copied, begins, ends = tone_begins(tmp_path / "joined.mp4")
    assert "mp3" in copied if codec == "mp3" else copied == "aac"
    assert abs(begins - 1.0) < 0.06 and abs(ends - 2.0) < 0.15  # of seven seconds of pictures
    assert media.probe(tmp_path / "joined.mp4").duration == pytest.approx(7, abs=0.1)


def test_clips_of_another_size_are_refused(tmp_path: Path) -> None:
    media.write_video(tmp_path / "source.mp4", numbered(range(3), 64, 36), 16)
    clip(tmp_path / "one.mp4", range(5), Fraction(16), 1)
    media.write_video(tmp_path / "two.mp4", numbered(range(5), 128, 72), 16)
    with pytest.raises(UserError, match="size differs"):
        media.assemble(
            tmp_path / "source.mp4", [tmp_path / "one.mp4", tmp_path / "two.mp4"], tmp_path / "j.mp4", drops=[1, 1]
        )
    assert not (tmp_path / "j.mp4").exists()
