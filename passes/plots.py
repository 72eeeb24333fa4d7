"""Pictures of what was measured. Needs matplotlib, which is imported when something is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fxprune.errors import InputError

#: Name of a group -> (units kept, error of the whole model), of its own pruning alone.
Curves = Mapping[str, Sequence[tuple[int, float]]]

#: Endings of files that can be written.
ENDINGS = (".pdf", ".png", ".svg")
#: Names are cut in the middle to so many letters.
_LETTERS = 34
#: Labels are so far apart, in parts of the axes' height.
_APART = 0.048
#: Errors smaller than the largest by more than this factor are out of sight on a logarithmic scale.
_DECADES = 1e5


def plot_sensitivity(
    curves: Curves,
    path: str | os.PathLike[str],
    *,
    labels: int = 10,
    title: str = "Each group pruned alone",
    what: str = "error of the model's output, relative to its variance",
) -> Path:
    """Draw the error of the model against the share of units that a group keeps, one line for each group.

    Lines are coloured by the place of their group in the model, from the first (dark) to the last (light). Those that
    matter most, by their mean error, are drawn bold and named. Where errors differ by much their scale is logarithmic.

    Args:
        curves: what `fxprune.sensitivity` returns; groups in the order of the model.
        path: ends in .png, .svg or .pdf.
        labels: so many groups are named.
        what: the heights are.

    Returns:
        The path.

    Raises:
        InputError: matplotlib is not installed, the ending is unknown, or there is nothing to draw.

    >>> plot_sensitivity({}, "curves.txt")
    Traceback (most recent call last):
        ...
    fxprune.errors.InputError: 'curves.txt' ends in '.txt'; known endings: .pdf, .png, .svg
    """
    target = Path(path)
    if target.suffix not in ENDINGS:
        raise InputError(f"'{target}' ends in '{target.suffix}'; known endings: {', '.join(ENDINGS)}")
    lines = {name: line for name, curve in curves.items() if len(line := _line(curve)) > 1}
    if not lines:
        raise InputError("there is no curve with two finite points to draw: give `sensitivity` more points")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"plots need matplotlib ({error}): pip install 'fxprune[plot]'") from None

    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "fxprune"}):
        figure = Figure(figsize=(9.0, 5.4), layout="constrained")
        _draw(figure, lines, labels, title, what)
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(target.suffix)
        figure.savefig(target, dpi=150, metadata=metadata)
    return target


def _line(curve: Sequence[tuple[int, float]]) -> np.ndarray[Any, Any]:
    """Rows of (share of units kept, error), from the whole group down; what is not finite is left out."""
    points = sorted(curve, reverse=True)
    return np.array([(count / points[0][0], error) for count, error in points if np.isfinite(error)])


def _draw(figure: Any, lines: Mapping[str, np.ndarray[Any, Any]], labels: int, title: str, what: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import PercentFormatter

    axes = figure.add_subplot()
    errors = np.concatenate([line[:, 1] for line in lines.values()])
    positive = errors[errors > 0]
    # Where most groups would lie on the bottom line, a logarithmic scale tells them apart; it has no place for 0.
    logarithmic = positive.size > 0 and positive.max() > 30 * np.median([line[-1, 1] for line in lines.values()])
    low, high = (
        (max(positive.min(), positive.max() / _DECADES) / 1.5, positive.max() * 1.5)
        if logarithmic
        else (0.0, max(errors.max() * 1.05, 1e-12))
    )
    colours = _colours()
    shade = [colours(i / max(len(lines) - 1, 1)) for i in range(len(lines))]
    named = set(sorted(lines, key=lambda n: -float(lines[n][:, 1].mean()))[: max(labels, 0)])
    ends: list[tuple[str, float, float, Any]] = []
    for (name, line), colour in zip(lines.items(), shade, strict=True):
        bold = name in named
        height = np.where(line[:, 1] > 0, line[:, 1], np.nan) if logarithmic else line[:, 1]
        axes.plot(
            line[:, 0],
            height,
            color=colour,
            linewidth=1.8 if bold else 0.8,
            alpha=1.0 if bold else 0.55,
            marker="o",
            markersize=3.0 if bold else 1.5,
            zorder=3 if bold else 2,
        )
        if bold:
            ends.append((name, line[-1, 0], max(float(line[-1, 1]), low), colour))
    if logarithmic:
        axes.set_yscale("log")
    least = min(float(line[-1, 0]) for line in lines.values())
    most = max(float(line[line[:, 1] > 0, 0].max(initial=0.0)) for line in lines.values()) if logarithmic else 1.0
    axes.set_xlim(min(most + 0.02, 1.0), max(least - 0.01, 0.0))
    axes.set_ylim(low, high)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("units kept of the group")
    axes.set_ylabel(what)
    axes.set_title(f"{title} ({len(lines)} groups)", loc="left")
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends)
    bar = figure.colorbar(
        ScalarMappable(Normalize(1, max(len(lines), 2)), colours),
        ax=axes,
        location="bottom",
        fraction=0.03,
        aspect=60,
        pad=0.02,
    )
    bar.set_ticks([1, max(len(lines), 2)], labels=["first group", "last group"])
    bar.outline.set_visible(False)


def _colours() -> Any:
    """The colour map: viridis without its lightest part, which cannot be read on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.82, 256)))


def _label(axes: Any, ends: Sequence[tuple[str, float, float, Any]]) -> None:
    """Names at the right, in the order of the lines' ends, apart from each other, each tied to its line."""
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = sorted(
        ((*to_axes.transform((x, y)), name, (x, y), colour) for name, x, y, colour in ends), key=lambda e: e[1]
    )
    heights = np.array([entry[1] for entry in wanted])
    heights = spread(heights, _APART)
    for (_, _, name, end, colour), height in zip(wanted, heights, strict=True):
        axes.annotate(
            short(name),
            xy=end,
            xytext=(1.03, float(height)),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "linestyle": ":",  # no part of the curve
                "color": colour,
                "linewidth": 0.8,
                "relpos": (0, 0.5),  # the line ends at the beginning of the name
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def spread(heights: np.ndarray[Any, Any], apart: float) -> np.ndarray[Any, Any]:
    """Return ascending heights that are at least `apart` from each other, near the given ascending ones, from 0 to 1.

    Runs of heights that are too close become blocks around their mean (pool adjacent violators).

    >>> spread(np.array([0.1, 0.1, 0.9]), 0.1).round(2).tolist()
    [0.05, 0.15, 0.9]
    >>> spread(np.array([1.0, 1.0]), 0.25).tolist()
    [0.75, 1.0]
    """
    apart = min(apart, 1 / max(len(heights) - 1, 1))
    blocks: list[list[float]] = []  # sum of heights less their offsets, count
    for i, height in enumerate(heights):
        blocks.append([float(height) - i * apart, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    bases = np.repeat([total / count for total, count in blocks], [int(count) for _, count in blocks])
    top = 1.0 - (len(heights) - 1) * apart
    result: np.ndarray[Any, Any] = np.clip(bases, 0.0, max(top, 0.0)) + np.arange(len(heights)) * apart
    return result


def short(name: str) -> str:
    """Return a name with its middle left out where it is long.

    >>> short("encoder.layers.11.attention.output.dense.weight.0")
    'encoder.layers.1…t.dense.weight.0'
    """
    if len(name) <= _LETTERS:
        return name
    half = (_LETTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
