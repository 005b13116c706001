"""The error of everything that the user can put right."""

from __future__ import annotations

import re
from collections.abc import Callable

_SETTING = re.compile(r"`([a-z][a-z0-9_]*)`")


class UserError(Exception):
    """One line that says what is wrong and what to do: the commands print it and exit with 2.

    A setting stands in backquotes under its name in Python. `str()` leaves the quotes out ("vram: …"), and the command
    line writes the flag instead ("--vram: …"), so that the library knows no flags.
    """

    @property
    def marked(self) -> str:
        """The message with its settings in backquotes; what another error quotes."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return spell(self.marked, str)


class InUse(UserError):
    """Somebody else is at work there, and later may not be."""


def spell(message: str, spelling: Callable[[str], str]) -> str:
    """The message with each setting in backquotes as `spelling` writes its name."""
    return _SETTING.sub(lambda match: spelling(match[1]), message)
