"""Seeds and choices of a run's clips, and the plain chain that goes on from clips that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from wan.chain.chain import chain
from wan.chain.choices import Choices
from wan.chain.fingerprint import fingerprint
from wan.chain.script import Script
from wan.chain.seeds import Seeds
from wan.chain.storyboard import Scene
from wan.errors import UserError
from wan.options import CANDIDATE_STEP, Settings


def script(*scenes: Mapping[str, Any], count: int = 0) -> Script:
    """Scenes that say this, and as many plans, or more."""
    plans: Any = [None] * max(count, len(scenes))
    return Script([Scene(1, values) for values in scenes], plans, ())


def followed(given: int, before: Mapping[str, Any], *scenes: Mapping[str, Any], redo: int | None = None) -> Seeds:
    seeds = Seeds(given, before)
    seeds.follow(script(*scenes, count=4), redo)
    return seeds


def each(seeds: Seeds) -> list[int]:
    return [seeds.of(number) for number in (1, 2, 3, 4)]


def test_seeds_count_up_from_that_of_the_first_clip() -> None:
    assert each(followed(7, {})) == [7, 8, 9, 10]
    assert each(followed(0, {"base_seed": 5})) == [0, 1, 2, 3]
    assert each(followed(-1, {"base_seed": 5})) == [5, 6, 7, 8]
    assert each(followed(7, {}, {}, {"seed": 77})) == [7, 77, 9, 10]
    assert followed(7, {}).as_json() == {"base_seed": 7, "seeds": {}, "redone_over": {}}


def test_a_seed_is_not_known_where_it_is_drawn_when_the_run_begins() -> None:
    again = {"seeds": {"3": 50}}
    drawn = followed(-1, again, {}, {"seed": 77})
    assert [drawn.is_drawn(number) for number in (1, 2, 3, 4)] == [True, False, False, True]
    for known in (followed(0, {}), followed(-1, {"base_seed": 5})):
        assert not any(known.is_drawn(number) for number in (1, 2, 3, 4))


def test_a_clip_with_a_name_keeps_its_seed_wherever_it_is_moved() -> None:
    seeds = followed(7, {}, {"name": "boat"}, {"name": "fog"}, {})
    assert each(seeds) == [7, 8, 9, 10] and seeds.as_json()["named"] == {"boat": 7, "fog": 8}
    seeds.follow(script({}, {"name": "fog"}, {"name": "sea"}, {"name": "boat"}))
    assert each(seeds) == [7, 8, 9, 7]
    # the place's seed is another name's by now, and so is the one after it
    seeds.follow(script({"name": "gull"}, count=4))
    assert seeds.of(1) == 10
    before = seeds.as_json()
    assert before["named"] == {"boat": 7, "fog": 8, "sea": 9, "gull": 10}
    assert followed(7, before, {"name": "sea"}).of(1) == 9, "a later run knows them"
    assert followed(8, before, {"name": "sea"}).of(1) == 8, "with other seeds they are none of its own"


def test_a_clip_that_is_to_be_made_again_gets_another_seed() -> None:
    seeds = followed(7, {}, redo=2)
    (drawn,) = set(each(seeds)) - {7, 9, 10}
    assert each(seeds) == [7, drawn, 9, 10] and drawn != 8
    assert seeds.as_json() == {"base_seed": 7, "seeds": {"2": drawn}, "redone_over": {"2": None}}
    assert each(followed(7, seeds.as_json())) == each(seeds)
    named = followed(7, {}, {}, {"name": "fog"}, redo=2)
    assert named.as_json()["seeds"] == {} and named.as_json()["named"] == {"fog": named.of(2)} != {"fog": 8}


def test_a_seed_that_was_drawn_again_holds_until_the_storyboard_says_another() -> None:
    for scene in ({"seed": 77}, {"seed": 77, "name": "fog"}):
        seeds = followed(7, {}, {}, scene, redo=2)
        before = seeds.as_json()
        assert seeds.of(2) not in (8, 77) and before["redone_over"] == {"2": 77}
        assert followed(7, before, {}, scene).of(2) == seeds.of(2)
        changed = followed(7, before, {}, {"seed": 78})
        assert changed.of(2) == 78 and changed.as_json()["seeds"] == {} and not changed.is_drawn(2)


def test_a_clip_is_known_by_its_name_or_its_number() -> None:
    one = script({"name": "fog"}, {"seed": 3}, count=3)
    assert [one.name(number) for number in (1, 2, 3)] == ["fog", None, None]
    assert [one.key(number) for number in (1, 2, 3)] == ["fog", "2", "3"] and one.seeds == {2: 3}
    plans: Any = [SimpleNamespace(fade_in=frames) for frames in (0, 8, 4)]
    assert Script([], plans, ()).fades(2) == [0, 8]


# Choices


def finished(number: int, **settings: Any) -> Any:
    return SimpleNamespace(number=number, settings=settings, fingerprint=fingerprint(settings), record=settings)


@pytest.mark.parametrize(
    ("number", "settings", "kept"),
    [
        (3, {"redo": 2, "keep_following": True}, True),
        (2, {"redo": 2, "keep_following": True}, False),
        (1, {"redo": 2, "keep_following": True}, False),
        (3, {"redo": 2}, False),
        (3, {"keep_following": True}, False),
    ],
)
def test_what_follows_is_kept_where_it_was_asked_for(number: int, settings: dict[str, Any], kept: bool) -> None:
    clip, wanted = finished(number, parent="a", seed=1), {"parent": "b", "seed": 1}
    choices = Choices(Settings(**settings), {})
    assert choices.accept(clip, clip.settings)
    assert not choices.accept(clip, {"parent": "b", "seed": 2}), "it is another clip"
    assert choices.accept(clip, wanted) == kept
    later = Choices(Settings(), choices.as_json())
    assert later.accept(clip, wanted) == kept, "nobody is asked twice"
    assert not later.accept(clip, {"parent": "c", "seed": 1}), "of one predecessor"


def test_a_take_that_was_chosen_is_that_of_a_clip_as_it_was() -> None:
    wanted = {"prompt": "on", "seed": 7}
    choices = Choices(Settings(take=((2, 3),)), {})
    assert choices.take(2, "2", wanted, 3, lambda: None) == {"take": 3}
    assert choices.take(1, "1", wanted, 3, lambda: None) == {}
    later = Choices(Settings(), choices.as_json())
    assert later.take(2, "2", wanted, 3, lambda: None) == {"take": 3}
    assert later.take(2, "2", {**wanted, "prompt": "off"}, 3, lambda: None) == {}
    assert later.take(2, "fog", wanted, 3, lambda: None) == {}, "of another name"
    with pytest.raises(UserError, match="take 2=3: the clip has 2 of them"):
        choices.take(2, "2", wanted, 2, lambda: None)


@pytest.mark.parametrize(("best", "chosen"), [(1, {"take": 2}), (2, {}), (3, {"take": 2})])
def test_the_take_with_the_best_seam_is_no_choice(best: int, chosen: dict[str, int]) -> None:
    wanted = {"seed": 7}
    clip = finished(1, seed=7 + (best - 1) * CANDIDATE_STEP)
    assert Choices(Settings(take=((1, 2),)), {}).take(1, "1", wanted, 3, lambda: clip) == chosen


def test_only_what_was_last_agreed_to_is_made_again() -> None:
    one, other = finished(1, seed=1), finished(2, seed=2)
    choices = Choices(Settings(), {})
    assert choices.as_json() == {"accepted": {}}
    choices.give_up([one])
    choices.give_up([other])
    later = Choices(Settings(), choices.as_json())
    assert later.has_given_up(other) and not later.has_given_up(one)


# The chain of the library


def test_a_chain_goes_on_from_clips_that_are_there() -> None:
    asked: list[tuple[Any, int]] = []

    def extend(footage: Any, seed: int) -> Any:
        asked.append((footage, seed))
        return f"clip of {seed}"

    done: Any = {0: "first", 2: "third"}
    source: Any = "source"
    made: Sequence[Any] = list(chain(source, count=5, extend=extend, seed=7, finished=done, seeds={3: 70}))
    assert made == ["clip of 8", "clip of 70", "clip of 11"]
    assert asked == [("first", 8), ("third", 70), ("clip of 70", 11)]
