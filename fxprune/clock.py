"""The stages of a compilation: how long each takes, and who wants to know which one runs."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping

#: Called with the name of each stage as it begins.
Progress = Callable[[str], None]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Graphs are many small objects, all alive to the end: looking for garbage among them costs a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Clock:
    """Seconds of each stage; tells the caller which one runs."""

    def __init__(self, progress: Progress | None = None, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._progress = progress

    def again(self) -> Clock:
        """Return a clock that goes on from here, for one of several things that share what was done so far."""
        return Clock(self._progress, self.seconds)

    def say(self, what: str) -> None:
        """Tell the caller what a stage is doing."""
        if self._progress:
            self._progress(what)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of a stage; that of several of one name is added up."""
        if self._progress:
            self._progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
