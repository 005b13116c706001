#!/usr/bin/env python3
"""Many videos, each continued by a chain: a list -> folders of clips, by many workers."""

from wan.cli import batch_program

if __name__ == "__main__":
    batch_program()
