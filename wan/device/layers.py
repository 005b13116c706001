"""How many layers of a model stay on a GPU: arithmetic that needs no PyTorch."""

from __future__ import annotations

SLOTS = 2  # layers that are on the GPU while layers come one by one: one is used, one arrives


def layers_that_stay(weights: int, layer: int, count: int, weight_budget: int | None) -> int:
    """How many of a model's `count` layers can stay on a GPU with so much room; below 0: it is too small for any."""
    if weight_budget is None or weights <= weight_budget or not count:
        return count
    return (weight_budget - (weights - count * layer)) // layer - SLOTS
