"""What a run's own JSON files must hold for a later run, and the report, to go on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from wan.errors import UserError
from wan.foreign import fit, read_json
from wan.kinds import LARGEST_SEED, MOST_CLIPS
from wan.options import DISCARDS, LONGEST_CONTEXT

_MOST_BYTES = 256 << 20  # of run.json, which holds the record of up to 10000 clips

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Number = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}$")]
Figure = float | None  # nan and inf too


class _Partly(BaseModel):
    """Some of an object's keys; others may be anything."""

    model_config = ConfigDict(extra="allow")


class _Seam(_Partly):
    score: Figure = None
    warnings: list[str] | None = None
    colour_shift: list[Figure] | None = None
    terms: dict[str, Figure] | None = None


class _Candidate(_Partly):
    seed: Seed
    score: Figure = None


class _Record(_Partly):
    """A clip's record, with today's keys."""

    fingerprint: str
    seed: Seed
    prompt: str
    fps: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}(/[1-9][0-9]{0,8})?$")]
    frame_num: Annotated[int, Field(ge=1, le=100_000)]
    dropped: Annotated[int, Field(ge=0, le=LONGEST_CONTEXT)] = 1
    discard: Annotated[int, Field(ge=0, le=DISCARDS[-1])] = 0
    identity: Figure = None
    seam: _Seam | None = None
    look: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    answers: list[str] | None = None
    candidates: list[_Candidate] | None = None
    seconds: dict[str, Figure] | None = None
    versions: dict[str, str] | None = None
    digests: dict[str, str] | None = None
    loras: dict[str, Any] | None = None


class _Edited(_Partly):
    prompt: str
    over: str | None


class _Run(_Partly):
    """run.json."""

    status: str | None = None
    seconds: Figure = None
    clips_finished: int | None = None
    clips_asked: int | None = None
    base_seed: Annotated[int, Field(ge=0, le=LARGEST_SEED - MOST_CLIPS)] | None = None
    seeds: dict[Number, Seed] = {}
    redone_over: dict[Number, Seed | None] = {}
    accepted: dict[str, str] | None = None
    named: dict[str, Seed] | None = None
    edited: dict[str, _Edited] | None = None
    takes: dict[str, Annotated[list[int | str], Field(min_length=2, max_length=2)]] | None = None
    given_up: list[str] | None = None
    joined: str | None = None
    joined_of: list[str] = []
    written: dict[str, list[str]] = {}
    arguments: dict[str, Any] | None = None
    clips: list[dict[str, Any]] = []


def check_record(path: Path, record: dict[str, Any]) -> None:
    """Raise UserError for the record of a finished clip, with today's keys, that no run wrote like that."""
    try:
        fit(_Record, record, str(path))
    except UserError as error:
        raise UserError(f"{error.marked}; put that right, or remove the file to make the clip again") from error


def read_run(path: Path) -> dict[str, Any]:
    """The record of a run. Raises UserError for one that no run wrote like that."""
    try:
        run = read_json(path, _MOST_BYTES)
        fit(_Run, run, str(path))
    except UserError as error:
        raise UserError(f"{error.marked}; restore or remove it, or give another folder") from error
    return run
