#!/usr/bin/env python3
"""Many videos, each continued by a chain: a list -> folders of clips, by many workers."""

import sys

from wan.cli import batch_main

if __name__ == "__main__":
    sys.exit(batch_main())
