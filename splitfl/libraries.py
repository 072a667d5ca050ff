"""The library versions that decide whether two sides compute the same; said in the hello, compared with a warning."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

__all__ = ["differences", "library_versions", "quiet_libraries"]

#: Only what can change a number or a byte on the wire.
_LIBRARIES = ("splitfl", "torch", "transformers", "peft", "pyzmq", "cryptography")


def library_versions() -> dict[str, str]:
    """Installed versions by distribution name; a library that is not installed is left out."""
    versions: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Libraries both sides have, in versions whose first two numbers differ: ``{name: (first's, second's)}``."""
    found = {}
    for name in _LIBRARIES:
        one, two = first.get(name), second.get(name)
        if one and two and _minor(one) != _minor(two):
            found[name] = (one, two)
    return found


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and deprecation notices off a command's screen; errors and real warnings stay."""
    import os
    import warnings

    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    # A notice of transformers to its callers, here PEFT.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")
    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    if not os.isatty(2):
        disable_progress_bars()
