#!/usr/bin/env python3
"""One clip: flags -> mp4 + json. `python generate.py --help`."""

from wan.cli import generate_main, generate_program
from wan.commands.examples import EXAMPLE_PROMPT

__all__ = ["EXAMPLE_PROMPT", "generate_main"]

if __name__ == "__main__":
    generate_program()
