"""Reading JSON objects strictly: a key is taken with its kind or declared without effect; what is left is an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import ConfigError

REQUIRED = object()
# no model has a size near this; it keeps a hostile config from asking for one
_LARGEST = 2**24
_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string", dict: "an object"}


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ConfigError for a file that is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing."""
    matches = get_close_matches(word, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def is_kind(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind; a bool is no number, a whole number is a float too, NaN is none."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 3e38
    return isinstance(value, kind)


class Section:
    """An object of a config. `where` names it in errors; every problem is a ConfigError."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must be an object, found {values!r:.60}")
        self._values = dict(values)
        self._known: list[str] = []
        self.where = where

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `key`, of type `kind`; `default` where it is absent (or null, if the default is None)."""
        value = self._pop(key, default)
        if value is default:
            return value
        if not is_kind(value, kind):
            raise ConfigError(f"{self.where}.{key} must be {_KINDS[kind]}, found {value!r:.60}")
        return float(value) if kind is float else value

    def size(self, key: str, default: Any = REQUIRED, most: int = _LARGEST, least: int = 1) -> int:
        """A whole number from `least` to `most`."""
        value = self.take(key, int, default)
        if not least <= value <= most:
            raise ConfigError(f"{self.where}.{key} must be from {least} to {most}, found {value}")
        return value

    def many(self, key: str, kind: type, default: Any = REQUIRED) -> tuple[Any, ...]:
        """A list of values of one kind, as a tuple."""
        values = self._pop(key, default)
        if not isinstance(values, list | tuple) or not all(is_kind(value, kind) for value in values):
            raise ConfigError(f"{self.where}.{key} must be a list, each {_KINDS[kind]}, found {values!r:.60}")
        return tuple(values)

    def section(self, key: str, default: Any = REQUIRED) -> Section:
        return Section(self.take(key, dict, default), f"{self.where}.{key}")

    def one_of(self, key: str, choices: Sequence[Any], default: Any = REQUIRED) -> Any:
        """A value that the runtime can honour; the reference may know others."""
        value = self._pop(key, default)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            known = " or ".join(json.dumps(choice) for choice in choices)
            near = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
            raise ConfigError(f"{self.where}.{key} {value!r:.60} cannot be honoured, only {known}{near}")
        return value

    def without_effect(self, *keys: str) -> None:
        """Keys that the reference knows and whose values change nothing here."""
        self._known.extend(keys)
        for key in keys:
            self._values.pop(key, None)

    def done(self) -> None:
        """Refuse what nobody took."""
        for key in self._values:
            raise ConfigError(f"unknown key {key!r} in {self.where}{nearest(key, self._known)}")

    def _pop(self, key: str, default: Any) -> Any:
        self._known.append(key)
        if key not in self._values and default is REQUIRED:
            near = nearest(key, [k for k in self._values if k not in self._known])
            raise ConfigError(f"{self.where} lacks {key!r}{near}")
        return self._values.pop(key, default)


def check(fits: bool, problem: str) -> None:
    """Raise ConfigError with `problem` unless it fits."""
    if not fits:
        raise ConfigError(problem)
