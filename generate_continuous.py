#!/usr/bin/env python3
"""A chain of clips: flags -> clips, joined video, log. `python generate_continuous.py --help`."""

import sys

from wan.cli import continuous_main

if __name__ == "__main__":
    sys.exit(continuous_main())
