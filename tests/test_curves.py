"""Sensitivity curves of single groups, and the pictures of them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import FxpruneError, InputError, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
DATA = [torch.randn(64, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]


def net() -> nn.Module:
    """The second layer has 16 units of which the next reads four."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[4].weight[:, 4:] = 0
    return model


def test_curves_say_what_single_groups_lose() -> None:
    """They begin with nothing lost, never fall, and are zero for units that nobody reads."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    curves = fxprune.sensitivity(model, X, calibration=DATA, points=4, round_to=4)
    assert list(curves) == ["0.weight.0", "2.weight.0"]
    assert [units for units, _ in curves["2.weight.0"]] == [16, 12, 8, 4]
    for (size, nothing), *rest in curves.values():
        assert size in (16, 32) and nothing == 0
        errors = [e for _, e in rest]
        assert errors == sorted(errors) and errors[0] >= 0
    assert max(e for _, e in curves["2.weight.0"]) < 1e-9
    assert curves["0.weight.0"][-1][1] > 0.01
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert curves == fxprune.sensitivity(model, X, calibration=DATA, points=4, round_to=4)


def test_only_the_groups_of_the_recipe_are_looked_at() -> None:
    """A layer that is kept keeps what it reads."""
    assert fxprune.sensitivity(net(), X, calibration=DATA, keep=["2"]) == {}
    curves = fxprune.sensitivity(net(), X, calibration=DATA, points=1, keep=["4"], criterion="magnitude", floor=0.5)
    assert {name: [n for n, _ in curve] for name, curve in curves.items()} == {"0.weight.0": [32, 16]}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": {"macs": 0.5}, "proof": "full"}, RecipeError, "has no use for proof, target"),
        ({"points": 0}, InputError, "points is 0; a curve needs one"),
        ({"criterium": "obs"}, RecipeError, "criterium"),
    ],
)
def test_what_it_does_not_do_is_refused(options: dict[str, Any], error: type[FxpruneError], message: str) -> None:
    with pytest.raises(error, match=message):
        fxprune.sensitivity(net(), X, calibration=DATA, **options)


# ---------------------------------------------------------------------- pictures
MANY = {
    f"layer{i}.weight.0": [(64, 0.0), (32, 10.0 ** (-i / 8)), (4, 3 * 10.0 ** (-i / 8) if i else float("inf"))]
    for i in range(50)
}
FEW = {"a.weight.0": [(8, 0.0), (4, 0.5), (2, 0.9)], "b.weight.0": [(6, 0.0), (3, 0.4)]}


@pytest.mark.parametrize("curves", [MANY, FEW, {"zero": [(4, 0.0), (2, 0.0)]}])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_are_drawn(curves: Any, ending: str, tmp_path: Path) -> None:
    """The same file each time; a vector picture holds the names as text, of many groups those of the worst."""
    first, second = (fxprune.plot_sensitivity(curves, tmp_path / f"{i}.{ending}") for i in range(2))
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 4000
    if ending == "svg":
        text = first.read_text()
        named = [name for name in curves if f">{name}<" in text]
        assert named == list(curves)[:10]
        assert f"({len(curves)} groups)" in text


def test_no_state_of_matplotlib_changes(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    fxprune.plot_sensitivity(FEW, tmp_path / "x.svg")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"ends in '.gif'; known endings: .pdf, .png, .svg"):
        fxprune.plot_sensitivity(FEW, tmp_path / "x.gif")
    with pytest.raises(InputError, match="no curve with two finite points"):
        fxprune.plot_sensitivity({"a": [(4, 0.0), (2, float("nan"))]}, tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'fxprune\[plot\]'"):
        fxprune.plot_sensitivity(FEW, tmp_path / "x.png")
