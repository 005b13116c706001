"""What is read of a GPU, with one that is made up: none is needed here."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from wan.device import hardware
from wan.errors import UserError

GPU = torch.device("cuda", 1)
GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of 24 GiB, of which 10 are free, 6 are this process's, and 4 of those hold tensors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * GIB)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_taken_by_its_number_and_must_be_there() -> None:
    assert hardware.main_device() == torch.device("cuda:0") and hardware.main_device(1) == GPU
    assert hardware.parse_device("cuda") == torch.device("cuda")
    with pytest.raises(UserError, match="'cuda:2' is not there: 2 CUDA"):
        hardware.parse_device("cuda:2")


def test_without_a_gpu_there_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as NVML counts them
    assert hardware.main_device(1) == hardware.parse_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="'cuda:0' is not there: 0 CUDA"):
        hardware.parse_device("cuda:0")


def test_a_pytorch_for_gpus_that_finds_none_is_not_to_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "has_driver", lambda *names: True)
    for cuda, hip, replaced in ((None, None, True), ("12.8", None, False), (None, "6.4", False)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert (hardware.unused_gpu() is not None) is replaced


@pytest.mark.parametrize("is_there", [True, False])
def test_a_mac_s_gpu_is_taken_where_it_is_there(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_there)
    if is_there:
        assert hardware.parse_device("mps") == torch.device("mps")
    else:
        with pytest.raises(UserError, match="'mps' is not there"):
            hardware.parse_device("mps")


@pytest.mark.parametrize(("name", "what"), [("gpu", "is not one"), ("meta", "is not supported")])
def test_a_device_that_models_do_not_run_on_is_refused(name: str, what: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' {what}; use cpu, cuda"):
        hardware.parse_device(name)


def test_devices_are_the_same_where_their_memory_is() -> None:
    cpu, first, second = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
    assert hardware.same_device(torch.device("cuda"), first) and hardware.same_device(first, torch.device("cuda"))
    assert hardware.same_device(cpu, cpu) and hardware.same_device(second, second)
    assert not hardware.same_device(first, second) and not hardware.same_device(torch.device("cuda"), second)
    assert not hardware.same_device(cpu, first)


@pytest.mark.usefixtures("two_gpus")
def test_what_the_allocator_keeps_for_tensors_is_free_for_them() -> None:
    assert hardware.free_bytes(GPU) == 12 * GIB
    assert hardware.free_bytes(GPU, 7 * GIB) == 3 * GIB and hardware.free_bytes(GPU, 20 * GIB) == 12 * GIB
    assert hardware.total_bytes(GPU) == 24 * GIB
    assert hardware.peak_gib(GPU) == 5 and hardware.peak_gib(torch.device("cpu")) is None


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("limit", "share"), [(6 * GIB, 0.25), (30 * GIB, 1), (-GIB, 0)])
def test_the_allocator_is_held_to_a_share_of_the_gpu(limit: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    held = list[tuple[float, torch.device]]()
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *words: held.append(words))
    hardware.hold_to(GPU, limit)
    assert held == [(share, GPU)]


def test_out_of_memory_is_known_by_its_type_or_its_words() -> None:
    assert hardware.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert hardware.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not hardware.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not hardware.is_out_of_memory(RuntimeError("the disk is out of memory"))
    assert not hardware.is_out_of_memory(OSError("CUDA error: out of memory"))


@pytest.mark.parametrize(
    ("device", "has_triton", "runs"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_kernels_run_on_a_gpu_where_triton_is(
    device: str, has_triton: bool, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_triton and name == "triton" else None)
    assert hardware.runs_triton(torch.device(device)) is runs


def test_a_gpu_is_waited_for_and_its_memory_handed_back_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())  # any block
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: done.append("mps"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(f"waited for {device}"))
    monkeypatch.setattr(torch.cuda, "init", lambda: done.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append(f"peak of {device}"))
    for act in (hardware.release_memory, hardware.synchronize, hardware.reset_peak):
        act(torch.device("cpu"))
    assert not done
    hardware.release_memory(GPU)
    hardware.drop_cache(torch.device("mps"))
    hardware.synchronize(GPU)
    hardware.reset_peak(GPU)
    assert done == ["cuda", "mps", "waited for cuda:1", "init", "peak of cuda:1"]
