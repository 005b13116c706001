"""Files that are written whole, named and told apart; what others wrote, of a size and a depth; sizes of clips."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from wan import files
from wan.errors import UserError
from wan.files import (
    as_json,
    as_text,
    digest_of,
    file_digest,
    fits_windows,
    link_or_copy,
    numbered,
    publish,
    readable,
    releasing,
    reserve,
    sampled_digest,
    say_once,
    something_else,
    unreadable,
    write_bytes,
    write_json,
    write_text,
)
from wan.foreign import count_numbered, fit, parse_json, parsing, read_bytes, read_json, shards, uncollected
from wan.sizes import begun_size, best_size, continued_size, exact_size, fills, official_size

MIB = 1 << 20


def test_a_digest_is_of_all_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000  # more than two MiB
    (file := tmp_path / "a").write_bytes(data)
    assert file_digest(file) == digest_of(data) == hashlib.sha256(data).hexdigest()[:16]


def test_a_large_file_is_known_by_its_size_its_beginning_its_middle_and_its_end(tmp_path: Path) -> None:
    def digest(size: int = 8 * MIB, at: int | None = None) -> str:
        with (tmp_path / "a").open("wb") as file:
            file.truncate(size)
            if at is not None:
                file.seek(at)
                file.write(b"x")
        return sampled_digest(tmp_path / "a")

    plain = digest()
    zeros = bytes(MIB)
    assert plain == hashlib.sha256(str(8 * MIB).encode() + 3 * zeros).hexdigest()[:16]
    for seen in (0, MIB - 1, 4 * MIB, 5 * MIB - 1, 7 * MIB, 8 * MIB - 1):
        assert digest(at=seen) != plain, seen
    for unseen in (MIB, 4 * MIB - 1, 5 * MIB, 7 * MIB - 1):
        assert digest(at=unseen) == plain, unseen
    assert (
        digest(8 * MIB + 1) != plain
        and digest(3) == hashlib.sha256(b"3" + bytes(3) + bytes(2) + bytes(3)).hexdigest()[:16]
    )


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        *((name, True) for name in ("a.mp4", "console", "com", "com12", "a.con", "com1a", ".a")),
        *(
            (name, False)
            for name in ("a.", "a ", "con", "CON", "nul.txt", "com1", "LPT9.a.b", "a:b", "a?", "a/b", 'a"')
        ),
        *((f"a{letter}b", False) for letter in "\\<>|*"),
    ],
)
def test_a_name_that_windows_may_have(name: str, fits: bool) -> None:
    assert fits_windows(name) == fits


def test_names_are_numbered_from_the_second_on() -> None:
    assert list(itertools.islice(numbered("a"), 3)) == ["a", "a_2", "a_3"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"name": "ü\udcff", "n": [1]})
    assert file.read_bytes() == b'{\n  "name": "\xc3\xbc\\udcff",\n  "n": [\n    1\n  ]\n}\n'
    assert as_json({"a": 1}) == b'{\n  "a": 1\n}\n' and as_text("ü\udcff") == b"\xc3\xbc\\udcff"
    write_text(file, "new")
    assert file.read_text() == "new"
    before = os.umask(0o022)
    try:
        write_bytes(tmp_path / "b", b"x")
        assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644
    finally:
        os.umask(before)
    synced: list[int] = []
    fsync = os.fsync

    def noted(number: int) -> None:
        synced.append(os.fstat(number).st_size)
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    write_bytes(file, b"12345")
    assert synced == [5], "on the disk before it has its name"

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(file, b"other")
    assert file.read_bytes() == b"12345" and sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b"]


def test_a_temporary_file_has_a_name_of_its_own(tmp_path: Path) -> None:
    one, other = reserve(tmp_path / "a.mp4"), reserve(tmp_path / "a.mp4")
    assert one != other and one.exists() and one.stat().st_size == 0
    assert one.name.startswith(".a.mp4.") and one.suffix == ".part" and len(one.name) == len(".a.mp4.12345678.part")
    one.write_bytes(b"x")
    publish(one, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == b"x" and not one.exists()


@pytest.mark.parametrize("linked", [True, False])
def test_a_second_name_is_a_link_or_a_copy(linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source := tmp_path / "a").write_bytes(b"x")
    (target := tmp_path / "b").write_bytes(b"older")
    if not linked:

        def link(*_: Any) -> None:
            raise OSError

        monkeypatch.setattr(os, "link", link)
    link_or_copy(source, target)
    assert target.read_bytes() == b"x" and source.samefile(target) == linked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_that_is_open_elsewhere_is_named_with_what_helps() -> None:
    with (
        pytest.raises(UserError, match="cannot move 'a.mp4': in use; close it where it is open"),
        releasing(Path("a.mp4"), "move"),
    ):
        raise PermissionError(13, "in use")
    with pytest.raises(FileNotFoundError), releasing(Path("a.mp4"), "move"):
        raise FileNotFoundError


def test_a_line_about_a_file_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    files._say.cache_clear()
    for name in ("a\nb", "a\nb", "c"):
        say_once(name, "is odd")
    say_once("c", "is odd", logging.ERROR)
    assert caplog.messages == ["'a\\nb': is odd", "'c': is odd", "'c': is odd"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "ERROR"]
    assert readable("a\udcff") == "a\\xff" and readable(Path("ü")) == "ü"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("a.json", b" \nVersion https://git-lfs", "is a pointer of Git LFS"),
        ("a.gguf", b"<!DOCTYPE html>", "is a web page that was saved under this name"),
        ("a.gguf", b"\n<HTML>", "is a web page"),
        ("a.gguf", b"<?xml", "is a web page"),
        ("a.safetensors", b"GGUF\3", "is a GGUF file by its contents; give it a name that ends in .gguf"),
        ("a.gguf", b"PK\3\4", "is a PyTorch file by its contents; give it a name that ends in .pth"),
        ("a.PTH", b'\x08\n\n\0\0\0\0\0{"', "is a safetensors file by its contents"),
        ("a.safetensors", b"Not  Found\n", r"is a text \('Not Found'\) that was saved under this name"),
        ("a.gguf", b"GGUF\3", None),
        ("a.ckpt", b"GGUF\3", None),  # which says nothing of what it holds
        ("a.safetensors", b"\1\2\3", None),
        ("a.safetensors", b"", None),
        ("a.safetensors", "Ü".encode(), None),
    ],
)
def test_what_was_downloaded_in_place_of_a_file_is_told(
    name: str, data: bytes, message: str | None, tmp_path: Path
) -> None:
    (file := tmp_path / name).write_bytes(data)
    if message is None:
        assert something_else(file) is None
    else:
        with pytest.raises(UserError, match=message):
            raise something_else(file) or AssertionError
        assert str(unreadable(file, ValueError("x"))) == str(something_else(file))


def test_of_a_text_only_what_no_text_is_is_told(tmp_path: Path) -> None:
    (file := tmp_path / "a.json").write_text("Not Found")
    assert something_else(file, text=True) is None is something_else(tmp_path / "none")
    file.write_text("<html>")
    assert "web page" in str(something_else(file, text=True))


def test_weights_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (file := tmp_path / "a.safetensors").write_bytes(b"\0\1")
    damaged = r"cannot be read, it may be truncated or damaged; download it again \({}\)$"
    for error, reason in (
        (ValueError("a\n  b"), "a b"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 300), "x" * 200),
    ):
        with pytest.raises(UserError, match=damaged.format(reason)):
            raise unreadable(file, error)
    assert "may not be read by this user" in str(unreadable(file, PermissionError()))


# What others wrote


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_json_has_a_depth_and_numbers_a_length() -> None:
    assert parse_json('{"a": [1, 2.5, null]}', "x") == {"a": [1, 2.5, None]}
    assert parse_json(nested(41), "x") is not None and parse_json("9" * 40, "x") == int("9" * 40)
    assert parse_json("-" + "9" * 39, "x") == -int("9" * 39)
    for text, message in (
        (nested(42), "it is nested more than 40 deep"),
        ('{"a":' * 41 + "[]" + "}" * 41, "it is nested more than 40 deep"),
        (nested(100_000), "it is nested more than 40 deep"),
        ("9" * 41, "a number of 41 digits"),
        ("{", "Expecting property name enclosed in double quotes: column 2$"),
        ("[1,\n x]", "Expecting value: line 2 column 2$"),
        (b"\xff", "codec"),
    ):
        with pytest.raises(UserError, match=f"^x cannot be read as JSON: .*{message}"):
            parse_json(text, "x")


def test_a_file_is_of_a_size_and_no_pipe(tmp_path: Path) -> None:
    (file := tmp_path / "a").write_bytes(b"12")
    assert read_bytes(file, 2) == b"12"
    with pytest.raises(UserError, match=r"a is larger than 3 MiB; is it the right file\?"):
        file.write_bytes(bytes(3 * MIB + 1))
        read_bytes(file, 3 * MIB)
    with pytest.raises(UserError, match="is no file; put it back"):
        read_bytes(tmp_path, advice="put it back")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no file; remove it"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(UserError, match="none cannot be read: No such file"):
        read_bytes(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read: (embedded null byte|stat: embedded null character in path)"):
        read_bytes(Path("a\0"))


def test_a_json_file_holds_an_object(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text, message in (("[1]", "must be a JSON object, it is a list"), ("{", "Expecting"), ("<html>", "web page")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_json(file)
    file.write_text(json.dumps({"a": 1}))
    assert read_json(file) == {"a": 1}
    with pytest.raises(UserError, match="is larger than 0 MiB"):
        read_json(file, 7)


def test_shards_lie_beside_their_index() -> None:
    path = Path("index.json")
    assert shards({"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "1.safetensors"}}, path) == [
        "1.safetensors",
        "2.safetensors",
    ]
    assert shards({"weight_map": {"a": "x" * 200}}, path) == ["x" * 200]
    for wrong in ("../a", "a/b", "/a", "x" * 201):
        with pytest.raises(UserError, match="index.json names .* which is no file beside it"):
            shards({"weight_map": {"a": "ok", "b": wrong}}, path)
    with pytest.raises(UserError, match="index.json names no weights"):
        shards({"weight_map": {}}, path)
    with pytest.raises(UserError, match="weight_map in index.json"):
        shards({}, path)


def test_modules_are_counted_from_0_without_a_gap() -> None:
    assert count_numbered(["blocks.0.a", "blocks.1.a", "blocks.1.b", "other.7"], "blocks.", "x") == 2
    assert count_numbered([], "blocks.", "x") == 0
    for names, odd in ((["blocks.0", "blocks.2"], "2"), (["blocks.1"], "1"), (["blocks.0", "blocks.a!"], r"a\?")):
        with pytest.raises(UserError, match=rf"x is damaged: blocks\.{odd} is not one of {len(names)} counted from 0"):
            count_numbered(names, "blocks.", "x")


def test_a_library_s_error_is_one_line_about_the_file() -> None:
    for error, reason in ((ValueError("a\n b"), "a b"), (KeyError(), "KeyError"), (ValueError("x" * 300), "x" * 200)):
        with (
            pytest.raises(UserError, match=rf"^it cannot be read, .*; put it back \({reason}\)$"),
            parsing("it", "put it back"),
        ):
            raise error
    for kept in (UserError("own"), MemoryError("much"), KeyboardInterrupt("now")):
        with pytest.raises(type(kept), match=str(kept)), parsing("it", "put it back"):
            raise kept

    class PanicException(BaseException):  # noqa: N818  (of the library)
        pass

    with pytest.raises(UserError, match=r"\(boom\)"), parsing("it", "put it back"):
        raise PanicException("boom")


def test_a_value_fits_a_shape_strictly() -> None:
    assert fit(dict[str, int], {"a": 1}, "x") == {"a": 1}
    for shape, value, message in (
        (dict[str, int], {"a": "1"}, r"x: a is not as it must be \(input should be a valid integer"),
        (list[int], 3, r"x: it is not as it must be \(input"),
        (dict[str, list[int]], {"a": [1, None]}, "x: a.1 is not"),
    ):
        with pytest.raises(UserError, match=message):
            fit(shape, value, "x")


# Sizes


@pytest.mark.parametrize(
    ("rule", "width", "height", "area", "size"),
    [
        # the official A14B rule, with the float arithmetic of the official code
        (official_size, 832, 480, 832 * 480, (832, 464)),
        (official_size, 1280, 720, 1280 * 720, (1280, 720)),
        (official_size, 100, 100, 480 * 480, (480, 480)),
        (exact_size, 832, 480, 832 * 480, (832, 480)),
        (exact_size, 100, 100, 480 * 480, (480, 480)),
        (exact_size, 1920, 1080, 832 * 480, (832, 464)),
        (exact_size, 832, 464, 832 * 480, (832, 464)),  # what it made it keeps
        (exact_size, 480, 1920, 832 * 480, (304, 1248)),
        # the official 5B rule: of a width and a height that fit, the one with the closer aspect
        (best_size, 1280, 704, 1280 * 704, (1280, 704)),
        (best_size, 704, 1280, 1280 * 704, (704, 1280)),
        (best_size, 1920, 1080, 1280 * 704, (1248, 704)),
        (best_size, 100, 100, 1280 * 704, (960, 928)),
    ],
)
def test_a_size_has_the_picture_s_aspect_within_the_area(
    rule: Any, width: int, height: int, area: int, size: tuple[int, int]
) -> None:
    assert rule(width, height, area) == size
    assert size[0] * size[1] <= area
    cell = 32 if rule is best_size else 16
    assert size[0] % cell == size[1] % cell == 0


@pytest.mark.parametrize("rule", [official_size, exact_size, best_size])
def test_a_picture_that_is_too_narrow_is_refused(rule: Any) -> None:
    for width, height in ((1, 100_000), (100_000, 1)):
        with pytest.raises(UserError, match=f"a {width}x{height} picture is too narrow for an area of 65536 pixels"):
            rule(width, height, 256 * 256)


def test_a_size_fills_an_area_where_no_cell_fits_in_beside_it() -> None:
    assert fills(832, 480, 832 * 480, 16) and fills(832, 480, 848 * 496 - 1, 16)
    assert not fills(832, 480, 848 * 496, 16) and not fills(832, 480, 832 * 480 - 1, 16)
    assert not fills(840, 480, 840 * 480, 16) and not fills(832, 488, 832 * 488, 16)


@pytest.mark.parametrize(
    ("kind", "continued", "begun"), [("i2v", (832, 480), (832, 464)), ("ti2v", (832, 480), (832, 480))]
)
def test_a_video_is_continued_in_its_size_where_that_fills_the_area(
    kind: str, continued: tuple[int, int], begun: tuple[int, int]
) -> None:
    assert continued_size(kind, 832, 480, 832 * 480) == continued and begun_size(kind, 832, 480, 832 * 480) == begun
    large = continued_size(kind, 1920, 1080, 832 * 480)
    assert large == (exact_size if kind == "i2v" else best_size)(1920, 1080, 832 * 480)
    assert begun_size(kind, 960, 576, 1280 * 704) == (official_size if kind == "i2v" else best_size)(
        960, 576, 1280 * 704
    )
    # 1120 x 800 fills the area in cells of 32, and is not what the rule makes of it
    assert continued_size("ti2v", 1120, 800, 1280 * 704) == (1120, 800)


def test_circles_are_looked_for_again_as_they_were_before() -> None:
    for _ in range(2):
        with pytest.raises(ValueError), uncollected():
            with uncollected():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
