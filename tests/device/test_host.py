"""What host memory there is: the machine's, a container's, and that of the groups around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wan import UserError
from wan.device import hardware, host

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 128 GiB, of which 100 are free; its /proc/self and /sys/fs/cgroup are empty folders."""
    memory = SimpleNamespace(total=128 * GIB, available=100 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    for name in ("proc", "groups"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(host, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "groups")
    return tmp_path


def group(folder: Path, version: int, limit: int | str, used: int = 0, cached: int = 0) -> None:
    """A memory group whose files are written as the kernel writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n", encoding="ascii")
    prefix = "" if version == 2 else "total_"
    stat = f"active_file 999\n{prefix}active_file {cached // 2}\n{prefix}inactive_file {cached // 2}\nanon 5\n"
    (folder / "memory.stat").write_text(stat.replace("active_file 999\n", "" if version == 2 else "active_file 999\n"))


def test_a_machine_without_groups_has_its_own_memory(machine: Path) -> None:
    assert host.host_bytes() == 128 * GIB and host.host_free_bytes() == 100 * GIB


@pytest.mark.parametrize(
    ("lines", "home", "version"),
    [
        ("0::/user/job\n", "user/job", 2),
        ("0::/user/job\n", "user", 2),  # the limit is the parent's
        ("0::/\n", ".", 2),  # seen from inside of a container
        ("0::/docker/of-the-host\n", ".", 2),  # seen from inside, by the host's name
        ("5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n", "memory/job", 1),
        ("4:memory:/docker/of-the-host\n", "memory", 1),
    ],
)
def test_a_container_s_limit_counts_and_its_cached_files_do_not(
    machine: Path, lines: str, home: str, version: int
) -> None:
    (machine / "proc" / "cgroup").write_text(lines, encoding="ascii")
    group(machine / "groups" / home, version, 32 * GIB, used=20 * GIB, cached=12 * GIB)
    assert host.host_bytes() == 32 * GIB
    assert host.host_free_bytes() == 24 * GIB


@pytest.mark.parametrize(("version", "limit"), [(2, "max"), (1, 9223372036854771712)])
def test_a_group_without_a_limit_is_none(machine: Path, version: int, limit: int | str) -> None:
    (machine / "proc" / "cgroup").write_text("4:memory:/\n0::/\n", encoding="ascii")
    group(machine / "groups" / ("memory" if version == 1 else "."), version, limit, used=50 * GIB)
    assert host.host_bytes() == 128 * GIB and host.host_free_bytes() == 100 * GIB


@pytest.mark.parametrize(
    ("kept_to", "files", "cores"),
    [
        (16, {}, 16),
        (16, {"user/job/cpu.max": "350000 100000\n"}, 4),  # a part of a core is worth a thread
        (16, {"user/cpu.max": "200000 100000\n", "user/job/cpu.max": "max 100000\n"}, 2),
        (3, {"cpu.max": "800000 100000\n"}, 3),
        (16, {"cpu.max": "10000 100000\n"}, 1),
        (16, {"cpu/job/cpu.cfs_quota_us": "500000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 5),
        (16, {"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 16),
    ],
)
def test_cores_are_those_a_process_is_kept_to_and_its_groups_share_of_them(
    kept_to: int, files: dict[str, str], cores: int, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(cpu_affinity=lambda: [*range(kept_to)]))
    (machine / "proc" / "cgroup").write_text("5:cpu,cpuacct:/job\n4:memory:/x\n0::/user/job\n", encoding="ascii")
    for name, text in files.items():
        (machine / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / "groups" / name).write_text(text, encoding="ascii")
    assert host.usable_cores() == cores


def test_where_no_process_is_kept_to_cores_all_of_them_count(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.Process", SimpleNamespace)  # as on macOS
    for count, cores in ((12, 12), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        assert host.usable_cores() == cores


def test_the_peak_is_the_system_s_or_what_is_there_now(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "proc" / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t 3145728 kB\n", encoding="ascii")
    assert host.host_peak_gib() == 3
    (machine / "proc" / "status").unlink()
    for memory, peak in ((SimpleNamespace(rss=GIB, peak_wset=2 * GIB), 2), (SimpleNamespace(rss=GIB), 1)):
        monkeypatch.setattr("psutil.Process", lambda memory=memory: SimpleNamespace(memory_info=lambda: memory))
        assert host.host_peak_gib() == peak


def test_a_device_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    drivers: set[str] = set()
    monkeypatch.setattr(hardware, "has_driver", lambda *names: bool(drivers & set(names)))
    assert hardware.main_device().type == "cpu" and not caplog.text
    for driver, advice in (("libcuda.so.1", "install one for CUDA"), ("amdhip64.dll", "install one for ROCm")):
        drivers.clear()
        drivers.add(driver)
        assert hardware.main_device().type == "cpu" and advice in caplog.text
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert hardware.main_device().type == "cpu" and "`vlm_device` mps is accepted" in caplog.text
    assert hardware.parse_device("mps").type == "mps"
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError, match="'mps' is not there"):
        hardware.parse_device("mps")
    with pytest.raises(UserError, match="'xpu' is not supported; use cpu, cuda"):
        hardware.parse_device("xpu")


def test_a_driver_is_looked_for_under_each_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        if name != "libcuda.so.1":
            raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", load)
    assert host.has_driver("nvcuda.dll", "libcuda.so.1")
    assert host.has_gpu_driver() and not host.has_driver(*host.AMDS)
    monkeypatch.setattr("wan.device.host.has_driver", lambda *names: "amdhip64_7.dll" in names)
    assert host.has_gpu_driver()  # as today's drivers on Windows name it


@pytest.mark.parametrize(("device", "expected"), [("/dev/kfd", True), ("/dev/null-1", False)])
def test_a_pytorch_that_brings_its_own_library_has_a_gpu_where_the_system_has_one(
    device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.device.host.has_driver", lambda *names: False)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: str(path) == device)
    assert host.has_gpu_driver() is expected


@pytest.mark.parametrize(("limit", "counts"), [(host._UNLIMITED, False), (host._UNLIMITED - 1, True)])
def test_the_kernel_s_word_for_no_limit_is_none(tmp_path: Path, limit: int, counts: bool) -> None:
    group(tmp_path, 2, limit)
    assert host._read(tmp_path, *host._VERSION_2) == ([(limit, 0)] if counts else [])
