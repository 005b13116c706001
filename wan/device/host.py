"""The host: its memory and cores, also of a container, the memory this process has taken, and its GPU drivers."""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

GIB = 2**30
_PROC, _CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")
NVIDIAS = ("nvcuda.dll", "libcuda.so.1")
AMDS = ("amdhip64.dll", "amdhip64_6.dll", "amdhip64_7.dll", "libamdhip64.so")  # of ROCm 5, 6 and 7 on Windows
_UNLIMITED = 2**60  # version 1 writes a number of about 2**63 for no limit


def host_bytes() -> int:
    """The host's memory, or a container's limit."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_groups())])


def host_free_bytes() -> int:
    """What processes may still take of the host's memory, and of a container's. Cached files count as free."""
    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _memory_groups())]))


def usable_cores() -> int:
    """The cores that this process may use: no more than it is kept to, nor than a container's share of time."""
    process = psutil.Process()
    # macOS keeps a process to no cores
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(share) for share in _cpu_shares())]))


def host_peak_gib() -> float:
    """The most host memory this process has had resident, in GiB. macOS tells only what is resident now."""
    status = _PROC / "status"
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(peak[1]) * 1024 / GIB
    memory = psutil.Process().memory_info()
    return float(getattr(memory, "peak_wset", memory.rss)) / GIB


def _memory_groups() -> list[tuple[int, int]]:
    """(limit, use without cached files) in bytes of each memory group that this process is in and that has a limit."""
    return [
        limit
        for group, version in _groups("memory")
        for limit in _read(group, *(_VERSION_1 if version == 1 else _VERSION_2))
    ]


def _cpu_shares() -> list[float]:
    """How many cores' time each group that this process is in may take, where it has a limit."""
    shares = []
    for group, version in _groups("cpu"):
        try:
            if version == 1:
                words = [(group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")]
            else:
                words = (group / "cpu.max").read_text(encoding="ascii").split()
            quota, period = map(int, words)
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:
            shares.append(quota / period)
    return shares


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of the groups of a controller that this process is in, and the version of each.

    A group is below others, whose limits hold as well. Version 2 has all of them in one tree, version 1 one for each
    controller.
    """
    try:
        lines = (_PROC / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # a system without them
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and controller not in controllers.split(","):
            continue
        home, version = (_CGROUPS / controller, 1) if controllers else (_CGROUPS, 2)
        inside = home / path.strip("/")
        # seen from a container, the path may be that of the host, and then only the root is there
        for group in (inside, *(above for above in inside.parents if above.is_relative_to(home))):
            yield group, version


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_(?:in)?active_file (\d+)$")
_VERSION_2 = ("memory.max", "memory.current", r"^(?:in)?active_file (\d+)$")


def _read(group: Path, limit: str, usage: str, cached: str) -> list[tuple[int, int]]:
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        if not most.isdecimal() or int(most) >= _UNLIMITED:
            return []
        used = int((group / usage).read_text(encoding="ascii"))
        files = sum(map(int, re.findall(cached, (group / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)))
    except (OSError, ValueError):  # not there, or not for us to read
        return []
    return [(int(most), max(0, used - files))]


def has_gpu_driver() -> bool:
    """Whether there is a driver of a GPU that PyTorch may use, told without it."""
    # a PyTorch for AMD brings the library itself: then Linux, or Linux in Windows, has one of these
    devices = any(Path(name).exists() for name in ("/dev/kfd", "/dev/dxg"))
    return devices or has_driver(*NVIDIAS) or has_driver(*AMDS)


def has_driver(*libraries: str) -> bool:
    """Whether one of the libraries of a driver loads."""
    for name in libraries:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
