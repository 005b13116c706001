"""The queue: one row for each chain that was asked for, in SQLite, so that it outlives the server.

A row says what is asked for and how far it is. What is made lies in the run's folder, which alone says that a clip is
finished; a row that is behind after a crash is caught up from there.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DRAFT, QUEUED, MAKING, PAUSED, DONE, FAILED = STATES = (
    "draft",
    "queued",
    "in_progress",
    "paused",
    "completed",
    "failed",
)


@dataclass(frozen=True)
class Ticket:
    """One chain that was asked for.

    `settings` are those that differ from the server's, as JSON; `source` is the file in its folder that is continued,
    `still` whether that is no footage but what a first shot starts from. `count` clips are asked for, of which `done`
    are finished and the first `base` came with the chain that this one extends. `seconds` is the wanted length.
    `again`: it was changed while it was made, and waits again when that stops.
    """

    id: str
    state: str = QUEUED
    created_at: int = 0
    queued_at: float = 0.0
    completed_at: int | None = None
    model: str = ""
    prompt: str | None = None
    title: str = ""
    seconds: float = 0.0
    size: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    still: bool = False
    remixed_from: str | None = None
    extends: str | None = None
    count: int = 1
    done: int = 0
    base: int = 0
    again: bool = False
    attempts: int = 0
    error: Mapping[str, Any] | None = None


_COLUMNS = tuple(one.name for one in fields(Ticket))
_JSON = ("settings", "error")
_FLAGS = ("still", "again")


def new_id() -> str:
    """An id that nobody guesses."""
    return f"video_{secrets.token_hex(16)}"


class Queue:
    """The rows in a file. Used from one thread; each write is on the disk when it returns."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, value BLOB)")
        columns = ", ".join(name for name in _COLUMNS if name != "id")
        self._db.execute(f"CREATE TABLE IF NOT EXISTS tickets (id TEXT PRIMARY KEY, {columns})")

    def close(self) -> None:
        """Let the file go."""
        self._db.close()

    def secret(self) -> bytes:
        """What the server signs with; the same after a restart."""
        self._db.execute("INSERT OR IGNORE INTO secrets VALUES ('signing', ?)", (secrets.token_bytes(32),))
        secret: bytes = self._db.execute("SELECT value FROM secrets WHERE name = 'signing'").fetchone()[0]
        return secret

    def add(self, ticket: Ticket) -> Ticket:
        """Put a new row in; returns it with its times."""
        now = time.time()
        values = _values(
            {name: getattr(ticket, name) for name in _COLUMNS} | {"created_at": int(now), "queued_at": now}
        )
        marks = ", ".join("?" for _ in _COLUMNS)
        self._db.execute(f"INSERT INTO tickets ({', '.join(_COLUMNS)}) VALUES ({marks})", list(values.values()))
        return self[ticket.id]

    def __getitem__(self, name: str) -> Ticket:
        row = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM tickets WHERE id = ?", (name,)).fetchone()
        if row is None:
            raise KeyError(name)
        return _ticket(row)

    def change(self, name: str, **values: Any) -> Ticket:
        """Write some values of a row. Raises KeyError for one that is gone."""
        columns = _values(values)
        self._db.execute(
            f"UPDATE tickets SET {', '.join(f'{column} = ?' for column in columns)} WHERE id = ?",
            [*columns.values(), name],
        )
        return self[name]

    def wait_again(self, name: str) -> Ticket:
        """Put a row at the end of those that wait."""
        return self.change(
            name, state=QUEUED, queued_at=time.time(), completed_at=None, error=None, attempts=0, again=False
        )

    def remove(self, name: str) -> None:
        """Take a row out."""
        self._db.execute("DELETE FROM tickets WHERE id = ?", (name,))

    def all(
        self, *, after: str | None = None, limit: int | None = None, newest_first: bool = True, drafts: bool = False
    ) -> list[Ticket]:
        """Rows by the time when they were made. Raises KeyError where `after` is none."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        wheres, values = ([] if drafts else ["state != 'draft'"]), list[Any]()
        if after is not None:
            start = self._db.execute("SELECT rowid FROM tickets WHERE id = ?", (after,)).fetchone()
            if start is None:
                raise KeyError(after)
            wheres, values = [*wheres, f"rowid {sign} ?"], [start[0]]
        where = f"WHERE {' AND '.join(wheres)}" if wheres else ""
        rows = self._db.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM tickets {where} ORDER BY rowid {order} LIMIT ?",
            [*values, -1 if limit is None else limit],
        )
        return [_ticket(row) for row in rows]

    def next(self) -> Ticket | None:
        """The row that has waited longest."""
        row = self._db.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM tickets WHERE state = 'queued' ORDER BY queued_at, rowid LIMIT 1"
        ).fetchone()
        return None if row is None else _ticket(row)

    def counts(self) -> dict[str, int]:
        """How many rows there are in each state."""
        counted = dict(self._db.execute("SELECT state, count(*) FROM tickets GROUP BY state").fetchall())
        return {state: int(counted.get(state, 0)) for state in STATES}

    def recover(self) -> None:
        """After a crash: what was being made waits again, before all others."""
        self._db.execute("UPDATE tickets SET state = 'queued', queued_at = 0 WHERE state = 'in_progress'")


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value) if name in _JSON else int(value) if name in _FLAGS else value
        for name, value in values.items()
    }


def _ticket(row: tuple[Any, ...]) -> Ticket:
    values = dict(zip(_COLUMNS, row, strict=True))
    for name in _JSON:
        values[name] = json.loads(values[name])
    for name in _FLAGS:
        values[name] = bool(values[name])
    return Ticket(**values)
