"""Drawings as SVG text; matplotlib draws them, where it is installed."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxprune.errors import InputError
from fxprune.passes.plots import Curves, plot_sensitivity


def curves(lines: Curves, title: str, what: str) -> str:
    """Return sensitivity curves, or "" where there is nothing to draw, or nothing to draw with."""
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        try:
            return _inline(plot_sensitivity(lines, Path(folder) / "curves.svg", title=title, what=what).read_text())
        except InputError:
            return ""


def front(points: Sequence[tuple[str, float, float]], dense: float, what: str) -> str:
    """Return the accuracy over the speed-up.

    Args:
        points: (name, speed-up, accuracy).
        dense: the dense model's accuracy.
        what: the accuracy is.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "fxprune"}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes: Any = figure.add_subplot()
        every = sorted([("dense", 1.0, dense), *points], key=lambda point: point[1])
        axes.plot([x for _, x, _ in every], [y for _, _, y in every], color="0.2", marker="o", linewidth=1.4)
        for name, x, y in every:
            axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points")
        axes.set_xlabel("times as fast as the dense model, measured")
        axes.set_ylabel(what)
        axes.margins(x=0.12, y=0.15)
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _inline(text.getvalue())


def _inline(text: str) -> str:
    """The drawing without what stands before it in a file of its own."""
    return text[text.index("<svg") :]
