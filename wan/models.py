"""The models of one checkpoint: each is loaded when it is first used and kept, with the LoRAs in its weights."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from wan.background import BackgroundLoader
from wan.configs import ModelConfig
from wan.denoiser.lora_file import LoraMatch, OpenedLora, check_for_experts, open_loras
from wan.device.host_budget import HostPlan
from wan.device.parallel import Group
from wan.device.placement import move_home
from wan.device.shared import CommonLayers, CommonMemory, SharedMemory
from wan.settings import LoraFile
from wan.text.umt5 import PromptTokenizer, TextEncoder
from wan.weights.checkpoint import Checkpoint
from wan.weights.prefetch import ReadAhead, that_fit

if TYPE_CHECKING:
    from wan.denoiser.model import WanModel
    from wan.vae.vae import WanVAE


# Makes a model, given whether weights may stay mapped from their files, and memory that its layers have in common with
# other processes, if they do.
Loader: TypeAlias = Callable[[bool, CommonMemory | None], Any]


class Models:
    """Models by name: "text_encoder", "vae", and the experts under their attribute names.

    `loaders` make them, in host memory unless they say otherwise; `name` is the model's in messages. `in_threads`: one
    may be called while another model computes. LoRAs are added up on `device`, or where an expert is. `common`: which
    models have their layers in common with other processes of this machine, if any do.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        loaders: Mapping[str, Loader],
        *,
        in_threads: bool = True,
        device: torch.device | None = None,
        common: CommonLayers | None = None,
    ) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self._loaders = loaders
        self._in_threads = in_threads
        self._device = device
        self._common = common
        self._lent: set[str] = set()  # the models whose layers other processes use
        self._loaded: dict[str, Any] = {}
        self._background = BackgroundLoader(self._load)
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
            model = self._background.take(name)
            if self._plan.in_turn:
                self.forget_all()
            # what failed in a thread is tried again: its file may have been mended, and else says what is wrong with it
            self._loaded[name] = self._load(name) if model is None else model
            if self._wanted.get(name):
                self._merge(name, self._wanted[name])
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        """A new model. Layers that are in common get their LoRAs before other processes may use them."""
        self._lent.discard(name)
        if self._common is None or self._plan.in_turn:
            return self._loaders[name](self._plan.mapped, None)
        loras = self._wanted.get(name, ())
        with closing(self._common.memory(name, loras)) as layers:
            model = self._loaders[name](self._plan.mapped, layers)
            if layers.memory is not None:
                if loras:
                    self._add(name, model, loras, are_there=not layers.fills)
                self._lent.add(name)
                layers.done()
        return model

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
        # LoRAs of layers that are in common are added up at once, on the GPU that is at work
        not_now = {name for name, loras in self._wanted.items() if loras and self._common is not None}
        not_now |= self._loaded.keys()
        wanted = [name for name in dict.fromkeys(map(self._kept_as, names)) if name not in not_now]
        with self._background.loading(wanted) as check:
            yield check

    def live_by(self, plan: HostPlan) -> None:
        """Keep to a plan of host memory from now on."""
        if plan != self._plan and plan.in_turn:
            self.forget_all()  # they may be mapped, or several
        self._plan = plan

    def forget_all(self) -> None:
        """Let all models go."""
        for name in self._loaders.keys() | self._loaded.keys():
            self.forget(name)
        gc.collect()  # a model is in reference cycles of its own hooks

    def put(self, name: str, model: Any) -> None:
        """Use a model that is there already."""
        self._loaded[self._kept_as(name)] = model

    def is_loaded(self, name: str) -> bool:
        """Whether a model is in memory."""
        name = self._kept_as(name)
        return name in self._loaded or self._background.has(name)

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
        self._background.forget(self._kept_as(name))
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
) -> dict[str, Loader]:
    """What loads each model of a checkpoint: experts on `load_device`, the others in host memory.

    Weights that `config` wants in 8 bits are rounded on `device`. `shards`, asked when a model loads, are the processes
    of which each keeps a slice of it on `device`, `machine` those that have experts in common in host memory.
    """
    cpu = torch.device("cpu")

    def text_encoder(mapped: bool, common: CommonMemory | None) -> TextEncoder:
        weights, dtype = checkpoint.text_encoder, config.t5_dtype
        group = shards("text_encoder")
        home = cpu if group is None else device
        return TextEncoder.from_weights(
            weights, tokenizer, dtype=dtype, device=home, mapped=mapped, shards=group, shared=common
        )

    def vae(mapped: bool, common: CommonMemory | None) -> WanVAE:
        mean, std = config.vae_mean, config.vae_std
        return vae_class().from_weights(checkpoint.vae, mean=mean, std=std, dtype=config.vae_dtype, device=cpu)

    def expert(name: str, mapped: bool, common: CommonMemory | None) -> WanModel:
        from wan.denoiser.model import WanModel

        group, team = shards(name), machine()
        return WanModel.from_weights(
            checkpoint.experts[name],
            dtype=config.param_dtype,
            device=load_device if group is None else device,
            convert_model_dtype=convert_model_dtype,
            low_precision=config.low_precision,
            rounded_on=device,
            mapped=mapped,
            shards=group,
            shared=common if team is None else SharedMemory(team),
        )

    experts = {name: functools.partial(expert, name) for name in checkpoint.experts}
    return {"text_encoder": text_encoder, "vae": vae, **experts}
