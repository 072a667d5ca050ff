"""The run config: the operator's word on everything that concerns the trunk, from a TOML file, from flags, or both.

:mod:`splitfl.settings` names every setting once; :mod:`splitfl.run_config` has their defaults, :mod:`splitfl.contradictions` what
they may not be together. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from splitfl.contradictions import check_together
from splitfl.errors import ConfigError
from splitfl.run_config import LimitSettings, LoraSettings, OptimizerSettings, RunConfig
from splitfl.settings import MOST_INTEGER, SETTINGS_BY_KEY, Setting

__all__ = [
    "LimitSettings",
    "LoraSettings",
    "OptimizerSettings",
    "RunConfig",
    "build_config",
    "read_toml",
    "to_toml",
]

_SECTIONS: dict[str, Any] = {"lora": LoraSettings, "limits": LimitSettings, "optimizer": OptimizerSettings}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings of a TOML file, flat: ``{"optimizer.learning_rate": 1e-4, ...}``.

    Raises:
        ConfigError: the file is missing, is not TOML, or names a setting that does not exist.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; give an existing TOML file") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is one, too
        raise ConfigError(f"{path} is not TOML: {error}") from None
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in value.items()}
        else:
            flat[key] = value
    return flat


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Check ``values`` (dotted keys, later sources already laid over earlier ones) and make the config of them.

    Raises:
        ConfigError: an unknown setting, a wrong type, a value out of range, or two settings that contradict each other.
    """
    if not values.get("model"):
        raise ConfigError("no model: name a directory or a hub id, as in `splitfl serve MODEL`")
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for key, value in values.items():
        setting = SETTINGS_BY_KEY.get(key)
        if setting is None:
            raise ConfigError(f"unknown setting {key!r}{_nearest(key, SETTINGS_BY_KEY)}")
        if value is None:
            continue
        section, _, leaf = key.rpartition(".")
        (sections[section] if section else top)[leaf] = _typed(setting, value)
    config = RunConfig(**top, **{name: kind(**sections[name]) for name, kind in _SECTIONS.items()})
    check_together(config)
    return config


def _typed(setting: Setting, value: Any) -> Any:
    if setting.key == "lora.targets":
        if not isinstance(value, str | list | tuple):
            raise ConfigError(f"lora.targets must be names joined by commas, or a list of them, not {value!r}")
        names = value.split(",") if isinstance(value, str) else list(value)
        names = [str(name).strip() for name in names if str(name).strip()]
        return "all-linear" if names in ([], ["all-linear"]) else tuple(names)
    fits = isinstance(value, setting.kind) and (setting.kind is bool or not isinstance(value, bool))
    if isinstance(value, int) and abs(value) > MOST_INTEGER:
        raise ConfigError(f"{setting.key} is too large: the largest number is {MOST_INTEGER}")
    if setting.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value, fits = float(value), True
    if not fits:
        raise ConfigError(f"{setting.key} must be a {setting.kind.__name__}, not {value!r}")
    if setting.kind is float and not math.isfinite(value):
        raise ConfigError(f"{setting.key} = {value!r}: it must be a finite number")
    complaint = setting.check(value)
    if complaint:
        raise ConfigError(f"{setting.key} = {value!r}: it {complaint}")
    return value


def _nearest(key: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; see `splitfl serve --help` for the settings"


def to_toml(config: RunConfig) -> str:
    """The resolved config as a TOML text that :func:`read_toml` reads back to the same config."""
    lines, sections = [], []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in _SECTIONS:
            sections += ["", f"[{item.name}]"]
            sections += [f"{leaf} = {_toml_value(inner)}" for leaf, inner in dataclasses.asdict(value).items()]
        elif value is not None:
            lines.append(f"{item.name} = {_toml_value(value)}")
    return "\n".join(lines + sections) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # JSON's escapes are TOML's too; it leaves alone the one control character that TOML does not.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
