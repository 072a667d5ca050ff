"""Decoders under hostile bytes: one target a family of decoders, a committed corpus, a coverage-guided search for more.

`make test` replays the corpus through the targets. ``python -m tests.fuzz --inputs N`` searches on, with atheris (`pip install
'splitfl[fuzz]'`): a target that raises has found a bug, and its input goes into the corpus with the mend.
"""
