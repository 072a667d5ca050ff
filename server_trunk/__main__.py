"""``python -m server_trunk``: the same as ``splitfl serve``, for ``torchrun -m``; the word ``serve`` may come first."""

import sys

from splitfl.cli import main

words = sys.argv[1:]
sys.exit(main(["serve", *(words[1:] if words[:1] == ["serve"] else words)]))
