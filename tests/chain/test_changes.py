"""What has changed of a clip, by what it was and is to be made with."""

from __future__ import annotations

from wan.chain.changes import Change, find_change, in_words, other_run


def test_a_clip_changed_itself_or_follows_from_one_that_did() -> None:
    old = {"parent": "a", "seed": 1, "prompt": "on"}
    first = find_change(3, old, old | {"prompt": "off"}, None)
    assert (first.number, first.root) == (3, 3) and len(first.reasons) == 1
    assert find_change(4, old, old | {"parent": "b"}, first) == Change(4, (), 3)
    assert find_change(5, old, old | {"parent": "b"}, Change(4, (), 3)).root == 3
    assert find_change(4, old, old | {"parent": "b"}, None).root == 3  # the clip before is another one
    both = find_change(4, old, old | {"seed": 2, "parent": "b"}, first)
    assert both.root == 4 and len(both.reasons) == 1
    added = find_change(4, old, old | {"end_image": "x"}, None)
    assert added.root == 4 and added.reasons == find_change(4, old | {"end_image": "x"}, old, None).reasons


def test_clips_in_a_row_with_one_reason_are_one_phrase() -> None:
    prompt = ("its prompt changed",)
    assert in_words(
        [Change(2, prompt, 2), Change(3, (), 2), Change(4, (), 2), Change(5, prompt, 5), Change(6, prompt, 6)]
    ) == [
        "clip 2: its prompt changed",
        "clips 3 to 4 follow from clip 2",
        "clips 5 to 6: its prompt changed",
    ]
    assert in_words([Change(3, (), 2), Change(4, ("a", "b"), 4)]) == ["clip 3 continues clip 2", "clip 4: a, b"]
    assert in_words([Change(4, (), 2)]) == ["clip 4 follows from clip 2"]
    assert in_words([Change(4, (), 2), Change(5, (), 2)]) == ["clips 4 to 5 follow from clip 2"]
    assert in_words([Change(4, (), 3), Change(5, (), 4)]) == ["clip 4 continues clip 3", "clip 5 continues clip 4"]


def test_clips_of_another_run_are_told_from_those_that_changed() -> None:
    old = {"task": "v2v-5B", "checkpoint": "x", "width": 8, "height": 4, "parent": "a", "seed": 1}
    assert other_run(old, old | {"seed": 2}, True) is None
    assert other_run(old, old | {"width": 9}, False) == "another size (8x4, now 9x4)"
    assert other_run(old, old | {"height": 5}, False) == "another size (8x4, now 8x5)"
    for key in ("task", "checkpoint"):
        assert other_run(old, old | {key: "y"}, False)
    # only the first clip begins where the source ends, and old records do not say where
    assert other_run(old, old | {"parent": "b"}, True) and other_run(old, old | {"parent": "b"}, False) is None
    assert other_run(old, old | {"parent": None}, True) is other_run(old | {"parent": None}, old, True) is None


def test_each_reason_is_in_words() -> None:
    for key, was, now, words in (
        ("prompt", "a", "b", "its prompt changed"),
        ("seed", 1, 2, "its seed 1, now 2"),
        ("take", None, 2, "take 2 of it was chosen"),
        ("take", 2, None, "its best take was chosen"),
    ):
        assert find_change(2, {key: was}, {key: now}, None).reasons == (words,)
    (reason,) = find_change(2, {"loras": "ab12"}, {"loras": "cd34"}, None).reasons
    assert reason.endswith(" changed") and "ab12" not in reason and "cd34" not in reason  # digests say nothing
