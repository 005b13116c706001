"""The folders of a server's chains, and the files of clients in them."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wan.files import link_or_copy
from wan.server.decode import decode
from wan.server.errors import ApiError
from wan.server.folders import ChainFolder
from wan.server.tickets import new_id

MOST_PICTURES = 50
_NEW, _GONE = ".new-", ".gone-"


@dataclass(frozen=True)
class Upload:
    """A file that a client sent: its name there, and what is in it."""

    name: str
    data: BinaryIO

    @property
    def title(self) -> str:
        """The name without its folders, as far as it can be shown."""
        name = Path(self.name.replace("\\", "/")).name
        return "".join(char for char in name if char.isprintable())[:100]

    def store(self, path: Path) -> None:
        """Write it to a new file."""
        with path.open("xb") as file:
            shutil.copyfileobj(self.data, file, 1 << 20)


class Jobs:
    """The folder of each chain, below one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folders: dict[str, ChainFolder] = {}

    def __getitem__(self, name: str) -> ChainFolder:
        if name not in self._folders:
            self._folders[name] = ChainFolder(self.path / name)
        return self._folders[name]

    def __contains__(self, name: str) -> bool:
        return (self.path / name).is_dir()

    @asynccontextmanager
    async def new(self) -> AsyncIterator[ChainFolder]:
        """A folder that is filled in the block; it goes if that fails, as when the client has gone."""
        path = self.path / f"{_NEW}{new_id()}"
        path.mkdir(parents=True, mode=0o700)
        try:
            yield ChainFolder(path)
        finally:
            if path.exists():
                shutil.rmtree(path, ignore_errors=True)

    def keep(self, folder: ChainFolder, name: str) -> None:
        """Give a new folder to a chain."""
        folder.path.rename(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a chain's folder: at once in name, then its files."""
        self._folders.pop(name, None)
        gone = self.path / f"{_GONE}{name}"
        (self.path / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def remove_all_but(self, known: Collection[str]) -> None:
        """Remove the folders of other chains, and what is half made or half removed."""
        for path in self.path.iterdir() if self.path.exists() else ():
            if path.name not in known and re.fullmatch(r"(\.new-|\.gone-)?video_[0-9a-f]{32}", path.name):
                shutil.rmtree(path, ignore_errors=True)


async def take_pictures(folder: ChainFolder, pictures: Sequence[Upload]) -> dict[str, str]:
    """The files that clips may name, by the names that the client gave them. Raises ApiError."""
    names = {path.name: path.name for path in folder.path.glob("picture_*.png")}
    if len(names) + len(pictures) > MOST_PICTURES:
        raise ApiError(f"a chain takes {MOST_PICTURES} pictures", param="pictures")
    for picture in pictures:
        raw, name = folder.path / ".picture", f"picture_{secrets.token_hex(4)}.png"
        try:
            await asyncio.to_thread(picture.store, raw)
            kind = (await decode("inspect", raw, folder.path / name))["kind"]
        finally:
            raw.unlink(missing_ok=True)
        if kind != "picture":
            (folder.path / name).unlink()
            raise ApiError(f"{picture.name[:80]!r} is no picture", param="pictures")
        names[picture.name] = name
    return names


def link_inputs(old: ChainFolder, new: ChainFolder) -> None:
    """Give a new chain what another began with."""
    for file in [*old.path.glob("source.*"), *old.path.glob("picture_*.png")]:
        link_or_copy(file, new.path / file.name)
