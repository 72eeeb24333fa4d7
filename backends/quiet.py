"""Libraries that talk while they work, kept off the screen."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    r"""Keep prints, warnings and log lines off the screen; yields a function that returns them as one text.

    >>> with quiet() as said:
    ...     print("some advice")
    >>> said()
    'some advice\n'
    """
    text = io.StringIO()
    loggers = [logging.getLogger(name) for name in [None, *logging.root.manager.loggerDict]]
    streams = (sys.stdout, sys.stderr)
    # Log handlers hold on to the stream that they were made with, so that redirecting alone does not reach them.
    moved = [
        (handler, handler.stream)
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams
    ]
    with (
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for handler, _ in moved:
            handler.setStream(text)
        try:
            yield lambda: text.getvalue() + "".join(f"{entry.category.__name__}: {entry.message}\n" for entry in caught)
        finally:
            for handler, stream in moved:
                handler.setStream(stream)
