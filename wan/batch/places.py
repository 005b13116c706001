"""How many workers and captioners there are, and on which machines: by the GPUs of a cluster, without Ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wan.errors import UserError
from wan.options import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """`size` workers, of which `siblings` at most are on one machine; `captioners` are the machines of those.

    Without GPUs Ray may put a captioner anywhere, and its machine is "".
    """

    size: int
    siblings: int
    uses_gpus: bool
    captioners: Sequence[str] = ()


def choose_places(settings: Settings, gpus_of: Mapping[str, int]) -> Places:
    """The places of a batch on machines with so many GPUs each. Raises UserError where they are too few."""
    wanted, each, gpus = settings.workers, settings.gpus_per_job, list(gpus_of.values())
    captioners = [""] * settings.captioners
    if not any(gpus):
        if each > 1:
            raise UserError(f"`gpus_per_job` {each}: Ray sees no GPU; look at nvidia-smi and ray status")
        size = wanted or 1
        return Places(size, math.ceil(size / len(gpus)), uses_gpus=False, captioners=captioners)
    if each <= max(gpus):
        for number in range(settings.captioners):
            at = captioner_place(gpus, each)
            gpus[at] -= 1
            captioners[number] = list(gpus_of)[at]
        if not any(count >= each for count in gpus):
            raise UserError(f"`captioners` {settings.captioners} leave no worker {each} GPUs")
    places = [count // each for count in gpus]
    if not any(places):
        raise UserError(f"`gpus_per_job` {each} is more than a machine has; the most are {max(gpus)}")
    if wanted is not None and wanted > sum(places):
        shortage = f"`workers` {wanted} of {each} GPUs each are more than the {sum(gpus)} GPUs are for"
        if settings.address is None:
            raise UserError(f"{shortage}; {sum(places)} are the most")
        log.warning("%s: the others wait until the cluster has grown", shortage)
    size = wanted or sum(places)
    return Places(size, min(size, max(places)), uses_gpus=True, captioners=captioners)


def captioner_place(gpus: Sequence[int], gpus_per_job: int) -> int:
    """Which machine gives a GPU to a captioner, by their free ones: one with some left over, else the fullest."""
    return max(range(len(gpus)), key=lambda at: (gpus[at] > 0, gpus[at] % gpus_per_job, gpus[at]))
