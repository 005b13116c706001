"""A value that was made stays as it is: whoever holds it may keep it."""

from __future__ import annotations

import ast

from tests.support.golden import ROOT

# What changes while it is used: states, hands and counters.
CHANGING = {
    "batch/crew.py": ["_Member"],
    "batch/hand.py": ["_Work"],
    "batch/schedule.py": ["Task"],
    "chain/charts.py": ["Chart"],
    "device/peers.py": ["Peer"],
    "device/watch.py": ["Watch"],
    "server/bodies.py": ["Body"],
    "server/live.py": ["Live"],
    "upscaling.py": ["Upscaler"],
}


def is_frozen(decorator: ast.expr) -> bool | None:
    """Whether a class with this decorator is one of values; None: it is no dataclass."""
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    if not (isinstance(call, ast.Name) and call.id == "dataclass"):
        return None
    words = decorator.keywords if isinstance(decorator, ast.Call) else []
    return any(word.arg == "frozen" and ast.unparse(word.value) == "True" for word in words)


def test_dataclasses_are_frozen_but_for_a_few() -> None:
    changing: dict[str, list[str]] = {}
    frozen = 0
    for file in sorted((ROOT / "wan").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                kind = is_frozen(decorator)
                frozen += kind is True
                if kind is False and isinstance(node, ast.ClassDef):
                    changing.setdefault(file.relative_to(ROOT / "wan").as_posix(), []).append(node.name)
    assert changing == CHANGING and frozen > 100
