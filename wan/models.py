"""The models of one checkpoint: each is loaded when it is first used and kept, with the LoRAs in its weights."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Thread, get_ident
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wan.configs import ModelConfig
from wan.denoiser.lora_file import LoraMatch, OpenedLora, check_for_experts, open_loras
from wan.detail import heard_by, tell_detail
from wan.device.host_budget import HostPlan
from wan.device.parallel import Group
from wan.device.placement import move_home
from wan.device.shared import CommonMemory, space
from wan.settings import LoraFile
from wan.text.umt5 import PromptTokenizer, TextEncoder
from wan.version import __version__
from wan.weights.checkpoint import Checkpoint
from wan.weights.prefetch import ReadAhead, that_fit

if TYPE_CHECKING:
    from wan.denoiser.model import WanModel
    from wan.vae.vae import WanVAE


LOOKS = 0.2  # seconds between two looks at what a thread is at


class CommonLayers:
    """Where the layers of a model lie for all processes of this machine that use the same weights, LoRAs among them.

    `facts` are JSON that says all of what is in them.
    """

    def __init__(self, facts: Any) -> None:
        self.name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        self.memory: CommonMemory | None = None

    def __call__(self, size: int) -> CommonMemory:
        """Memory for so many bytes of layers."""
        self.memory = CommonMemory(self.name, size)
        return self.memory

    def done(self) -> None:
        """All is in them."""
        if self.memory is not None:
            self.memory.done()

    def close(self) -> None:
        """If they are not done, another process may fill them."""
        if self.memory is not None:
            self.memory.close()

    @property
    def are_used(self) -> bool:
        """Whether a model has them, and other processes may."""
        return self.memory is not None and self.memory.memory is not None

    @property
    def are_there(self) -> bool:
        """Whether another process has filled them."""
        return self.memory is not None and not self.memory.fills


class Models:
    """Models by name: "text_encoder", "vae", and the experts under their attribute names.

    `loaders` make them, in host memory unless they say otherwise, and are given whether weights may stay mapped from
    their files; `name` is the model's in messages. `in_threads`: one may be called while another model computes. LoRAs
    are added up on `device`, or where an expert is. `in_common`: other processes of this machine use the same models;
    as JSON, what becomes of the files' numbers.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        loaders: Mapping[str, Callable[[bool], Any]],
        *,
        in_threads: bool = True,
        device: torch.device | None = None,
        in_common: Any = None,
    ) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self._loaders = loaders
        self._in_threads = in_threads
        self._device = device
        self._in_common = in_common
        self._common: dict[tuple[str, int], CommonLayers | None] = {}  # of what is being loaded, by thread
        self._lent: set[str] = set()  # the models whose layers other processes use
        self._loaded: dict[str, Any] = {}
        self._coming: dict[str, Future[Any]] = {}  # what is being loaded
        self._details: dict[str, str] = {}  # what its thread is at, by model
        self._plan = HostPlan()
        self._wanted: Mapping[str, tuple[LoraFile, ...]] = {}
        self._opened: dict[tuple[str, LoraFile], OpenedLora] = {}
        self._checked: set[tuple[str, Path]] = set()  # LoRAs of which each value was looked at, by expert
        self.merged: dict[str, list[LoraMatch]] = {}  # the LoRAs that are in each expert's weights now

    def _kept_as(self, name: str) -> str:
        """The name under which a model is kept: one denoiser may serve both experts."""
        return "high_noise_model" if self.checkpoint.single and name == "low_noise_model" else name

    def __getitem__(self, name: str) -> Any:
        name = self._kept_as(name)
        if name not in self._loaded:
            if (coming := self._coming.get(name)) is not None:
                self._wait_for(name)
                self._coming.pop(name, None)
            if self._plan.in_turn:
                self.forget_all()
            # what failed in a thread is tried again: its file may have been mended, and else says what is wrong with it
            has_come = coming is not None and coming.exception() is None
            self._loaded[name] = coming.result() if coming and has_come else self._load(name)
            if self._wanted.get(name):
                self._merge(name, self._wanted[name])
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        """A new model. Layers that are in common get their LoRAs before other processes may use them."""
        loras = self._wanted.get(name, ())
        self._lent.discard(name)
        # one that was forgotten may still be read in its thread while it is read again
        common = self._common[name, get_ident()] = self._layers_for(name, loras)
        try:
            model = self._loaders[name](self._plan.mapped)
            if common is not None and common.are_used:
                if loras:
                    self._add(name, model, loras, are_there=common.are_there)
                self._lent.add(name)
                common.done()
        finally:
            self._common.pop((name, get_ident()), None)
            if common is not None:
                common.close()
        return model

    def _layers_for(self, name: str, loras: tuple[LoraFile, ...]) -> CommonLayers | None:
        """Where a model's layers lie, None where they are this process's alone."""
        if self._in_common is None or self._plan.in_turn or self.checkpoint.single:
            return None
        files = dict(self.checkpoint.parts)[name].files
        states = [*map(_state_of, files), *((_state_of(one.path), one.strength) for one in loras)]
        code = [__version__, sys.prefix]  # libraries say in which order parameters lie
        return CommonLayers([space(), code, name, self._in_common, states])

    def common(self, name: str) -> CommonLayers | None:
        """Where the layers of a model lie that this thread loads now, if other processes use them too."""
        return self._common.get((name, get_ident()))

    def _wait_for(self, name: str) -> None:
        """Wait until a thread has loaded a model, and pass on what it tells."""
        while not wait([self._coming[name]], LOOKS).done:
            if name in self._details:
                tell_detail(self._details[name])

    @contextmanager
    def loading(self, names: Collection[str], alone: bool = True) -> Iterator[Callable[[], None]]:
        """Load models in a thread while the block computes; whoever uses one that is not there yet waits for it.

        What the block is given raises what went wrong so far. Where models take turns in host memory, need the GPU that
        is at work, or are loaded by several processes together (`alone` is False), only their files are read.
        """
        if self._plan.in_turn or not (self._in_threads and alone and names):
            with self.read_ahead(names) if names else nullcontext():
                yield lambda: None
            return
        self._coming = {name: future for name, future in self._coming.items() if not _has_failed(future)}
        begun = self._loaded.keys() | self._coming.keys()
        if self._in_common is not None:  # their LoRAs are added up at once, on the GPU that is at work
            begun |= {name for name, loras in self._wanted.items() if loras}
        wanted = [name for name in dict.fromkeys(map(self._kept_as, names)) if name not in begun]
        coming: dict[str, Future[Any]] = {name: Future() for name in wanted}

        def hear(name: str, detail: str | None = None) -> None:
            if self._coming.get(name) is not coming[name]:
                raise CancelledError(f"{name} was forgotten while it came")
            if detail is not None:
                self._details[name] = detail

        def read(name: str) -> Any:
            with heard_by(functools.partial(hear, name)):
                model = self._load(name)
            hear(name)
            return model

        def load() -> None:
            for name, future in coming.items():
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(read(name))
                except BaseException as error:  # raised again where the model is used, or by `check`
                    clear_frames(error.__traceback__)  # which hold what was read, and the next try needs that memory
                    gc.collect()
                    future.set_exception(error)
                finally:
                    self._details.pop(name, None)

        def check() -> None:
            for future in list(self._coming.values()):
                if future.done():
                    future.result()

        self._coming |= coming
        Thread(target=load, name="loading", daemon=True).start()
        try:
            yield check
        finally:  # what has begun goes on, for whoever wants it next
            for name, future in coming.items():
                if future.cancel() and self._coming.get(name) is future:
                    del self._coming[name]

    def live_by(self, plan: HostPlan) -> None:
        """Keep to a plan of host memory from now on."""
        if plan != self._plan and plan.in_turn:
            self.forget_all()  # they may be mapped, or several
        self._plan = plan

    @property
    def take_turns(self) -> bool:
        """Whether a model leaves host memory when another is needed."""
        return self._plan.in_turn

    def forget_all(self) -> None:
        """Let all models go."""
        for name in [*self._loaded, *self._coming]:
            self.forget(name)
        gc.collect()  # a model is in circles of its own hooks

    def put(self, name: str, model: Any) -> None:
        """Use a model that is there already."""
        self._loaded[self._kept_as(name)] = model

    def is_loaded(self, name: str) -> bool:
        """Whether a model is in memory."""
        name = self._kept_as(name)
        if name in self._loaded:
            return True
        coming = self._coming.get(name)
        return coming is not None and coming.done() and not _has_failed(coming)

    def experts_to_keep(self) -> frozenset[str]:
        """The experts that stay in memory from one clip to the next."""
        return frozenset(name for name in self.checkpoint.experts if self.is_loaded(name) and not self._plan.in_turn)

    def keep_experts(self, names: Collection[str]) -> None:
        """Let other experts go, so that all processes of a team load the same ones next."""
        for name in self.checkpoint.experts:
            if name not in names and self.is_loaded(name):
                self.forget(name)

    def forget(self, name: str) -> None:
        """Let a model go; it is loaded again when it is next used."""
        self._loaded.pop(self._kept_as(name), None)
        if (coming := self._coming.pop(self._kept_as(name), None)) is not None:
            coming.cancel()  # one that has begun ends at its next shard
        self._lent.discard(name)
        for expert in [one for one in self.merged if self._kept_as(one) == self._kept_as(name)]:
            del self.merged[expert]

    @property
    def loaded(self) -> list[nn.Module]:
        """The models that are in memory."""
        return list(self._loaded.values())

    def wait_at_home(self) -> None:
        """Let all models wait in host memory."""
        for model in self.loaded:
            move_home(model)

    def read_ahead(self, names: Collection[str] | None = None) -> ReadAhead:
        """Reads the files of models (all, or these) that are not loaded, in the order of use, as far as memory goes."""
        parts = [(name, weights) for name, weights in self.checkpoint.parts if names is None or name in names]
        files = [file for name, weights in parts if not self.is_loaded(name) for file in weights.files]
        return ReadAhead(that_fit(files), len(files))

    def check_loras(self, loras: Mapping[str, tuple[LoraFile, ...]]) -> None:
        """Look at LoRA files, by the expert that they are for, without loading them. Raises UserError."""
        check_for_experts(loras, self.checkpoint, self.name)
        for expert, files in loras.items():
            self._open(expert, files)

    def expect_loras(self, wanted: Mapping[str, tuple[LoraFile, ...]]) -> None:
        """Say which ones `merge_loras` will put into experts that are loaded from now on."""
        self._wanted = wanted

    def merge_loras(self, wanted: Mapping[str, tuple[LoraFile, ...]]) -> None:
        """Put these LoRAs, by expert, into the weights in place of those that are there. Raises UserError.

        An expert that is not loaded gets them when it is first used, so that the first one need not wait for the other;
        that their values are finite is seen here, since it may be first used after half of the steps.
        """
        check_for_experts(wanted, self.checkpoint, self.name)
        for expert, files in wanted.items():
            if not self.is_loaded(expert):
                self._check_values(expert, files)
        self._wanted = wanted
        for expert in sorted(wanted.keys() | self.merged.keys()):  # in every process alike
            if self.is_loaded(expert):
                self._merge(expert, wanted.get(expert, ()))

    def _check_values(self, expert: str, files: tuple[LoraFile, ...]) -> None:
        """Raise UserError for values of LoRAs that are not finite. Each file is read once, and then is in the cache."""
        from wan.denoiser.lora import check_values

        for one in self._open(expert, files):
            if (of := (expert, one.match.lora.path)) not in self._checked:
                check_values(one)
                self._checked.add(of)

    def _merge(self, expert: str, files: tuple[LoraFile, ...]) -> None:
        model = self[expert]  # which merges them itself where it is read for this
        if files == tuple(match.lora for match in self.merged.get(expert, [])):
            return
        if expert in self._lent:
            del model
            self.forget(expert)  # others use it as it is, and this process gets one with these LoRAs
            gc.collect()
            self[expert]
            return
        try:
            self._add(expert, model, files)
        except BaseException:
            self.forget(expert)  # half merged
            raise

    def _add(self, expert: str, model: WanModel, files: tuple[LoraFile, ...], are_there: bool = False) -> None:
        """Put LoRAs into an expert; `are_there`: into what its layers do not hold, for they have them."""
        from wan.denoiser.lora import merge_loras

        opened = self._open(expert, files)
        merge_loras(model, self.checkpoint.experts[expert], opened, self._device, layers_have_them=are_there)
        self.merged[expert] = [one.match for one in opened]

    @property
    def matches(self) -> dict[str, list[LoraMatch]]:
        """How the LoRAs that are wanted match, by expert, whether or not that is in memory now."""
        return {expert: [one.match for one in self._open(expert, files)] for expert, files in self._wanted.items()}

    def lora_bytes(self, loras: Mapping[str, tuple[LoraFile, ...]]) -> dict[str, int]:
        """What LoRA files hold for each expert that has some. Raises UserError."""
        return {expert: sum(one.size for one in self._open(expert, files)) for expert, files in loras.items() if files}

    def _open(self, expert: str, files: tuple[LoraFile, ...]) -> list[OpenedLora]:
        """The files' headers, read once for each expert."""
        new = [file for file in files if (expert, file) not in self._opened]
        for file, opened in zip(new, open_loras(new, self.checkpoint.experts[expert]), strict=True):
            self._opened[expert, file] = opened
        return [self._opened[expert, file] for file in files]


def _state_of(file: Path) -> tuple[str, int, int, int, int]:
    """What tells a file from what it was and from others; a container may have another one in the same place."""
    seen = file.stat()
    return str(file.resolve()), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def _has_failed(future: Future[Any]) -> bool:
    return future.done() and future.exception() is not None


def loaders(
    checkpoint: Checkpoint,
    config: ModelConfig,
    tokenizer: PromptTokenizer,
    vae_class: Callable[[], type[WanVAE]],
    *,
    device: torch.device,
    load_device: torch.device,
    convert_model_dtype: bool,
    shards: Callable[[str], Group | None] = lambda name: None,
    machine: Callable[[], Group | None] = lambda: None,
    common: Callable[[str], CommonLayers | None] = lambda name: None,
) -> dict[str, Callable[[bool], Any]]:
    """What loads each model of a checkpoint: experts on `load_device`, the others in host memory.

    Each is called with whether weights may stay mapped from their files.

    Weights that `config` wants in 8 bits are rounded on `device`. `shards`, asked when a model loads, are the processes
    of which each keeps a slice of it on `device`, `machine` those that have experts in common in host memory. `common`
    says where a model's layers lie that are in common with processes which this one does not know.
    """
    cpu = torch.device("cpu")

    def text_encoder(mapped: bool) -> TextEncoder:
        weights, dtype = checkpoint.text_encoder, config.t5_dtype
        group = shards("text_encoder")
        home = cpu if group is None else device
        lie = None if group is not None else common("text_encoder")
        return TextEncoder.from_weights(
            weights, tokenizer, dtype=dtype, device=home, mapped=mapped, shards=group, common=lie
        )

    def vae(mapped: bool) -> WanVAE:
        mean, std = config.vae_mean, config.vae_std
        return vae_class().from_weights(checkpoint.vae, mean=mean, std=std, dtype=config.vae_dtype, device=cpu)

    def expert(name: str, mapped: bool) -> WanModel:
        from wan.denoiser.model import WanModel

        group = shards(name)
        return WanModel.from_weights(
            checkpoint.experts[name],
            dtype=config.param_dtype,
            device=load_device if group is None else device,
            convert_model_dtype=convert_model_dtype,
            low_precision=config.low_precision,
            rounded_on=device,
            mapped=mapped,
            shards=group,
            machine=machine(),
            common=common(name),
        )

    experts = {name: functools.partial(expert, name) for name in checkpoint.experts}
    return {"text_encoder": text_encoder, "vae": vae, **experts}
