#!/usr/bin/env python3
"""A chain of clips: flags -> clips, joined video, log. `python generate_continuous.py --help`."""

from wan.cli import continuous_program

if __name__ == "__main__":
    continuous_program()
