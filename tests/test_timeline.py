"""The planner of joined videos, by itself and with numbered frames in real files."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.media_samples import (
    CORPUS,
    add_audio,
    beeps,
    beeps_in,
    moment_of,
    number,
    numbered,
    recording,
    samples,
)
from wan import files, media
from wan.errors import UserError
from wan.media import assembly, source
from wan.timeline import Part, Timeline, shared_rate

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("drop", [0, 1, 5])
def test_a_last_frame_that_is_held_stays_that_long(drop: int) -> None:
    timeline = Timeline([Part(31, Fraction(30), stay=Fraction(4)), Part(17, Fraction(16), drop)], Fraction(30))
    shown = list(timeline.frames())
    assert timeline.starts == [0, 5] and shown.count((0, 30)) == 120 and shown[150] == (1, drop)
    still = Timeline([Part(1, Fraction(16), stay=Fraction(3))], Fraction(16))
    assert list(still.frames()) == [(0, 0)] * 48


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("source", RATES)
def test_the_shared_rate_shows_source_frames_equally_often(source: Fraction, model: Fraction) -> None:
    rate = shared_rate(source, model)
    enough = model * Fraction(998, 1000)
    assert (rate / source).denominator == 1 and rate >= enough
    assert rate == source or rate - source < enough  # the smallest such multiple


@pytest.mark.parametrize(
    ("source", "model", "rate"),
    [
        (24, 24, 24),
        (24, 16, 24),
        (15, 24, 30),
        (Fraction(24000, 1001), 24, Fraction(24000, 1001)),
        (Fraction(499, 500) * 24, 24, Fraction(499, 500) * 24),  # counts as 24
        (Fraction(499, 500) * 24 - Fraction(1, 1000), 24, 2 * (Fraction(499, 500) * 24 - Fraction(1, 1000))),
        (Fraction(501, 500) * 24, 24, Fraction(501, 500) * 24),
    ],
)
def test_rates_that_differ_by_a_thousandth_are_one(source: Fraction, model: int, rate: Fraction) -> None:
    assert shared_rate(Fraction(source), Fraction(model)) == rate


def test_a_part_of_nearly_the_timeline_s_rate_takes_it() -> None:
    rate = Fraction(24)
    for fps, taken in (
        (Fraction(501, 500) * rate, rate),
        (Fraction(499, 500) * rate, rate),
        (Fraction(503, 500) * rate, Fraction(503, 500) * rate),
        (Fraction(497, 500) * rate, Fraction(497, 500) * rate),
    ):
        assert [part.fps for part in Timeline([Part(3, fps)], rate).parts] == [taken]


def test_a_part_is_as_long_as_its_new_frames_and_has_its_own_moments() -> None:
    assert Part(17, Fraction(16), 5).new == 12 and Part(1, Fraction(16)).new == 1
    assert Part(3, Fraction(10)).moment(2) == Fraction(1, 5)
    uneven = Part(3, Fraction(10), moments=(Fraction(0), Fraction(1, 2), Fraction(3, 5)))
    timeline = Timeline([uneven, Part(2, Fraction(10), 1)], Fraction(10))
    # half a second, a tenth, and the last for its usual time; then the other's one new frame
    assert list(timeline.frames()) == [(0, 0)] * 5 + [(0, 1), (0, 2), (1, 1)] and timeline.count == 8
    for drop in (-1, 17):
        with pytest.raises(ValueError, match=f"{drop} of 17 frames"):
            Part(17, Fraction(16), drop)


@settings(max_examples=300, deadline=None)
@given(
    source=st.sampled_from([None, *RATES]),
    model=st.sampled_from(MODELS),
    source_frames=st.integers(1, 90),
    clips=st.lists(st.tuples(st.integers(5, 31), st.sampled_from(DROPS)), min_size=1, max_size=6),
    stay=st.sampled_from([Fraction(0), Fraction(1), Fraction(10, 3)]),
)
def test_every_new_frame_is_shown_once_in_order_and_at_its_own_time(
    source: Fraction | None, model: Fraction, source_frames: int, clips: list[tuple[int, int]], stay: Fraction
) -> None:
    parts = [Part(4 * length + 1, model, drop) for length, drop in clips]
    if source is not None:
        parts.insert(0, Part(source_frames, source, stay=stay))
    rate = model if source is None else shared_rate(source, model)
    timeline = Timeline(parts, rate)
    shown = list(timeline.frames())
    assert len(shown) == timeline.count
    assert all(a <= b for a, b in pairwise(shown))
    new = [(index, frame) for index, part in enumerate(parts) for frame in range(part.drop, part.frames)]
    assert list(dict.fromkeys(shown)) == new  # none is lost, none is doubled at a seam
    if source is not None:  # every source frame equally long, but the last, which stays for a frame of the model
        lengths = [shown.count((0, frame)) for frame in range(source_frames)]
        assert set(lengths[:-1]) <= {int(rate / source)}
    starts, placed, model = timeline.starts, timeline.parts, timeline.parts[-1].fps
    for output, (index, frame) in enumerate(shown):
        moment = starts[index] + placed[index].moment(frame) - placed[index].moment(placed[index].drop)
        assert moment <= Fraction(output) / rate + Fraction(1, 2) / rate  # never early by more than half a frame
        held = max(1 / min(placed[index].fps, model), placed[index].stay)
        assert Fraction(output) / rate - moment <= held + Fraction(1, 2) / rate
    seconds = sum((part.new / part.fps for part in placed), Fraction(0))
    if source is not None:
        # the source's last frame is the model's first, unless it is held
        seconds += max(1 / model if placed[1].drop else 1 / placed[0].fps, stay) - 1 / placed[0].fps
    assert abs(Fraction(timeline.count) / rate - seconds) <= Fraction(1, 2) / rate


def test_film_at_24_loses_no_frame_to_23_976() -> None:
    film, clips = Fraction(24000, 1001), [Part(121, Fraction(24), 1)] * 12
    timeline = Timeline([Part(48, film), *clips], shared_rate(film, Fraction(24)))
    assert timeline.rate == film and timeline.count == 48 + 120 * 12 == len(set(timeline.frames()))


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


def with_sound(
    path: Path, codec: str, delay: float = 0.0, rate: int = 48000, silent: float = 1.0, *, whole: bool = True
) -> None:
    """Two seconds of 25 frames each, with two seconds of sound that begin after `delay`: a tone from `silent` on.

    Not `whole`, the first keyframe is missing, and nothing is shown before the next one, 12 frames later.
    """
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"bf": "0", "g": "12", "x264-params": "scenecut=0"})
        video.width, video.height, video.pix_fmt = 64, 36, "yuv420p"
        audio = add_audio(container, codec, rate)
        moments = np.arange(2 * rate) / rate + delay
        levels = (np.sin(2 * np.pi * 440 * moments) * 20000 * (moments >= silent)).astype(np.int16)
        packets = []
        for picture in numbered(range(50), 64, 36):
            packets += video.encode(av.VideoFrame.from_ndarray(picture, "rgb24"))
        for start in range(0, len(levels), 1024):
            frame = av.AudioFrame.from_ndarray(levels[None, start : start + 1024], "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start + round(rate * delay), Fraction(1, rate)
            packets += audio.encode(frame)
        packets += [*video.encode(None), *audio.encode(None)]
        for packet in sorted(packets, key=lambda packet: moment_of(packet.dts, packet.time_base)):
            if whole or packet.stream is not video or moment_of(packet.pts, packet.time_base) > 0:
                container.mux(packet)


def tone_begins(path: Path) -> tuple[str, float, float]:
    """Codec, the second at which the sound gets loud, and its end."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        start, end = -1.0, 0.0
        for frame in container.decode(stream):
            begin = frame.time
            assert begin is not None
            levels = frame.to_ndarray().astype(np.float64).ravel()
            loud = np.flatnonzero(np.abs(levels) > (2000 if levels.max() > 2 else 0.1))
            if start < 0 and len(loud):
                start = begin + loud[0] / frame.sample_rate
            end = begin + frame.samples / frame.sample_rate
        return stream.codec_context.name, start, end


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


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("b.mkv", "flac"), ("c.mov", "pcm_s16le")])
def test_sound_stays_with_pictures_that_are_shown_later_than_their_stream_begins(
    name: str, codec: str, tmp_path: Path
) -> None:
    with_sound(tmp_path / name, codec, whole=False)
    clip(tmp_path / "clip.mp4", range(81), Fraction(16), 1)
    media.assemble(tmp_path / name, [tmp_path / "clip.mp4"], tmp_path / "joined.mp4", drops=[1])
    _, begins, _ = tone_begins(tmp_path / "joined.mp4")
    assert abs(begins - (1.0 - 12 / 25)) < 0.06


def test_so_it_does_in_a_video_that_is_rewritten(tmp_path: Path) -> None:
    with_sound(tmp_path / "a.mp4", "aac", whole=False)
    media.rewrite_video(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda picture: picture)
    _, begins, _ = tone_begins(tmp_path / "b.mp4")
    assert abs(begins - (1.0 - 12 / 25)) < 0.06


def test_clips_of_another_size_are_refused(tmp_path: Path) -> None:
    media.write_video(tmp_path / "source.mp4", numbered(range(3), 64, 36), 16)
    clip(tmp_path / "one.mp4", range(5), Fraction(16), 1)
    media.write_video(tmp_path / "two.mp4", numbered(range(5), 128, 72), 16)
    with pytest.raises(UserError, match="size differs"):
        media.assemble(
            tmp_path / "source.mp4", [tmp_path / "one.mp4", tmp_path / "two.mp4"], tmp_path / "j.mp4", drops=[1, 1]
        )
    assert not (tmp_path / "j.mp4").exists()


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("d.mp4", "ac3")])
def test_sound_that_is_copied_is_the_same_from_the_first_sample(name: str, codec: str, tmp_path: Path) -> None:
    """A decoder needs the packet before the first: without it the beginning is garbled."""
    with_sound(tmp_path / name, codec, silent=0)
    clip(tmp_path / "clip.mp4", range(5), Fraction(16), 1)
    media.assemble(tmp_path / name, [tmp_path / "clip.mp4"], tmp_path / "joined.mp4", drops=[1])
    before, after = (samples(tmp_path / file) for file in (name, "joined.mp4"))
    assert np.abs(before[:48000] - after[:48000]).max() < 0.03


def test_odd_sample_rates_are_encoded_at_the_next_one_of_aac(tmp_path: Path) -> None:
    with_sound(tmp_path / "a.mkv", "pcm_s16le", rate=37800)
    clip(tmp_path / "clip.mp4", range(5), Fraction(16), 1)
    media.assemble(tmp_path / "a.mkv", [tmp_path / "clip.mp4"], tmp_path / "joined.mp4", drops=[1])
    codec, begins, _ = tone_begins(tmp_path / "joined.mp4")
    assert codec == "aac" and abs(begins - 1.0) < 0.06


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sound_that_begins_after_the_source_is_left_out(codec: str, tmp_path: Path) -> None:
    with_sound(tmp_path / "a.mov", codec, delay=3.0)
    clip(tmp_path / "clip.mp4", range(81), Fraction(16), 1)
    media.assemble(tmp_path / "a.mov", [tmp_path / "clip.mp4"], tmp_path / "joined.mp4", drops=[1])
    assert not media.probe(tmp_path / "joined.mp4").has_audio


def test_a_source_of_uneven_times_loses_no_frame_and_keeps_its_pace(tmp_path: Path) -> None:
    """vfr.mp4: 20 frames 1/30 s apart, then 1/10 s, and 2 s before the last."""
    media.write_video(tmp_path / "clip.mp4", numbered(range(1000, 1009), 320, 180), 16, keyframes=frozenset({0, 1}))
    media.assemble(CORPUS / "vfr.mp4", [tmp_path / "clip.mp4"], tmp_path / "joined.mp4", drops=[1])
    shown = numbers_in(tmp_path / "joined.mp4")
    lengths = [shown.count(frame) for frame in range(39)]
    assert media.probe(tmp_path / "joined.mp4").fps == 30
    assert set(lengths[:19]) == {1} and set(lengths[20:38]) == {3} and 59 <= lengths[38] <= 63
    assert set(shown) == {*range(40), *range(1001, 1009)}


def test_a_damaged_source_ends_with_the_picture_that_was_continued(tmp_path: Path) -> None:
    media.write_video(tmp_path / "clip.mp4", numbered(range(1000, 1009), 320, 180), 16, keyframes=frozenset({0, 1}))
    media.assemble(CORPUS / "trunc_moov_front.mp4", [tmp_path / "clip.mp4"], tmp_path / "joined.mp4", drops=[1])
    numbers = [frame for frame in numbers_in(tmp_path / "joined.mp4") if frame < 1000]
    assert numbers[-1] == number(media.read_last_frame(CORPUS / "trunc_moov_front.mp4"))


def assembled(source: Path, folder: Path) -> tuple[list[int], Fraction]:
    """The source with one clip whose pictures count from 1001: the numbers shown, and the rate."""
    clip(folder / "clip.mp4", range(1000, 1009), Fraction(16), 1)
    media.assemble(source, [folder / "clip.mp4"], folder / "joined.mp4", drops=[1])
    return numbers_in(folder / "joined.mp4"), media.probe(folder / "joined.mp4").fps


HELD = [frame / 30 for frame in range(31)]  # pictures of a screen that stands still from one second on


UNEVEN = [*(frame / 30 for frame in range(24)), 0.8, 0.9, 0.95, 1.0]  # as a phone records its screen


@pytest.mark.parametrize(
    ("name", "video", "audio"),
    [
        ("a.mp4", "libx264", "aac"),
        ("a.mov", "libx264", "pcm_s16le"),
        ("a.mkv", "libx264", "flac"),
        ("a.webm", "libvpx-vp9", "libopus"),
        ("a.ts", "libx264", "aac"),
        ("a.flv", "libx264", "aac"),
    ],
)
@pytest.mark.parametrize(
    ("moments", "stated"), [(HELD, 4.0), (UNEVEN, 0.0)], ids=["the packet says it", "the sound says it"]
)
def test_a_picture_that_is_held_stays_on_screen_with_its_sound(
    moments: list[float], stated: float, name: str, video: str, audio: str, tmp_path: Path
) -> None:
    recording(tmp_path / name, moments, last=stated, sound=beeps(5, [0.5, 4.0]), video=video, audio=audio)
    shown, rate = assembled(tmp_path / name, tmp_path)
    begins = next(at for at, number in enumerate(shown) if number > 1000) / rate
    assert Fraction(499, 100) <= begins <= Fraction(51, 10)
    assert list(dict.fromkeys(shown)) == [*range(len(moments)), *range(1001, 1009)]
    assert beeps_in(tmp_path / "joined.mp4") == pytest.approx([0.5, 4.0], abs=0.03)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.flv", "a.avi"])
def test_a_silent_picture_is_held_as_its_file_says(name: str, tmp_path: Path) -> None:
    recording(tmp_path / name, HELD, last=4.0, video="mpeg4" if name == "a.avi" else "libx264")
    shown, rate = assembled(tmp_path / name, tmp_path)
    assert shown.index(1001) / rate == pytest.approx(5, abs=0.05)


def test_a_picture_is_held_no_longer_than_its_edit_list_says(tmp_path: Path) -> None:
    recording(tmp_path / "a.mp4", HELD, last=4.0)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"elst") + 12
    assert int.from_bytes(data[at : at + 4], "big") == 5000
    data[at : at + 4] = (3000).to_bytes(4, "big")
    (tmp_path / "a.mp4").write_bytes(data)
    shown, rate = assembled(tmp_path / "a.mp4", tmp_path)
    assert shown.index(1001) / rate == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_the_last_picture_of_an_animation_is_held(kind: str, tmp_path: Path) -> None:
    pictures = [Image.fromarray(picture) for picture in numbered(range(8), 64, 36)]
    lengths = [100] * 7 + [2500]
    path = tmp_path / f"a.{kind}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=lengths, loop=0, lossless=True)
    shown, rate = assembled(path, tmp_path)
    assert shown.index(1001) / rate == pytest.approx(3.2, abs=0.07)


@pytest.mark.parametrize(("name", "last"), [("a.mp4", 0.0), ("a.mkv", 0.0), ("a.mp4", 3.0), ("a.mkv", 3.0)])
def test_a_still_is_shown_for_as_long_as_its_narration(name: str, last: float, tmp_path: Path) -> None:
    recording(tmp_path / name, [0.0], last=last, sound=beeps(3, [0.5, 2.5]))
    shown, rate = assembled(tmp_path / name, tmp_path)
    assert set(shown) == {0, *range(1001, 1009)} and shown.index(1001) / rate == pytest.approx(3, abs=0.05)
    assert beeps_in(tmp_path / "joined.mp4") == pytest.approx([0.5, 2.5], abs=0.03)


@pytest.mark.parametrize(
    ("moments", "longer", "words"),
    [
        (HELD, 0.5, "the last 0.5 s of its sound"),
        (HELD, 2.0, "the last 1.9 s of its sound"),
        (UNEVEN, 2.0, "held for 2.0 s"),
    ],
    ids=["a film, half a second", "a film, two seconds", "a recording of a screen"],
)
def test_sound_after_the_last_picture_is_kept_or_missed_with_a_word(
    moments: list[float], longer: float, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files._say.cache_clear()
    recording(tmp_path / "a.mp4", moments, sound=beeps(1 + longer, [0.5]))
    shown, rate = assembled(tmp_path / "a.mp4", tmp_path)
    assert shown.index(1001) / rate == pytest.approx(1 + (longer if "held" in words else 1 / 16), abs=0.05)
    assert len([record for record in caplog.records if words in record.message]) == 1


def test_what_a_truncated_file_has_lost_is_not_held(tmp_path: Path) -> None:
    """Its header speaks of ten more pictures, a third of a second."""
    shown, rate = assembled(CORPUS / "trunc_moov_front.mp4", tmp_path)
    assert next(at for at, number in enumerate(shown) if number > 1000) <= 51 and rate == 30


def test_the_same_source_and_clips_give_the_same_file(tmp_path: Path) -> None:
    recording(tmp_path / "a.mkv", HELD, sound=beeps(1, [0.5]), audio="flac")
    seen = set()
    for _ in range(3):
        assembled(tmp_path / "a.mkv", tmp_path)
        seen.add((tmp_path / "joined.mp4").read_bytes())
    assert len(seen) == 1


def test_a_picture_that_a_later_pass_loses_is_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As damage does it: every pass decodes anew."""

    class Forgetful(source.Pictures):
        passes = 0

        def __iter__(self) -> Iterator[VideoFrame]:
            Forgetful.passes += 1
            frames = list(super().__iter__())
            return iter(frames[:-1] if Forgetful.passes == 2 else frames)  # after that of the clip's count

    monkeypatch.setattr(assembly, "Pictures", Forgetful)
    media.write_video(tmp_path / "a.mp4", numbered(range(4), 64, 36), 16)
    shown, _ = assembled(tmp_path / "a.mp4", tmp_path)
    assert shown == [0, 1, 2, 3, *range(1001, 1008), 1007]


def test_a_clip_is_joined_to_a_source_without_encoding_anything_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_sound(tmp_path / "source.mp4", "aac")
    parts = [
        clip(tmp_path / f"{index}.mp4", range(1000 * index, 1000 * index + 13), Fraction(16), 1) for index in (1, 2, 3)
    ]
    written = list[int]()
    write = media.writing.write_video

    def counted(*args: Any, **options: Any) -> int:
        written.append(write(*args, **options))
        return written[-1]

    monkeypatch.setattr("wan.media.assembly.write_video", counted)
    growing, whole = tmp_path / "growing.mp4", tmp_path / "whole.mp4"
    assembly = media.Assembly(tmp_path / "source.mp4", growing)
    for count in (1, 2, 3):
        assembly.renew(parts[:count], [1] * count)
        assert len(written) == 1 + count  # the source once, and each clip once
    assert media.assemble(tmp_path / "source.mp4", parts, whole, drops=[1, 1, 1]) == sum(written[:4])
    assert growing.read_bytes() == whole.read_bytes()  # however it came about
    assert media.probe(growing).has_audio and numbers_in(growing) == numbers_in(whole)
    assembly.renew([parts[0], parts[2]], [1, 1])  # another clip: all of it is joined anew
    assert len(written) == 8 + 3 and len(numbers_in(growing)) < len(numbers_in(whole))
    growing.unlink()
    assembly.renew([parts[0], parts[2]], [1, 1])
    assert growing.is_file() and not list(tmp_path.glob(".*"))
