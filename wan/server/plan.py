"""What a chain would be, in a process of its own: `dry_run` for settings that come as JSON on stdin."""

from __future__ import annotations

import json
import sys

from wan.commands.continuous import Chain
from wan.errors import UserError
from wan.server.wire import owner_settings, settings_of_chain


def main() -> int:
    """Print the lines of the plan, or what is wrong."""
    order = json.loads(sys.stdin.read())
    settings = settings_of_chain(owner_settings(order["owner"]), {**order["settings"], "dry_run": True})
    try:
        for line in Chain(settings).outline():
            print(line)
    except UserError as error:
        print(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
