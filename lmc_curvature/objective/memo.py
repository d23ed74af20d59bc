"""Values that are made once."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Value = TypeVar("Value")


class Memo:
    """Values by key, each made the first time it is asked for.

    What is kept is not looked at. Where there is no room for another value, the one that was asked for least recently
    goes.

    Args:
        most: Values to keep.
    """

    def __init__(self, most: int = 512):
        self._most = most
        self._values: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made by `make` unless it is there; what `make` raises is raised, and nothing is kept."""
        return self.replace(key, self._values[key] if key in self._values else make())

    def get(self, key: Hashable, default: Any) -> Any:
        """The value of a key if it is there, or else a default."""
        return self._values.get(key, default)

    def replace(self, key: Hashable, value: Value) -> Value:
        """Keep a value in place of the one that the key may have, and return it."""
        self._values.pop(key, None)
        self._values[key] = value
        while len(self._values) > self._most:
            del self._values[next(iter(self._values))]
        return value
