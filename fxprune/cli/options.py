"""Arguments and options that several commands take, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args

import typer
import yaml

from fxprune.errors import BackendError, RecipeError
from fxprune.recipe import Kind, Target
from fxprune.sources import FORMS

MODEL_HELP = f"{', '.join(FORMS)}."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SPEC",
        help="Example input, [NAME=]SHAPE[:DTYPE[:LOW-HIGH]]: 1x3x224x224, or input_ids=2x16:int64:0-30000 "
        "(LOW <= value < HIGH). Repeat for several; they replace those that MODEL comes with.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="CPU threads for timing; by default what torch uses.")
]
Batch = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Batch size for timing; by default that of the example inputs.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="What stays whole: head, 'layer1.*', type:LayerNorm, kind:residual, fc.weight.0, or a group's name.",
    ),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND", help=f"Cut only this kind: {', '.join(get_args(Kind))}; 'not KIND' excludes."),
]
Ratios = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=SHARE", help="Share of its units that a group keeps: fc1=0.5, or kind:ffn=0.3-0.8."),
]
_SHARES = ("macs", "params", "memory")
TARGETS = [
    name if f.annotation is bool else f"{name}={'SHARE' if name in _SHARES else 'NUMBER'}"
    for name, f in Target.model_fields.items()
]


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read `--option`: KEY=VALUE, values as in a recipe.

    Raises:
        BackendError: one has another form.

    >>> parse_options(["dtype=float16", "keep_optimized=true"])
    {'dtype': 'float16', 'keep_optimized': True}
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise BackendError(f"--option {text}: write KEY=VALUE, dtype=float16")
        found[key] = yaml.safe_load(value)
    return found


def parse_target(text: str) -> dict[str, Any]:
    """Read `--target`: KEY=VALUE, or KEY alone where it is a switch.

    >>> parse_target("macs=0.5"), parse_target("dead")
    ({'macs': 0.5}, {'dead': True})
    """
    key, given, value = text.partition("=")
    try:
        return {key: yaml.safe_load(value) if given else True}
    except yaml.YAMLError:
        raise RecipeError(f"--target {text}: this is none of {', '.join(TARGETS)}") from None


def parse_targets(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Read several `--target`: KEY=VALUE or KEY=VALUE,VALUE.

    >>> parse_targets(["speedup=1.5,2", "macs=0.5"])
    [{'speedup': 1.5}, {'speedup': 2}, {'macs': 0.5}]
    """
    found = []
    for text in texts:
        key, _, values = text.partition("=")
        found += [parse_target(f"{key}={value}") for value in values.split(",")]
    return found


def parse_blocks(text: str) -> str | dict[str, Any]:
    """Read `--blocks`: NAME or NAME=COUNT.

    >>> parse_blocks("greedy"), parse_blocks("influence=2")
    ('greedy', {'name': 'influence', 'remove': 2})
    """
    name, sign, count = text.partition("=")
    if sign and not count.isdecimal():
        raise RecipeError(f"--blocks {text}: write NAME, greedy, or NAME=COUNT, greedy=2")
    return {"name": name, "remove": int(count)} if sign else name


def parse_ratios(texts: Sequence[str]) -> dict[str, Any]:
    """Read `--ratios`: PATTERN=SHARE or PATTERN=LEAST-MOST.

    >>> parse_ratios(["layer1=0.5", "kind:ffn=0.3-0.8"])
    {'layer1': 0.5, 'kind:ffn': {'min': 0.3, 'max': 0.8}}
    """
    found: dict[str, Any] = {}
    for text in texts:
        pattern, _, share = text.rpartition("=")
        try:
            numbers = [float(n) for n in share.split("-")]
        except ValueError:
            numbers = []
        if not pattern or not 1 <= len(numbers) <= 2:
            raise RecipeError(
                f"--ratios {text}: write PATTERN=SHARE, layer1=0.5, or PATTERN=LEAST-MOST, layer1=0.3-0.8"
            )
        found[pattern] = numbers[0] if len(numbers) == 1 else {"min": numbers[0], "max": numbers[1]}
    return found
