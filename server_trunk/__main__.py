"""``python -m server_trunk``: the same as ``splitfl serve``."""

import sys

from splitfl.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
