"""`python -m wan.server`, which is `wan-serve`."""

import sys

from wan.cli import serve_main

if __name__ == "__main__":
    sys.exit(serve_main())
