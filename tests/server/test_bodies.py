"""What a request says, field by field."""

from __future__ import annotations

import io
from typing import Any

import pytest

from wan.server.bodies import Body
from wan.server.errors import ApiError
from wan.server.jobs import Upload


def refused(read: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as error:
        read()
    assert error.value.status == 400


def test_what_is_read_is_taken_out_and_the_rest_stays() -> None:
    body = Body({"a": "text", "b": "2.5", "c": 3, "d": '{"e": 1}', "rest": 1})
    assert (body.text("a"), body.number("b"), body.whole("c"), body.json("d", dict)) == ("text", 2.5, 3, {"e": 1})
    assert body.fields == {"rest": 1}


@pytest.mark.parametrize("nothing", [{}, {"a": None}, {"a": ""}])
def test_an_empty_field_is_none(nothing: dict[str, Any]) -> None:
    def fresh() -> Body:
        return Body(dict(nothing))

    assert fresh().text("a") is None and fresh().number("a") is None
    assert fresh().whole("a") is None and fresh().json("a", list) is None
    with pytest.raises(ApiError, match="a is missing") as error:
        fresh().text("a", required=True)
    assert error.value.code == "missing_required_parameter"


def test_text_is_text() -> None:
    assert Body({"a": "x"}).text("a", required=True) == "x"
    for value in (0, False, ["x"]):
        refused(lambda value=value: Body({"a": value}).text("a"), "a must be text")


@pytest.mark.parametrize("value", [0, -1, "0", 1e6, "nan", "inf", True, "x", [], {}])
def test_a_number_is_positive(value: Any) -> None:
    refused(lambda: Body({"a": value}).number("a"), "a must be a positive number")


def test_a_whole_number_may_be_written_as_others() -> None:
    assert Body({"a": "4"}).whole("a") == Body({"a": 4.0}).whole("a") == 4
    assert Body({"a": 0.001}).number("a") == 0.001 and Body({"a": 999999}).whole("a") == 999999
    refused(lambda: Body({"a": 4.5}).whole("a"), "a must be a whole number")


def test_json_has_the_kind_that_is_asked_for() -> None:
    assert Body({"a": [1]}).json("a", list) == Body({"a": "[1]"}).json("a", list) == [1]
    refused(lambda: Body({"a": "[1]"}).json("a", dict), "a must be a JSON object")
    refused(lambda: Body({"a": {}}).json("a", list), "a must be a JSON list")
    refused(lambda: Body({"a": "{"}).json("a", dict), "a")


def test_a_field_has_one_file() -> None:
    one, two = (Upload(name, io.BytesIO()) for name in ("one", "two"))
    body = Body({}, {"a": [one], "b": [one, two]})
    assert body.file("a") is one and body.file("c") is None
    refused(lambda: body.file("b"), "b must be one file")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("boat.mp4", "boat.mp4"),
        ("C:\\films\\boat.mp4", "boat.mp4"),
        ("../../boat.mp4", "boat.mp4"),
        ("bo\nat\x00.mp4", "boat.mp4"),
        ("x" * 120, "x" * 100),
    ],
)
def test_an_upload_s_title_is_its_name_as_far_as_it_can_be_shown(name: str, title: str) -> None:
    assert Upload(name, io.BytesIO()).title == title
