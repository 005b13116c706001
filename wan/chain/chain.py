"""A chain of clips, each going on from the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from wan.types import Footage, Generation


def chain(
    start: Footage,
    *,
    count: int,
    extend: Callable[[Footage, int], Generation],
    seed: int,
    finished: Mapping[int, Footage] = MappingProxyType({}),
    seeds: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[Generation]:
    """`count` clips, each going on from the one before; clip i, counted from 0, is made with seed + i.

    Every clip is handed out as soon as it is made, and the next one starts from its frames as they are in memory.
    `finished` holds clips, by i, that are there already and are gone on from; `seeds` other seeds than seed + i.
    """
    footage = start
    for index in range(count):
        if index in finished:
            footage = finished[index]
            continue
        made = extend(footage, seeds.get(index, seed + index))
        yield made
        footage = made
