"""A value in a JSON file that knows where it stands, so that every complaint names the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

from nrc.scene import SceneError

SINGLE = 3.4028234e38  # largest finite number in single precision, which every number ends up in


class Field:
    """A JSON value with file name and path (`materials[2].name`); each accessor checks a type or raises SceneError."""

    __slots__ = ("file", "path", "value")

    def __init__(self, value: Any, file: str, path: str = "") -> None:
        self.value, self.file, self.path = value, file, path

    @staticmethod
    def parse(text: str | bytes, file: str) -> Field:
        """Top-level object of a JSON text; NaN, Infinity and repeated keys are errors."""

        def constant(token: str) -> float:
            raise ValueError(f"{token} is not a JSON number")

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            keys = [key for key, _ in pairs]
            if len(set(keys)) < len(keys):
                raise ValueError(f"repeated key {next(key for key in keys if keys.count(key) > 1)!r}")
            return dict(pairs)

        try:
            value = json.loads(text, parse_constant=constant, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise SceneError(f"{file}: not valid JSON: {error}") from None
        root = Field(value, file)
        root.check_object()
        return root

    def error(self, message: str) -> SceneError:
        """The exception to raise for a fault in this field."""
        return SceneError(f"{self.file}: {self.path}: {message}" if self.path else f"{self.file}: {message}")

    def wrong(self, expected: str) -> SceneError:
        if isinstance(self.value, dict) and "keyframes" in self.value:
            return self.error(f"cannot change over time: expected {expected}, got keyframes")
        text = json.dumps(self.value)
        return self.error(f"expected {expected}, got {text if len(text) <= 60 else text[:57] + '...'}")

    def check_object(self, allowed: Collection[str] | None = None) -> None:
        """Raise unless this is an object, with keys only from `allowed` if given."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        for key in self.value:
            if allowed is not None and key not in allowed:
                raise self.child(key).error(f"unknown key; allowed here: {', '.join(allowed)}")

    def child(self, key: str) -> Field:
        return Field(self.value[key], self.file, f"{self.path}.{key}" if self.path else key)

    def get(self, key: str) -> Field | None:
        """The member `key`, or None if this object lacks it."""
        self.check_object()
        return self.child(key) if key in self.value else None

    def need(self, key: str) -> Field:
        """The member `key`, which must exist."""
        member = self.get(key)
        if member is None:
            raise self.error(f"{key} is missing")
        return member

    def members(self) -> dict[str, Field]:
        """Members of this object, in file order."""
        self.check_object()
        return {key: self.child(key) for key in self.value}

    def list(self, key: str | None = None) -> list[Field]:
        """Elements of this array, or of the member `key`, where a missing member is an empty array."""
        if key is not None:
            member = self.get(key)
            return member.list() if member is not None else []
        if not isinstance(self.value, list):
            raise self.wrong("an array")
        return [Field(value, self.file, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong("a number")
        if not abs(value) <= SINGLE:
            raise self.wrong("a number within the range of single precision")
        if not low <= value <= high:
            raise self.wrong(f"a number between {low:g} and {high:g}" if high < math.inf else f"a number >= {low:g}")
        return float(value)

    def integer(self, low: int = 0, high: int = 2**63 - 1) -> int:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong("an integer")
        if not low <= value <= high:
            raise self.wrong(f"an integer from {low} to {high}")
        return value

    def index(self, count: int, of: str) -> int:
        """An index into the array `of`, which has `count` elements."""
        value = self.integer()
        if value >= count:
            raise self.error(f"{of}[{value}] does not exist (there are {count})")
        return value

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def string(self, choices: Collection[str] | None = None) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("a string")
        if choices is not None and self.value not in choices:
            raise self.wrong(f"one of {', '.join(choices)}")
        return self.value

    def vector(self, size: int, low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
        """`size` numbers."""
        elements = self.list()
        if len(elements) != size:
            raise self.wrong(f"{size} numbers")
        return tuple(element.number(low, high) for element in elements)

    def vec3(self, low: float = -math.inf, high: float = math.inf) -> tuple[float, float, float]:
        x, y, z = self.vector(3, low, high)
        return x, y, z
