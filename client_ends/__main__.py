"""``python -m client_ends``: the same as ``splitfl train``."""

import sys

from splitfl.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
