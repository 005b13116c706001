"""Every setting once: type, default, range, flag, help, storyboard key, record key, fingerprint. Needs no PyTorch.

`Settings` is the value that the commands work with, and each of its fields is declared by `option(...)`. Everything
else is derived from the table `OPTIONS`: both parsers and the command reference (`wan.commands.flags`), what a
storyboard may say, what a clip's record holds, what is part of its fingerprint, and who may set what.

An option must say which keys of the fingerprint it is in, or why it changes no result: without one of the two it is no
option. Fingerprint keys never change, since they decide whether a finished clip is still the one that is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from wan.configs import PRESETS, WAN_CONFIGS
from wan.errors import UserError
from wan.kinds import (
    Address,
    Among,
    Choice,
    Count,
    Cut,
    Encoded,
    Files,
    Frames,
    Gib,
    Guidance,
    Interval,
    Kind,
    Local,
    Name,
    Output,
    Picture,
    PictureFolder,
    Place,
    Program,
    PromptFor,
    Real,
    Seed,
    SeedOfClip,
    Size,
    Strength,
    Switch,
    TakeOf,
    Unfit,
    Video,
    Whole,
    Words,
    YesNo,
)

SOLVERS = ("unipc", "dpm++", "euler")
# The step caches, and the strength of each unless it is given.
CACHES: Mapping[str, float] = MappingProxyType({"magcache": 0.06, "first_block": 0.1, "taylorseer": 2})
CONTINUATIONS = ("last_frame", "tail", "svi2pro")
CONTEXTS = (1, 5, 9, 13, 17)  # pixel frames of the clip before that a continuation can be conditioned on
LONGEST_CONTEXT = CONTEXTS[-1]
USUAL_CLIPS = 12  # of a chain of which nothing says how many there are
DISCARDS = (0, 4, 8, 12, 16, 20, 24)  # pixel frames; a latent frame holds four
PROMPT_MODES = ("describe", "continue")
PRECISIONS = ("bf16", "fp8", "fp8_attention")
READERS = ("auto", "pyav", "decord")
MOST_FRAMES = 4 * (1024 - 1) + 1  # of a clip: the denoisers' positions end at 1024 latent frames
MOST_STEPS = 1000  # the timesteps that the models were trained with
V2V_TASKS = ("v2v-14B", "v2v-5B")
QUESTION = "Describe this video in detail."
CANDIDATE_STEP = 1_000_000  # from one candidate's seed to the next's: past the seeds of any chain

Command = Literal["generate", "continuous", "serve", "batch"]
BOTH: tuple[Command, ...] = ("generate", "continuous")

INPUT, PROMPT, SAMPLING, CONTINUITY, SPEED, WEIGHTS, OUTPUT, SERVER, BATCH = GROUPS = (
    "Input",
    "Prompt and captions",
    "Sampling",
    "Continuity",
    "Speed and memory",
    "Weights and LoRAs",
    "Output",
    "Server",
    "Batch",
)
# Flags of a chain that a server does not take: those of one video.
NOT_SERVED = frozenset(
    (
        *("video", "from_", "until", "base_seed", "storyboard", "num_videos", "prompt", "prompt_for", "anchor_image"),
        *("end_image", "end_images", "take", "redo", "keep_following", "yes", "review", "dry_run", "no_lock"),
        *("preview", "keep_state", "prune", "upscale"),
    )
)
# Those that a batch does not take: of one video, and of a person who looks on.
NOT_BATCHED = frozenset(
    (
        *("video", "from_", "until", "prompt_for", "take", "redo", "keep_following", "review", "preview", "prune"),
        "upscale",
    )
)


@dataclass(frozen=True)
class Option:
    """One setting, as the table has it.

    `help` and `unset`, which says what None means, have other settings in backquotes. `flag` is False for one that
    only a storyboard sets. `scene` is its key in a storyboard, "" where that may not say it; `client` whether a remote
    client may; `row` whether a row of a batch may, as it may all that a client may. `record` is its key in a clip's
    record, "" where it is not there, and `was` that of 0.1.0's records.
    `fingerprint` are the keys that it is in; `same` says why it is in none. `continues`: it means nothing unless a
    video is continued.
    """

    name: str
    kind: Kind
    default: Any
    group: str
    help: str
    unset: str = ""
    only: tuple[Command, ...] = BOTH
    required: tuple[Command, ...] = ()
    flag: bool = True
    scene: str = ""
    client: bool = False
    row: bool = False
    record: str = ""
    was: str = ""
    fingerprint: tuple[str, ...] = ()
    same: str = ""
    continues: bool = False

    def __post_init__(self) -> None:
        if bool(self.fingerprint) == bool(self.same):
            raise TypeError(f"{self.name} must say which keys of the fingerprint it is in, or why it changes no result")
        if self.client and self.kind.local:
            raise TypeError(f"{self.name} names something of this machine, which is no remote client's to choose")
        if self.group not in GROUPS:
            raise TypeError(f"{self.name} is in group {self.group!r}, which is none of {', '.join(GROUPS)}")

    @property
    def word(self) -> str:
        """The flag. A setting that Python's grammar has a word for ends in an underscore there."""
        return f"--{self.name.rstrip('_')}"

    @property
    def setters(self) -> frozenset[str]:
        """Who may set it: "command line", "storyboard", "client", "row"."""
        may = {"command line": self.flag, "storyboard": bool(self.scene), "client": self.client}
        may["row"] = self.flag and (self.client or self.row)
        return frozenset(who for who, allowed in may.items() if allowed)


def option(
    group: str,
    kind: Kind,
    help: str,
    default: Any = None,
    *,
    fingerprint: str | Iterable[str] = (),
    record: bool = False,
    **more: Any,
) -> Any:
    """A field of `Settings`, see `Option`; it is recorded under its own name."""
    keys = (fingerprint,) if isinstance(fingerprint, str) else tuple(fingerprint)
    metadata = {"group": group, "kind": kind, "help": help, "fingerprint": keys, "record": record, **more}
    return dataclasses.field(default=default, metadata=metadata)


_ALONE = "a lone clip has no fingerprint"
_ORDER = "it says which clips are made, not how one is made"
_SHOWN = "clips are made alike, however they are shown or joined"
_SERVED = "clips are made alike, whoever asks for them"
_BATCHED = "clips are made alike, whichever worker makes them"
_FASTER = "the result is the same"
_DIT = "a .gguf or .safetensors denoiser in place of the folder's"


@dataclass(frozen=True)
class Settings:
    """The settings of a command, each in range. Raises UserError that names the setting.

    None leaves a setting to the preset, the model or the input.
    """

    # fmt: off
    # Input
    task: str | None = option(
        INPUT, Choice(None, tuple(WAN_CONFIGS)), "which model, and what to make with it",
        unset="chosen by `ckpt_dir` and the inputs", row=True, fingerprint="task", record=True,
    )
    video: str | None = option(
        INPUT, Video("FILE"), "the video to continue", unset="none", required=("continuous",), row=True,
        fingerprint="parent",
    )
    image: str | None = option(
        INPUT, Picture("FILE"), "the first frame (i2v-A14B, ti2v-5B)", unset="none", only=("generate",), same=_ALONE,
    )
    from_: float | None = option(
        INPUT, Real("SECONDS", 0, 1e6, "; no video is that long", above=True),
        "take the video to end at this time, and continue from there",
        unset="its end", client=True, fingerprint="parent", record=True, continues=True,
    )
    until: str | None = option(
        INPUT, Video("FILE"), "a video that the last clip leads into; the joined one holds both and their sound",
        unset="none", only=("continuous",), row=True, fingerprint="end_image", continues=True,
    )
    size: str | None = option(
        INPUT, Size("W*H"), "the area to fill, as width*height; the aspect is the input's",
        unset="the task's first size", client=True, fingerprint=("width", "height"), record=True,
    )
    frame_num: int | None = option(
        INPUT, Frames("N", 1, MOST_FRAMES, "; the models tell 1024 latent frames apart"),
        "frames of each clip, 4n+1",
        unset="81 (14B), 121 (5B); in a chain 81; fewer if the checkpoint declares fewer",
        scene="frames", client=True, fingerprint="frames", record=True, was="frames",
    )
    base_seed: int = option(
        INPUT, Seed("SEED"), "seed of the first clip, the next ones count up; negative draws one", -1,
        client=True, fingerprint="seed",
    )
    seed: int | None = option(
        INPUT, SeedOfClip("SEED"), "the clip's own seed", unset="counted up from `base_seed`",
        only=("continuous",), flag=False, scene="seed", client=True, fingerprint="seed",
    )
    storyboard: str | None = option(
        INPUT, Local("FILE"), "what is different in which clip: YAML, JSON or text", unset="none",
        only=("continuous",), row=True, same="what it says is in the settings of each clip",
    )
    name: str | None = option(
        INPUT, Name("NAME"), "the clip's name, by which it is the same clip wherever it stands", unset="none",
        only=("continuous",), flag=False, scene="name", client=True,
        same="it says which clip this is, not how it is made",
    )
    num_videos: int | None = option(
        INPUT, Whole("N", reason="; start another chain from its end"), "clips to make",
        unset=f"as many as `storyboard` or `end_images` has, or 1 with `until`, or {USUAL_CLIPS}",
        only=("continuous",), client=True, same=_ORDER,
    )

    # Prompt and captions
    prompt: str | None = option(
        PROMPT, Words("TEXT"), "what happens", unset="the VLM's description of the video, when one is continued",
        scene="prompt", client=True, fingerprint="prompt",
    )
    prompt_for: tuple[tuple[int, str], ...] = option(
        PROMPT, PromptFor("K TEXT"), "what happens in clip K, counted from 1, in place of `prompt`; repeatable", (),
        unset="none", only=("continuous",), client=True, fingerprint="prompt",
    )
    custom_prompt: str = option(
        PROMPT, Kind("TEXT"), "goes before each description, and before `prompt`", "continue video",
        only=("continuous",), scene="custom_prompt", client=True, fingerprint="custom_prompt", record=True,
        continues=True,
    )
    prompt_mode: str = option(
        PROMPT, Choice(None, PROMPT_MODES), "what the VLM is asked for: a description, or what happens next",
        "describe", client=True, fingerprint="prompt_mode", record=True, continues=True,
    )
    vlm_path: str | None = option(
        PROMPT, Encoded("DIR"), "InternVL folder or hub id (owner/name@COMMIT), or the endpoint's model",
        unset="InternVL3_5-8B in `ckpt_dir` or next to it, else from the hub",
        row=True, fingerprint="vlm", record=True, was="vlm", continues=True,
    )
    vlm_url: str | None = option(
        PROMPT, Address("URL"), "describe with an OpenAI-compatible endpoint instead of a local VLM",
        unset="none", row=True, fingerprint="vlm", record=True, continues=True,
    )
    vlm_question: str = option(
        PROMPT, Words("TEXT"), "what the VLM is asked", QUESTION,
        client=True, fingerprint="vlm_question", record=True, continues=True,
    )
    vlm_fallback: str | None = option(
        PROMPT, Words("TEXT"), "the description where the VLM declines to give one, also when it is asked again",
        unset="the run stops", client=True, fingerprint="vlm_fallback", record=True, continues=True,
    )
    num_segments: int = option(
        PROMPT, Whole("N", 1, 256, "; a VLM has no room for more frames"), "how many frames the VLM sees", 8,
        client=True, fingerprint="num_segments", record=True, continues=True,
    )
    video_reader: str = option(
        PROMPT, Choice(None, READERS), "the library that reads the VLM's frames", "auto",
        row=True, fingerprint="video_reader", record=True, continues=True,
    )
    vlm_device: str | None = option(
        PROMPT, Local("DEVICE"), "where the VLM runs, for instance cuda:1", unset="with the model",
        same="0.1.0 left it out; rounding by device can change a description", record=True, continues=True,
    )
    vlm_trust_remote_code: bool = option(
        PROMPT, Switch(), "run the code that comes with the VLM's checkpoint", False,
        fingerprint="vlm_trust_remote_code", continues=True,
    )

    # Sampling
    preset: str = option(
        SAMPLING, Choice(None, tuple(PRESETS)), "settings that go together; turbo needs LoRAs", "quality",
        client=True, same="the settings that it stands for are there", record=True,
    )
    sample_steps: int | None = option(
        SAMPLING, Whole("N", 1, MOST_STEPS, "; the models tell 1000 noise levels apart"), "solver steps",
        unset="the preset's, or the model's",
        scene="steps", client=True, fingerprint="steps", record=True,
    )
    sample_shift: float | None = option(
        SAMPLING, Real("S", 0, 1000, "; all steps are at full noise by then", above=True), "sigma shift",
        unset="the preset's, or the model's",
        scene="shift", client=True, fingerprint="shift", record=True,
    )
    sample_guide_scale: tuple[float, float] | None = option(
        SAMPLING, Guidance("G or LOW,HIGH"), "guidance, of low and of high noise", unset="the preset's, or the model's",
        scene="guidance", client=True, fingerprint="guidance", record=True,
    )
    sample_solver: str | None = option(
        SAMPLING, Choice(None, SOLVERS), "the solver", unset="the preset's, or unipc",
        client=True, fingerprint="solver", record=True,
    )
    guidance_interval: tuple[float, float] | None = option(
        SAMPLING, Interval("SIGMA"), "guidance only at sigmas from LOW to HIGH, one forward outside",
        unset="0 1: everywhere", client=True, fingerprint="guidance_interval", record=True,
    )
    cache: str | None = option(
        SAMPLING, Kind("NAME[:S]"), f"reuse what changes little between steps: {', '.join(CACHES)}; S: how freely",
        unset="the preset's, or off", client=True, fingerprint="cache", record=True,
    )

    # Continuity
    continuation: str | None = option(
        CONTINUITY, Choice(None, CONTINUATIONS), "which frames of the clip before a clip starts from",
        unset="last_frame; tail with more than one of `context_frames`",
        scene="continuation", client=True, fingerprint="continuation", record=True, continues=True,
    )
    context_frames: int | None = option(
        CONTINUITY, Among("K", numbers=CONTEXTS),
        "how many frames of the clip before are known: 1, or 5, 9, 13, 17 with tail",
        unset="1; 5 with tail and svi2pro",
        scene="context", client=True, fingerprint="context_frames", record=True, continues=True,
    )
    anchor_image: str | None = option(
        CONTINUITY, Picture("FILE"), "the picture that svi2pro holds on to", unset="a sharp one from before the end",
        scene="anchor", row=True, fingerprint="anchor", continues=True,
    )
    end_image: str | None = option(
        CONTINUITY, Picture("FILE"), "the last frame (of the last clip)", unset="none",
        scene="end_image", row=True, fingerprint="end_image", record=True,
    )
    end_images: str | None = option(
        CONTINUITY, PictureFolder("DIR"), "a folder of last frames, one for each clip in the order of their names",
        unset="none", only=("continuous",), row=True, fingerprint="end_image", continues=True,
    )
    cut: str | bool | None = option(
        CONTINUITY, Cut("FILE"), "a new shot that starts from this picture; true: from the text alone (5B)",
        only=("continuous",), flag=False, scene="cut", fingerprint="cut", record=True, continues=True,
    )
    discard: int = option(
        CONTINUITY, Among("K", numbers=DISCARDS), "leave the last K frames of each clip out before the next starts", 0,
        only=("continuous",), scene="discard", client=True, fingerprint="discard", record=True, continues=True,
    )
    handoff_command: str | None = option(
        CONTINUITY, Program("COMMAND"),
        "a program that may change the known frames of each clip, which are PNGs in the folder {frames}",
        unset="none", only=("continuous",), fingerprint="handoff", continues=True,
    )
    motion_amplitude: float = option(
        CONTINUITY, Real("A", 1, 1.5, "; more is untried"),
        "more motion, for LoRAs that make it slow: 1 to 1.5; A14B with last_frame or tail", 1.0,
        unset="1: as trained",
        scene="motion_amplitude", client=True, fingerprint="motion_amplitude", record=True,
    )
    drift_correction: float = option(
        CONTINUITY, Strength("S", 0, 1, unsaid=0.9),
        "take out colour drift, with strength S from 0 to 1; the flag alone means 0.9", 0.0,
        unset="off", client=True, fingerprint="drift_correction", record=True, continues=True,
    )
    colour_carry: float = option(
        CONTINUITY, Strength("S", 0, 1, unsaid=0.5),
        "begin each clip in colours nearer to the first clip's, with strength S from 0 to 1; the flag alone means 0.5",
        0.0, unset="off", only=("continuous",), client=True, fingerprint="colour_carry", record=True, continues=True,
    )
    best_of: int = option(
        CONTINUITY, Whole("N", 1, 1000, "; that many are days of work a clip"),
        "of N candidates of each clip keep the one with the best seam", 1,
        only=("continuous",), client=True, fingerprint="best_of", continues=True,
    )
    takes: int = option(
        CONTINUITY, Whole("N", reason="; that many are days of work a clip", high=1000),
        "make N candidates of each clip as `best_of` does, and keep them all in the folder's takes/", 1,
        only=("continuous",), scene="takes", client=True, fingerprint="best_of", continues=True,
    )
    take: tuple[tuple[int, int], ...] = option(
        CONTINUITY, TakeOf("K=N"), "go on from take N of clip K; repeatable", (),
        unset="the take with the best seam, or the one chosen before",
        only=("continuous",), client=True, fingerprint="take", continues=True,
    )
    redo: int | None = option(
        CONTINUITY, Whole("K", reason="; no chain has more clips"),
        "make clip K, counted from 1, again with another seed", unset="none",
        only=("continuous",), same=_ORDER,
    )
    keep_following: bool = option(
        CONTINUITY, Switch(), "with `redo`: keep the clips after K as they are", False,
        only=("continuous",), same=_ORDER,
    )

    yes: bool = option(
        CONTINUITY, Switch(), "make finished clips again without asking, where more than one would be", False,
        only=("continuous",), same=_ORDER,
    )
    review: bool = option(
        CONTINUITY, Switch(), "ask after each clip: keep it, make it again, edit its prompt, or stop", False,
        only=("continuous",), same=_ORDER,
    )

    # Speed and memory
    offload_model: bool | None = option(
        SPEED, YesNo("BOOL"), "keep only the model in use on the GPU", 
        unset="True; on several GPUs False without `vram`", record=True, same=_FASTER,
    )
    vram: float | Literal["auto"] | None = option(
        SPEED, Gib("GIB"), "use at most this much GPU memory; auto: what is free now", unset="no limit",
        record=True, same=_FASTER,
    )
    host_memory: float | Literal["auto"] = option(
        SPEED, Gib("GIB"), "use at most this much host memory, models then take turns in it; auto: what is free now",
        "auto", record=True, same=_FASTER,
    )
    share_weights: int = option(
        SPEED, Whole("N", 1, 64, "; no machine has more GPUs"),
        "so many processes of this machine use the same weights and LoRAs, and hold their layers in its memory once",
        1, same=_FASTER,
    )
    precision: str | None = option(
        SPEED, Choice(None, PRECISIONS),
        "number format of the denoiser's matrix products; fp8_attention: of its attention too",
        unset="the checkpoint's, or bf16", row=True, fingerprint="config", record=True, was="low_precision",
    )
    vae_dtype: str | None = option(
        SPEED, Choice(None, ("float32", "float16")),
        "number format of the VAE; float16 takes half of the time and memory, at about 60 dB from float32",
        unset="float32", row=True, fingerprint="config", record=True,
    )
    convert_model_dtype: bool = option(
        SPEED, Switch(), "round also the float32 parameters to the compute dtype", False,
        row=True, fingerprint="convert_model_dtype", record=True,
    )
    compile: str = option(
        SPEED, Choice(None, ("auto", "off")), "auto: compile the denoiser where it saves time", "auto",
        same="the order of sums may differ, as it does between GPUs",
    )
    t5_cpu: bool = option(
        SPEED, Switch(), "run the text encoder on the CPU", False, fingerprint="text_device", record=True,
    )
    ulysses_size: int | Literal["auto"] = option(
        SPEED, Count("N"), "share a clip's tokens among so many GPUs (torchrun)", "auto", same=_FASTER,
    )
    cfg_size: int | Literal["auto"] = option(
        SPEED, Count("N", 1, 2, "; guidance has two forwards"),
        "2: share guidance's two forwards between two halves of the GPUs (torchrun)", "auto", same=_FASTER,
    )
    ring_size: int | Literal["auto"] = option(
        SPEED, Count("N"), "share tokens among so many times as many GPUs, where heads are too few (torchrun)", "auto",
        same=_FASTER,
    )
    collective_timeout: float = option(
        SPEED, Real("SECONDS", 1, 1e6, "; that is 11 days"), "give up when a GPU lets the others wait so long", 600.0,
        same=_FASTER,
    )
    t5_fsdp: bool = option(
        SPEED, Switch(), "each GPU keeps a slice of the text encoder, and all encode together (torchrun)", False,
        same=_FASTER,
    )
    dit_fsdp: bool = option(
        SPEED, Switch(), "each GPU keeps a slice of the denoisers; a layer is whole while it is used (torchrun)", False,
        same=_FASTER,
    )

    # Weights and LoRAs
    ckpt_dir: str | None = option(
        WEIGHTS, Encoded("DIR"), "checkpoint folder, official or diffusers layout, or a hub id",
        unset="none; needed without `comfy_dir`", row=True, fingerprint="checkpoint", record=True, was="checkpoint",
    )
    comfy_dir: str | None = option(
        WEIGHTS, Encoded("DIR"), "ComfyUI's folder models: parts that are not named otherwise come from there",
        unset="none", row=True, fingerprint="checkpoint", record=True,
    )
    dit: str | None = option(
        WEIGHTS, Encoded("FILE"), f"{_DIT} (5B; or one for both experts of A14B)", unset="none",
        row=True, fingerprint="checkpoint", record=True,
    )
    dit_high: str | None = option(
        WEIGHTS, Encoded("FILE"), f"{_DIT} (A14B, high noise)", unset="none", row=True,
        fingerprint="checkpoint", record=True,
    )
    dit_low: str | None = option(
        WEIGHTS, Encoded("FILE"), f"{_DIT} (A14B, low noise)", unset="none", row=True,
        fingerprint="checkpoint", record=True,
    )
    vae: str | None = option(
        WEIGHTS, Encoded("FILE"), "a .safetensors or .pth VAE in place of the folder's", unset="none",
        row=True, fingerprint="checkpoint", record=True,
    )
    t5: str | None = option(
        WEIGHTS, Encoded("FILE"), "a .safetensors, .gguf or .pth text encoder in place of the folder's", unset="none",
        row=True, fingerprint="checkpoint", record=True,
    )
    lora: tuple[str, ...] = option(
        WEIGHTS, Files("PATH[:S]"), "merge a LoRA with strength S (5B); repeatable", (), unset="none",
        scene="lora", row=True, fingerprint="loras",
    )
    lora_high: tuple[str, ...] = option(
        WEIGHTS, Files("PATH[:S]"), "merge a LoRA with strength S (A14B, high noise); repeatable", (), unset="none",
        scene="lora_high", row=True, fingerprint="loras",
    )
    lora_low: tuple[str, ...] = option(
        WEIGHTS, Files("PATH[:S]"), "merge a LoRA with strength S (A14B, low noise); repeatable", (), unset="none",
        scene="lora_low", row=True, fingerprint="loras",
    )
    upscale: str | None = option(
        WEIGHTS, Encoded("FILE"),
        "write the finished video once more, enlarged by an upscaling model in .safetensors or .pth", unset="off",
        same=_SHOWN,
    )

    # Output
    save_file: str | None = option(
        OUTPUT, Output("FILE"), "the .mp4 to write", unset="a name made of task, size, input and time",
        only=("generate",), same=_SHOWN,
    )
    overwrite: bool = option(
        OUTPUT, Switch(), "replace `save_file` also where it was not made here", False, only=("generate",), same=_SHOWN,
    )
    output_dir: str = option(
        OUTPUT, Output("DIR"), "folder for clips, joined video and logs; of a batch with {name} for that of a row",
        "./continuous_outputs", only=("continuous",), required=("batch",), same=_SHOWN,
    )
    fade: int = option(
        OUTPUT, Whole("K", 0, 100, "; that is no fade but another clip"), "cross-fade over K frames at each cut", 0,
        only=("continuous",), scene="fade", client=True, same=_SHOWN,
    )
    include_source: bool = option(
        OUTPUT, Switch(), "begin the joined video with the source and its sound", False,
        only=("continuous",), client=True, same=_SHOWN,
    )
    preview: bool = option(
        OUTPUT, Switch(), "write preview.webp into the folder while a clip is sampled, in 1 % of the time", False,
        only=("continuous",), same=_SHOWN,
    )
    no_video_metadata: bool = option(
        OUTPUT, Switch(), "do not write prompt and settings into the mp4", False, client=True, same=_SHOWN,
    )
    quiet: bool = option(
        OUTPUT, Switch(), "say nothing but warnings and errors, and the result", False, same=_SHOWN,
    )
    log_file: str | None = option(
        OUTPUT, Output("FILE"), "append all that is said to this file, with the time", unset="none", same=_SHOWN,
    )
    keep_state: str = option(
        OUTPUT, Choice(None, ("all", "last")),
        "which clips' frames and latents stay; last: of the last two, and none before can then be made again by itself",
        "all",
        only=("continuous",), row=True, same=_SHOWN,
    )
    prune: str | None = option(
        OUTPUT, Output("DIR"), "do to a run's folder what `keep_state` last does, and nothing else", unset="none",
        only=("continuous",), same=_SHOWN,
    )
    no_lock: bool = option(
        OUTPUT, Switch(), "do not lock the folder, where the file system has no locks; see to it that one run uses it",
        False, only=("continuous",), same=_SHOWN,
    )
    dry_run: bool = option(
        OUTPUT, Switch(), "print the plan of the run and make nothing", False, same=_SHOWN,
    )

    # Server
    host: str = option(
        SERVER, Local("NAME"), "the address to listen at; one that other machines reach needs an API key", "127.0.0.1",
        only=("serve",), same=_SERVED,
    )
    port: int = option(
        SERVER, Whole("N", 0, 65535, "; ports end there"), "the port to listen at; 0 takes a free one", 8188,
        only=("serve",), same=_SERVED,
    )
    api_key_file: str | None = option(
        SERVER, Local("FILE"), "a file with the key that every client must send", unset="WAN_API_KEY, or no key",
        only=("serve",), same=_SERVED,
    )
    max_upload: float = option(
        SERVER, Real("GIB", 0, 1024, "; cut a longer video first", above=True),
        "the largest request that is taken, with its files", 2.0, only=("serve",), same=_SERVED,
    )
    max_queue: int = option(
        SERVER, Whole("N", 1, 100_000, "; more would wait for years"), "how many chains may wait", 100,
        only=("serve",), same=_SERVED,
    )
    max_frames: int = option(
        SERVER, Whole("N", 1, 10**6, "; that many are months of work"),
        "how many frames one chain may ask for, with all its takes", 20_000, only=("serve",), same=_SERVED,
    )

    # Batch
    videos: str | None = option(
        BATCH, Local("DIR|GLOB|FILE"),
        "the videos, a chain each: a folder, a pattern, or a list in .txt, .csv, .jsonl or .yaml, whose rows may set "
        "other things, too", unset="none", only=("batch",), required=("batch",), same=_BATCHED,
    )
    gpus_per_job: int = option(
        BATCH, Whole("N", 1, 64, "; no machine has more"), "GPUs of one machine that share each chain", 1,
        only=("batch",), same=_BATCHED,
    )
    workers: int | None = option(
        BATCH, Whole("N", 1, 10_000, "; one Ray holds no more"), "how many chains are made at once",
        unset="the GPUs by `gpus_per_job`; 1 without a GPU", only=("batch",), same=_BATCHED,
    )
    captioners: int = option(
        BATCH, Whole("N", 0, 1000, "; one Ray holds no more"),
        "describe with so many VLMs, each on a GPU of its own, which the workers share; 0: each worker has its own", 0,
        only=("batch",), same=_BATCHED,
    )
    address: str | None = option(
        BATCH, Local("ADDRESS"), "the Ray cluster to work on: auto, HOST:PORT or ray://HOST:PORT",
        unset="a Ray on this machine, which is started and ended", only=("batch",), same=_BATCHED,
    )
    max_failures: int = option(
        BATCH, Whole("N", 1, 1000, "; a chain that fails so often fails always"),
        "give a chain up that has failed so often without finishing a clip", 3, only=("batch",), same=_BATCHED,
    )
    patience: float = option(
        BATCH, Real("SECONDS", 1, 1e6, "; that is 11 days"),
        "replace a worker that says nothing for so long, or takes 4 times as long for a clip as others did", 1800.0,
        only=("batch",), same=_BATCHED,
    )
    skip_bad: bool = option(
        BATCH, Switch(), "leave rows out that cannot be made, and make the others", False, only=("batch",),
        same=_BATCHED,
    )
    upload: str | None = option(
        BATCH, Place("URL"), "where finished chains are uploaded to, with {name}: s3://bucket/runs/{name}, say",
        unset="nowhere", only=("batch",), same=_BATCHED,
    )
    report_dir: str | None = option(
        BATCH, Output("DIR"), "folder for batch.html and batch.jsonl", unset="what is before {name} in `output_dir`",
        only=("batch",), same=_BATCHED,
    )
    # fmt: on

    def __post_init__(self) -> None:
        for one in OPTIONS.values():
            if (value := getattr(self, one.name)) is not None:
                check(one.name, value)


def _options() -> dict[str, Option]:
    options = {}
    for field in dataclasses.fields(Settings):
        declared = dict(field.metadata)
        recorded = field.name.rstrip("_") if declared.pop("record") else ""
        options[field.name] = Option(name=field.name, default=field.default, record=recorded, **declared)
    return options


OPTIONS: Mapping[str, Option] = MappingProxyType(_options())

EXPERT_OF_DIT: Mapping[str, str] = MappingProxyType(
    {"dit": "model", "dit_high": "high_noise_model", "dit_low": "low_noise_model"}
)
PART_OF_FILE: Mapping[str, str] = MappingProxyType({"vae": "vae", "t5": "text_encoder"})
EXPERT_OF_LORA: Mapping[str, str] = MappingProxyType(
    {"lora": "model", "lora_high": "high_noise_model", "lora_low": "low_noise_model"}
)


def check(name: str, value: Any) -> None:
    """Raise UserError, with the setting's name, for a value that it does not take."""
    try:
        OPTIONS[name].kind.check(value)
    except Unfit as error:
        raise UserError(f"`{name}` {error}") from error


def options_of(command: Command) -> list[Option]:
    """The options of a command, in the order of the table. A server and a batch take those of a chain but not of one
    alone."""
    left_out = {"serve": NOT_SERVED, "batch": NOT_BATCHED}.get(command)
    return [
        one
        for one in OPTIONS.values()
        if command in one.only or (left_out is not None and "continuous" in one.only and one.name not in left_out)
    ]


def by_row_key() -> dict[str, Option]:
    """What a row of a batch may set, by its name there, which is that of the flag."""
    return {one.word.removeprefix("--"): one for one in options_of("continuous") if "row" in one.setters}


def by_scene_key() -> dict[str, Option]:
    """What a storyboard may say about a clip, by its key there."""
    return {one.scene: one for one in OPTIONS.values() if one.scene}


def by_fingerprint_key() -> dict[str, list[Option]]:
    """The options that are in each key of a fingerprint."""
    keys = {key: None for one in OPTIONS.values() for key in one.fingerprint}
    return {key: [one for one in OPTIONS.values() if key in one.fingerprint] for key in keys}


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a clip's record made its pictures: settings and prompts, and nothing that names a place.

    Equal runs have it equal, whatever machine they ran on and however long they took.
    """
    shown = {one.record for one in OPTIONS.values() if not one.kind.local or isinstance(one.kind, Picture)}
    return {key: value for key, value in record.items() if key in _OF_EVERY_CLIP or key in shown}


_OF_EVERY_CLIP = ("prompt", "negative_prompt", "seed", "width", "height", "fps")


def usual_clips(settings: Settings) -> int:
    """How many clips a chain has where neither `num_videos`, a storyboard nor `end_images` says it."""
    return USUAL_CLIPS if settings.until is None else 1


def words_of(arguments: Mapping[str, Any], command: Command = "continuous") -> list[str]:
    """The words of a command line that give settings these values, as JSON has them, without defaults."""
    words = []
    for one in options_of(command):
        value = arguments.get(one.name)
        if not one.flag or value in (None, [], one.default):
            continue
        if isinstance(one.kind, Switch) and not isinstance(one.kind, YesNo):
            words.append(one.word)
        elif isinstance(one.kind, PromptFor):
            words += [word for pair in value for word in (one.word, *one.kind.write(pair))]
        elif isinstance(one.kind, Interval):
            words += [one.word, *one.kind.write(value)]
        else:
            for word in one.kind.write(value):
                # a value that begins with a dash would be read as a flag
                words += [f"{one.word}={word}"] if word.startswith("-") else [one.word, word]
    return words


def current(record: Mapping[str, Any]) -> dict[str, Any]:
    """A clip's record with today's keys; 0.1.0 spelled some of them otherwise."""
    today = dict(record)
    for one in OPTIONS.values():
        if one.was in today and one.record not in today:
            today[one.record] = today.pop(one.was)
    if str(today.get("vlm_path") or "").startswith(("http://", "https://")):
        today |= {"vlm_url": today["vlm_path"], "vlm_path": None}
    files = today.pop("dit_files", None)
    for flag, expert in EXPERT_OF_DIT.items():
        if isinstance(files, Mapping) and (file := files.get(expert)):
            today[flag] = file
    return today
