"""One registry class for everything that can be added by name: criteria, allocators, backends."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from fxprune.errors import FxpruneError, RecipeError

T = TypeVar("T")


def nearest(word: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known word, or an empty string.

    >>> nearest("magnitud", ["magnitude", "random"])
    "; did you mean 'magnitude'?"
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


class Registry(Generic[T]):
    """Names to things of one kind. Rejects duplicates; an unknown name is answered with the known ones.

    >>> colours: Registry[int] = Registry("colour")
    >>> colours.add("red", 1)
    >>> colours["rde"]
    Traceback (most recent call last):
        ...
    fxprune.errors.RecipeError: no colour is called 'rde'; did you mean 'red'? Known: red
    """

    def __init__(self, kind: str, error: type[FxpruneError] = RecipeError) -> None:
        self.kind = kind
        self._error = error
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Register `item`; raises ValueError where the name is taken."""
        if name in self._items:
            raise ValueError(f"{self.kind} '{name}' is registered twice: by {self._items[name]!r} and {item!r}")
        self._items[name] = item

    def remove(self, name: str) -> None:
        """Forget a name, so that it can be registered anew."""
        self[name]
        del self._items[name]

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under `name`."""

        def decorate(item: T) -> T:
            self.add(name, item)
            return item

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            known = self.names()
            raise self._error(
                f"no {self.kind} is called '{name}'{nearest(name, known) or '.'} Known: {', '.join(known)}"
            )
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._items)
