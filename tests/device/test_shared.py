"""Weights in host memory: once for all processes of a machine. Processes on a CPU, through gloo, and by themselves."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support import tiny_denoiser
from tests.support.ranks import Ranks
from wan.denoiser.model import WanModel
from wan.detail import heard_by
from wan.device import shared
from wan.device.parallel import Team
from wan.device.placement import Placement
from wan.device.ranks import Sizes, World
from wan.device.shared import CommonLayers, CommonMemory, SharedMemory
from wan.models import Models
from wan.settings import LoraFile
from wan.weights.tensors import open_safetensors

WIDE: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 16384, "num_layers": 4}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of 4 layers of 34 MiB in float32, and little beside them."""
    folder = tmp_path_factory.mktemp("wide")
    for home, sizes in ((folder, WIDE), (folder / "small", {})):
        home.mkdir(exist_ok=True)
        model = tiny_denoiser.build(**sizes)
        save_file(model.state_dict(), home / "model.safetensors")
        (home / "config.json").write_text(f'{{"num_heads": {model.config.num_attention_heads}}}')
    return folder


def memory() -> torch.Tensor:
    """MiB that this process has for itself, and of those that it has in common with others its equal part."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return torch.tensor([int(rollup.split(f"Pss_{kind}:")[1].split()[0]) / 1024 for kind in ("Anon", "Shmem")])


def in_a_rank(rank: int, size: int, folder: str) -> Any:
    team = Team.start(World(rank, size, rank), Sizes(1, size), torch.device("cpu"), 60)
    assert team.machine is not None and (team.machine.size, team.machine.index) == (size, rank)
    cpu, results = torch.device("cpu"), []
    weights = open_safetensors(Path(folder), "model")
    small = open_safetensors(Path(folder) / "small", "model")
    WanModel.from_weights(small, dtype=torch.bfloat16, device=cpu)  # what libraries take when they are first used
    for together in (True, False):
        if rank and not together:  # as where this process does not see what the other one has
            torch.from_file = missing
        before = memory()
        model = WanModel.from_weights(weights, dtype=torch.bfloat16, device=cpu, shared=SharedMemory(team.machine))
        assert model.in_common == together
        team.share(lambda: None)
        grown = memory() - before
        # layers come one by one to a "GPU", and need no other place in host memory for it
        places = [parameter.data_ptr() for parameter in model.blocks.parameters()]
        size_of = sum(tensor.nbytes for tensor in model.parameters())
        latents = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        with Placement(cpu, weight_budget=size_of * 3 // 4).on_device(model), torch.no_grad():
            flow = model(latents, torch.tensor([500.0]), tiny_denoiser.prompt(1), return_dict=False)[0]
        assert places == [parameter.data_ptr() for parameter in model.blocks.parameters()]
        results.append((flow, grown / (size_of / 2**20)))
        team.share(lambda: None)
        del model
    team.end()
    return results


def missing(*_: Any, **more: Any) -> Any:
    raise FileNotFoundError("no such file")


def test_weights_are_in_host_memory_once_for_all_processes_of_a_machine(ranks: Ranks, checkpoint: Path) -> None:
    weights = open_safetensors(checkpoint, "model")
    model = WanModel.from_weights(weights, dtype=torch.bfloat16, device=torch.device("cpu"))
    latents = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(latents, torch.tensor([500.0]), tiny_denoiser.prompt(1), return_dict=False)[0]
    (together, apart), (together_too, apart_too) = ranks.run(in_a_rank, 2, str(checkpoint))
    assert all(torch.equal(flow, expected) for flow, _ in (together, together_too, apart, apart_too))
    alone, in_common = (together[1] + together_too[1]).tolist()
    assert 0.95 <= in_common <= 1.1 and alone < 1.2, "one copy, and what libraries take"
    alone, in_common = (apart[1] + apart_too[1]).tolist()
    assert in_common < 0.05 and alone > 1.7, "a copy in each"


# --- processes that do not know of each other


class Stranger:
    """A process that has a denoiser, and says what is in it."""

    def __init__(self, folder: Path, notes: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=live, args=(theirs, str(folder), str(notes)))
        self.process.start()

    def load(self, *loras: str, numbers: str = "float32", dies: bool = False) -> Any:
        """A new one; the sums of its parameters, and what memory has grown by: alone, and its part in common."""
        return self.ask("load", numbers, dies, loras)

    def merge(self, *loras: str) -> Any:
        """With these LoRAs instead; as `load`."""
        return self.ask("merge", loras)

    def ask(self, *what: Any) -> Any:
        self.ours.send(what)
        assert self.ours.poll(60), "it says nothing"
        return self.ours.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def live(pipe: Any, folder: str, notes: str) -> None:
    """Do what a `Stranger` is asked for."""
    tempfile.tempdir = notes
    weights, cpu = open_safetensors(Path(folder), "model"), torch.device("cpu")
    small = open_safetensors(Path(folder) / "small", "model")
    WanModel.from_weights(small, dtype=torch.float32, device=cpu)  # what libraries take when they are first used
    checkpoint: Any = SimpleNamespace(single=False, parts=[("model", weights)], experts={"model": weights})
    models = Models("wide", checkpoint, {})

    def loader(mapped: bool, common: CommonMemory | None) -> WanModel:
        model = WanModel.from_weights(weights, dtype=torch.float32, device=cpu, shared=common)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return model

    while True:
        what, *more, loras = pipe.recv()
        if what == "load":
            models.forget_all()
            numbers, dies = more
            common = CommonLayers({"model": weights.files}, numbers)
            models = Models("wide", checkpoint, {"model": loader}, common=common)
        before = memory()
        models.merge_loras({"model": tuple(LoraFile(Path(one)) for one in loras)} if loras else {})
        model = models["model"]
        grown = (memory() - before) / (sum(one.nbytes for one in model.parameters()) / 2**20)
        pipe.send(([float(one.double().sum()) for one in model.parameters()], grown.tolist()))


@pytest.fixture(scope="module")
def strangers(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Stranger]]:
    """Starts another one."""
    made, notes = list[Stranger](), tmp_path_factory.mktemp("notes")

    def start() -> Stranger:
        made.append(Stranger(checkpoint, notes))
        return made[-1]

    yield start
    for one in made:
        one.end()


@pytest.fixture(scope="module")
def three(strangers: Callable[[], Stranger]) -> list[Stranger]:
    return [strangers() for _ in range(3)]


def lora_of(tmp_path: Path) -> str:
    down = {f"blocks.{n}.attn1.to_q.lora_A.weight": torch.full((2, 256), 0.5) for n in range(4)}
    up = {f"blocks.{n}.attn1.to_q.lora_B.weight": torch.full((256, 2), 0.5) for n in range(4)}
    save_file(down | up | {"proj_out.diff": torch.ones(16, 256)}, tmp_path / "lora.safetensors")
    return str(tmp_path / "lora.safetensors")


def opened(name: str, size: int) -> CommonMemory:
    memory = CommonMemory(name)
    memory.open(size)
    return memory


LINUX = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a file is Linux's")


@LINUX
def test_processes_that_do_not_know_of_each_other_have_weights_in_memory_once(
    strangers: Callable[[], Stranger], three: list[Stranger]
) -> None:
    first, (second, third, other) = strangers(), three
    numbers, (alone, in_common) = first.load()
    assert alone < 0.2 and 0.9 < in_common < 1.1  # all of it is its own as yet
    numbers_too, (alone, in_common) = second.load()
    assert numbers_too == numbers and alone < 0.2 and in_common < 0.1  # it has put nothing into memory
    _, (alone, in_common) = other.load(numbers="bfloat16")  # what becomes of the files is not the same
    assert 0.9 < in_common < 1.1
    first.end()
    assert third.load()[0] == numbers and second.merge()[0] == numbers  # by way of the second one


@LINUX
def test_each_set_of_loras_has_a_memory_of_its_own(three: list[Stranger], tmp_path: Path) -> None:
    lora = lora_of(tmp_path)
    plain, merged, merged_too = three
    base, with_lora = plain.load()[0], merged.load(lora)[0]
    numbers, (alone, in_common) = merged_too.load(lora)
    assert numbers == with_lora and alone < 0.2 and in_common < 0.1
    changed = sum(one != other for one, other in zip(base, with_lora, strict=True))
    assert changed == 5  # four layers, and one matrix that lies in no layer
    assert merged.merge()[0] == base  # it gives the LoRA back, and others keep theirs
    assert merged_too.merge(lora)[0] == with_lora and plain.merge()[0] == base
    assert plain.merge(lora)[0] == with_lora and merged.merge()[0] == base


@LINUX
def test_one_that_is_killed_before_all_is_there_is_followed_by_the_next(
    strangers: Callable[[], Stranger], three: list[Stranger]
) -> None:
    dead, numbers = strangers(), three[0].load()[0]
    with pytest.raises(EOFError):
        dead.load(numbers="mine", dies=True)
    assert three[1].load(numbers="mine")[0] == numbers


@LINUX
def test_what_cannot_be_in_common_is_each_process_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = tmp_path / f"wan-{os.getuid()}"
    home.mkdir()
    home.chmod(0o755)  # others may see what is in it, and who knows who made it
    common = opened("x", 4096)
    assert common.memory is None and common.fills
    common.done()
    home.chmod(0o700)
    assert shared.sharers(8) == 8
    left = sorted(home.iterdir())
    monkeypatch.setattr("wan.device.shared._is_open", lambda *facts: False)  # no /proc
    assert shared.sharers(8) == 1
    monkeypatch.delattr("os.memfd_create")
    assert opened("x", 4096).memory is None and sorted(home.iterdir()) == left


def test_where_no_memory_can_be_in_common_none_is_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create", raising=False)
    assert shared.sharers(8) == 1


@LINUX
def test_a_handle_that_has_become_another_file_s_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, other = opened("x", 4096), opened("y", 4096)
    other.done()
    first.done()
    note = tmp_path / f"wan-{os.getuid()}" / "x.json"
    pid, number, *file = first._mine
    note.write_text(json.dumps({"open": [[pid, other._mine[1], *file]]}))
    monkeypatch.setattr("wan.device.shared._is_open", lambda *facts: True)  # it was, a moment before
    again = opened("x", 4096)
    assert again.fills
    again.close()
    note.write_text(json.dumps({"open": [[pid, number, *file]]}))
    assert not opened("x", 4096).fills


@LINUX
def test_one_that_waits_says_so_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("wan.device.shared._TELLS", 0.02)
    first = opened("x", 4096)
    details = list[str]()

    def listen(detail: str) -> None:
        details.append(detail)
        if len(details) == 3:
            first.done()

    with heard_by(listen):
        assert not opened("x", 4096).fills
    assert details == ["another process is reading it"] * 3


@pytest.mark.parametrize("what", ["environment", "place", "file"])
def test_layers_are_in_common_with_processes_to_which_they_are_the_same(
    what: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = open_safetensors(checkpoint, "model").files
    layers = CommonLayers({"model": files}, "float32")

    def name() -> str:
        return layers.memory("model", ()).name

    before = name()
    assert name() == before
    if what == "environment":  # layers may lie otherwise with its libraries
        monkeypatch.setattr("sys.prefix", "another one")
    elif what == "place":  # its processes cannot see these
        monkeypatch.setattr("wan.device.shared._space", lambda: ("another machine", 1))
    else:
        file = files[0]
        copied, seen = file.read_bytes(), file.stat()
        other = file.with_suffix(".new")
        other.write_bytes(copied)
        os.utime(other, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # as old and as large
        os.replace(other, file)
    assert name() != before


@LINUX
def test_a_note_of_what_is_gone_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    note = tmp_path / f"wan-{os.getuid()}" / "x.json"
    first = opened("x", 4096)
    assert first.fills and first.memory is not None
    first.memory.fill_(7)
    first.done()
    second = opened("x", 4096)
    assert not second.fills and second.memory is not None and bool((second.memory == 7).all())
    assert len(json.loads(note.read_text())["open"]) == 2
    assert opened("x", 8192).fills  # of another size, so not what it should be
    handles = len(os.listdir("/proc/self/fd"))
    del first, second
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < handles
    for text in ("", "{", '{"open": [[1, 2]]}', '{"open": [[1, 0, 0, 0]]}'):
        note.write_text(text)
        again = opened("x", 4096)
        assert again.fills and again.memory is not None and not again.memory.any()
        again.close()


@LINUX
def test_a_note_that_cannot_be_written_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(shared, "write_json", lambda path, value: os.open("/proc/nowhere", os.O_RDONLY))
        first = opened("x", 4096)
        first.done()
    assert first.memory is not None
    second = opened("x", 4096)
    assert second.fills
    second.close()
