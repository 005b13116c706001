"""The command line, made of `wan.options`: both parsers, their help, and the reference page. Needs no PyTorch."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from wan.errors import UserError, spell
from wan.kinds import (
    LARGEST_SEED,
    MOST_CLIPS,
    Choice,
    Files,
    Frames,
    Interval,
    PromptFor,
    Real,
    Strength,
    Switch,
    TakeOf,
    Unfit,
    YesNo,
)
from wan.options import (
    BOTH,
    CANDIDATE_STEP,
    GROUPS,
    OPTIONS,
    V2V_TASKS,
    Command,
    Option,
    Settings,
    options_of,
    usual_clips,
)
from wan.settings import Context, StepCache
from wan.version import __version__

PROGRAMS: Mapping[Command, str] = {
    "generate": "generate.py",
    "continuous": "generate_continuous.py",
    "serve": "wan-serve",
    "batch": "generate_batch.py",
}
NAME = "{name}"  # in the folder of a batch
_ABOUT: Mapping[Command, str] = {
    "generate": """Make one clip with Wan2.2, or continue a video by one clip.

example:
  python generate.py --video input.mp4 --ckpt_dir ./Wan2.2-TI2V-5B""",
    "continuous": """Continue a video by a chain of clips, each on its last.

example:
  python generate_continuous.py --video input.mp4 --ckpt_dir ./Wan2.2-TI2V-5B --num_videos 12""",
    "serve": """Make chains for a page in the browser and for programs. The flags are what a chain has by default.

example:
  wan-serve --ckpt_dir ./Wan2.2-TI2V-5B --output_dir ./served""",
    "batch": """Continue many videos, each by a chain, on all GPUs of this machine or of a Ray cluster. The flags are
what each chain has unless its row in the list says otherwise.

example:
  python generate_batch.py --videos ./clips --ckpt_dir ./Wan2.2-TI2V-5B --output_dir runs/{name}""",
}

_USAGE: Mapping[Command, str] = {
    "continuous": "--video FILE ",
    "batch": "--videos DIR|GLOB|FILE --output_dir DIR/{name} ",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing the usage; takes no shortened names."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Raise UserError for a flag that does not exist, before anything that is missing because of it."""
        known = list(self._option_string_actions)
        for before, word in zip(("", *words), words, strict=False):
            if word == "--":
                return
            flag = word.partition("=")[0]
            if re.match(r"--?[A-Za-z]", word) and flag not in known:
                close = difflib.get_close_matches(
                    flag.replace("-", "_"), [one.replace("-", "_") for one in known], 1, 0.7
                )
                advice = f"; did you mean --{close[0].lstrip('_')}?" if close else ""
                theirs = [PROGRAMS[command] for command in PROGRAMS if flag in _words(command)]
                if not close and theirs:
                    advice = f"; it is one of {' and '.join(theirs)}"
                elif not close and self._takes_a_word(before):
                    advice = f"; if it is the value of {before}, write {before}={word[:40]}"
                self.error(f"unknown flag {flag[:40]}{advice}")

    def join_values(self, words: Sequence[str]) -> list[str]:
        """The words, with a value that begins with one dash, as "-rain" may, put to its flag: "--prompt=-rain".

        argparse takes every such word for a flag. What is a flag stays one, and so does what begins with two dashes.
        """
        joined: list[str] = []
        for word in words:
            is_value = word.startswith("-") and not word.startswith("--") and word not in self._option_string_actions
            if is_value and joined and self._takes_a_word(joined[-1]):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def _takes_a_word(self, flag: str) -> bool:
        action = self._option_string_actions.get(flag)
        return action is not None and action.nargs is None and action.metavar is not None


def _words(command: Command) -> set[str]:
    return {one.word for one in options_of(command) if one.flag}


def parser_of(command: Command, *, whole: bool = True) -> Parser:
    """The parser of a command, whose namespace holds the words of the flags that are there.

    Those that are required may be missing unless the command is to be `whole`.
    """
    parser = Parser(
        prog=PROGRAMS[command],
        usage=f"%(prog)s {_USAGE.get(command, '')}--ckpt_dir DIR [flags]",
        description=_ABOUT[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wan-continue {__version__}")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for one in options_of(command):
        if one.flag:
            groups[one.group].add_argument(one.word, dest=one.name, **_arguments(one, command, whole))
    return parser


def _arguments(one: Option, command: Command, whole: bool) -> dict[str, Any]:
    """How argparse collects the words of an option."""
    kind, required = one.kind, command in one.required
    arguments: dict[str, Any] = {"help": _help(one, required), "required": required and whole}
    if isinstance(kind, Switch) and not isinstance(kind, YesNo):
        return arguments | {"action": "store_true"}
    if isinstance(kind, Choice):
        return arguments | {"metavar": f"{{{','.join(_names(one, kind, command))}}}"}
    if isinstance(kind, Interval):
        return arguments | {"nargs": 2, "metavar": ("LOW", "HIGH")}
    if isinstance(kind, PromptFor):
        return arguments | {"nargs": 2, "metavar": ("K", "TEXT"), "action": "append"}
    if isinstance(kind, Strength):
        return arguments | {"nargs": "?", "const": str(kind.unsaid), "metavar": kind.metavar}
    return arguments | {"metavar": kind.metavar} | ({"action": "append"} if isinstance(kind, Files | TakeOf) else {})


def _names(one: Option, kind: Choice, command: Command) -> tuple[str, ...]:
    return V2V_TASKS if one.name == "task" and command != "generate" else kind.names


def _help(one: Option, required: bool) -> str:
    off = isinstance(one.kind, Switch) and one.default is False
    default = "" if required or off else f" (default: {one.unset or one.default})"
    return spell(one.help + default, spell_flag).replace("%", "%%")


def parse(command: Command, argv: Sequence[str] | None = None) -> Settings:
    """The settings that the words of a command mean, each in range, and together. Raises UserError."""
    words = sys.argv[1:] if argv is None else list(argv)
    prunes = command == "continuous" and any(word.partition("=")[0] == "--prune" for word in words)
    parser = parser_of(command, whole=not prunes)
    words = parser.join_values(words)
    if not {"-h", "--help", "--version"} & set(words):
        parser.refuse_unknown(words)
    given = vars(parser.parse_args(words))
    if prunes and len(given) > 1:
        raise UserError("`prune` is given alone; it makes no clips")
    settings = Settings(**{name: _read(OPTIONS[name], value) for name, value in given.items()})
    if not prunes:
        check_together(command, settings)
    return settings


def _read(one: Option, words: Any) -> Any:
    """The value of an option, from what argparse collected."""
    try:
        if isinstance(one.kind, Files):
            return tuple(words)
        if isinstance(one.kind, Interval):
            return tuple(Real().read(word) for word in words)
        if words == []:  # until Python 3.12 argparse loses this one value
            words = "--"
        return words if words is True else one.kind.read(words)
    except Unfit as error:
        raise UserError(f"`{one.name}` {error}") from error


def check_together(command: Command, settings: Settings) -> None:
    """Raise UserError for settings that do not go together."""
    if command == "batch":
        if NAME not in settings.output_dir:
            raise UserError(
                f"`output_dir` {settings.output_dir} must hold {NAME}, for the name of each row: runs/{NAME}, say"
            )
        if settings.upload is not None and NAME not in settings.upload:
            raise UserError(f"`upload` must hold {NAME}, for the name of each row: s3://bucket/runs/{NAME}, say")
        sharing = ("ulysses_size", "cfg_size", "ring_size", "t5_fsdp", "dit_fsdp")
        given = [f"`{name}`" for name in sharing if getattr(settings, name) != OPTIONS[name].default]
        if given and settings.gpus_per_job == 1:
            raise UserError(f"{', '.join(given)}: a chain is shared among several GPUs only with `gpus_per_job`")
        elsewhere = [f"`{name}`" for name in ("vlm_url", "vlm_device") if getattr(settings, name) is not None]
        if settings.captioners and elsewhere:
            raise UserError(f"{elsewhere[0]} and `captioners` each say where the VLM is; give one of them")
    elif settings.ckpt_dir is None and settings.comfy_dir is None:  # rows may say it
        raise UserError("`ckpt_dir` or `comfy_dir` is required: where the model's files are (see --help)")
    chain = command != "generate"
    if chain and settings.task not in (None, *V2V_TASKS):
        raise UserError(f"`task` must be one of {', '.join(V2V_TASKS)}; {settings.task!r} is not")
    if min(settings.takes, settings.best_of) > 1:
        raise UserError("`takes` chooses as `best_of` does; give one of them")
    # the seeds of all clips and of their candidates
    candidates = max(settings.takes, settings.best_of)
    last = settings.base_seed + (settings.num_videos or MOST_CLIPS) + candidates * CANDIDATE_STEP
    if chain and last > LARGEST_SEED:
        raise UserError(
            f"`base_seed` {settings.base_seed} is too large: the seeds of all clips and candidates must be below 2**63"
        )
    fewest = Frames().fewest_in_chain
    if chain and settings.frame_num is not None and settings.frame_num < fewest:
        raise UserError(f"`frame_num` {settings.frame_num}: a clip of a chain needs at least {fewest} frames")
    if settings.end_image is not None and settings.end_images is not None:
        raise UserError("`end_images` says how each clip ends, also the last; leave `end_image` out")
    if settings.until is not None and not (settings.end_image is None is settings.end_images):
        raise UserError("`until` says how the last clip ends; leave `end_image` and `end_images` out")
    if settings.vram is not None and settings.offload_model is False:
        raise UserError("`vram` needs `offload_model` True, with which only the model in use is on the GPU")
    if settings.cache is not None:
        StepCache.parse(settings.cache)
    if settings.prompt_for and settings.storyboard is not None:
        raise UserError("`prompt_for` is for a chain without `storyboard`; write the prompt there")
    if settings.num_videos or settings.end_images is None:  # else the folder says how many clips there are
        check_prompts_for(settings, settings.num_videos or usual_clips(settings))
    context = Context.choose(settings.continuation, settings.context_frames)
    if settings.anchor_image is not None and context.mode != "svi2pro":
        raise UserError("`anchor_image` goes with `continuation` svi2pro")
    if settings.keep_following and settings.redo is None:
        raise UserError("`keep_following` goes with `redo`, the clip to make again")


def check_video_settings(settings: Settings) -> None:
    """Raise UserError for a setting that means nothing where no video is continued."""
    for one in options_of("generate"):
        if one.continues and getattr(settings, one.name) != one.default:
            raise UserError(f"`{one.name}` goes with `video`, the clip to continue")


def spell_flag(name: str) -> str:
    """A setting as the command line spells it."""
    return OPTIONS[name].word if name in OPTIONS and OPTIONS[name].flag else name


def check_prompts_for(settings: Settings, clips: int) -> None:
    """Raise UserError for the prompt of a clip that is none of so many."""
    if beyond := next((number for number, _ in settings.prompt_for if number > clips), None):
        raise UserError(f"`prompt_for` {beyond} is beyond `num_videos` {clips}")


def reference() -> str:
    """The page of all flags, in Markdown."""
    lines = [
        "# Commands",
        "",
        "`generate.py` (installed as `wan-generate`) makes one clip, `generate_continuous.py` (`wan-continuous`) a",
        "chain. `wan-serve` and `generate_batch.py` (`wan-batch`) take the flags of a chain, but for those of one",
        "video. All print their flags with `--help`. This page is made from `wan/options.py` by `make reference`.",
        "",
        "A **key** is how a [storyboard](guide.md#a-storyboard) sets the option for one clip.",
    ]
    for group in GROUPS:
        lines += [
            "",
            f"## {group}",
            "",
            "| flag | meaning | default | key | command |",
            "| --- | --- | --- | --- | --- |",
        ]
        for one in OPTIONS.values():
            if one.group == group:
                cells = [
                    _flag_cell(one),
                    _in_page(one.help),
                    _in_page(_default_cell(one)),
                    f"`{one.scene}`" if one.scene else "",
                ]
                cells.append("both" if one.only == BOTH else f"`{PROGRAMS[one.only[0]]}`")
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _in_page(text: str) -> str:
    return spell(text, lambda name: f"`{spell_flag(name)}`")


def _flag_cell(one: Option) -> str:
    if not one.flag:
        return "in a storyboard only"
    if isinstance(one.kind, Choice):
        return f"`{one.word}` {', '.join(f'`{name}`' for name in one.kind.names)}"
    metavar = "LOW HIGH" if isinstance(one.kind, Interval) else one.kind.metavar
    return f"`{one.word} {metavar}`" if metavar else f"`{one.word}`"


def _default_cell(one: Option) -> str:
    if isinstance(one.kind, Switch) and one.default is False:
        return "off"
    default = one.unset or f"`{one.default}`"
    needed = {"continuous": "a chain", "batch": "a batch"}
    where = ", ".join(needed[command] for command in one.required)
    return "required" if one.only == one.required else f"{default}; required in {where}" if where else default


if __name__ == "__main__":
    print(reference(), end="")
