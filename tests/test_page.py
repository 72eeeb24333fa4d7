"""`fxprune report`: the page holds what the report holds, opens without a network, and reads without colour."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxprune
from fxprune import cli
from fxprune.errors import SavedModelError
from fxprune.page import html, markdown, page, read
from fxprune.page.parts import Boxes, Figure, Table
from fxprune.report import Attempt, Clocked, PartTime

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (f(x).view(rows, length, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(rows, length, 32))


class Net(nn.Module):
    """Has heads, a residual stream, and an operator that freezes something."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(8, 32), Attention()
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 3)
        self.more = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(x)
        x = x + self.down(torch.relu(self.up(x)))
        for block in self.more:
            x = x + block(x)
        return self.head(x.mean(1)).cumsum(1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
DATA = [torch.randn(16, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with everything on its page; its times are made up, as the clock is not what is tested."""
    folder = tmp_path_factory.mktemp("page")
    pruned = fxprune.compile(
        net(), X, target={"params": 0.7}, calibration=DATA, keep="up.weight.0", metric=lambda m: 0.5,
        ratios={"kind:heads": 0.5}, sparsity={"pattern": "2:4", "when": "always"},
    )  # fmt: skip
    pruned.measure(backend="torch", threads=1, rounds=6)
    attempt = Attempt(2.1, 1.9, (1.8, 2.0))
    pruned.report.clocked = Clocked(2.0, "torch", 1, [attempt, attempt], 1, 0.9)
    pruned.report.recipe["target"] = {"speedup": 2.0}
    pruned.report.parts = [PartTime("up", 1.0, 0.25), PartTime("down", 0.5, 0.5)]
    return pruned.save(folder / "small <one>")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    found = fxprune.sweep(net(), X, [{"params": 0.8}, {"params": 0.6}, {"macs": 1e-4}], calibration=DATA)
    found.measure(backend="torch", threads=1, rounds=6)
    return found.save(folder / "front")


class Outline(HTMLParser):
    """Tags that are opened and closed, text, links and what is loaded from elsewhere."""

    VOID = frozenset({"meta", "link", "input", "br", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.add(str(given["id"]))
        if tag == "a":
            self.links.add(str(given["href"]))
        self.loaded += [str(given[k]) for k in ("src", "srcset", "data", "action") if k in given]
        if tag == "link":
            self.loaded.append(str(given["href"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(text: str) -> Outline:
    outline = Outline()
    outline.feed(text)
    outline.close()
    assert not outline.open
    return outline


def test_the_page_has_all_that_the_report_has(saved: Path) -> None:
    found = page(*read([saved]))
    report = fxprune.saved.load_pruned(saved).report
    for text in (html(found), markdown(found)):
        plain = re.sub(r"\s+", " ", " ".join(parsed(text).text) if text.startswith(("<", "\n")) else text)
        for group in report.groups:
            assert group.name in plain and f"{group.kept} of {group.size}" in plain
        assert f"{report.params.pruned:,.0f}" in plain and f"{report.macs.dense:,.0f}" in plain
        assert f"{report.latency[0].milliseconds.dense:.2f} ({report.latency[0].iqr.dense:.2f})" in plain
        assert "2.00 x" in plain and "1.90 x (95 % in 1.80-2.00)" in plain and "predicted 2.10 x" in plain
        assert "1.50 ms become 0.75" in plain and "0.750" in plain  # ms saved in `up`
        assert "2:4" in plain and "Proved: pruned equals masked dense" in plain
        assert "`keep`" in plain or "keep" in plain
        assert any(reason in plain for reason in report.whole.values())
        assert report.made.data is not None and report.made.data in plain and "criterion: obs" in plain
        assert report.made.versions["torch"] in plain


def test_heads_are_boxes(saved: Path) -> None:
    report = fxprune.saved.load_pruned(saved).report
    (group,) = [g for g in report.groups if g.kind == "heads"]
    (table,) = [p for s in page(*read([saved])).sections if s.name == "heads" for p in s.parts]
    assert isinstance(table, Table)
    boxes = table.rows[0][1]
    assert isinstance(boxes, Boxes)
    assert boxes.kept == tuple(i in group.heads for i in range(4)) and sum(boxes.kept) == group.kept == 2
    assert boxes.text in html(page(*read([saved])))


def test_nothing_is_loaded_from_elsewhere(saved: Path) -> None:
    text = html(page(*read([saved])))
    outline = parsed(text)
    assert outline.loaded == ["data:,"]  # no icon is asked for, either
    assert not re.findall(
        r"url\((?!#)|@import|https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", text
    )
    assert {link.removeprefix("#") for link in outline.links} <= outline.ids
    assert len(text.encode()) < 2_000_000


def test_names_are_text_and_not_tags(saved: Path) -> None:
    folder = saved.parent / "<script>alert(1)"
    shutil.copytree(saved, folder)
    text = html(page(*read([saved, folder])))
    assert "<script>alert(1)" not in text and "&lt;script&gt;alert(1)" in text


def test_a_sweep_has_its_front_first(swept: Path) -> None:
    found = page(*read([swept]))
    first = found.sections[0]
    assert first.name == "front"
    table = first.parts[0]
    assert isinstance(table, Table) and [row[0] for row in table.rows] == ["params=0.8", "params=0.6"]
    assert any("macs=0.0001 was not reached" in getattr(p, "text", "") for p in first.parts)
    (figure,) = [p for p in first.parts if isinstance(p, Figure)]
    assert figure.table.rows[0][0] == "dense" and len(figure.table.rows) == 3
    assert figure.svg.startswith("<svg") and "params=0.8" in figure.svg
    names = [s.name for s in found.sections]
    assert len(names) == len(set(names)) and "m1-layers" in names and "m2-layers" in names


def test_different_models_have_no_common_front(saved: Path, swept: Path) -> None:
    """Nor have those of which only one has a metric: their accuracies are not one thing."""
    for part in page(*read([saved, swept])).sections[0].parts:
        assert not isinstance(part, Figure)


def test_without_matplotlib_the_numbers_stay(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = html(page(*read([swept])))
    assert "<svg" not in text and "pip install 'fxprune[plot]'" in text and "units: loss" in text
    parsed(text)


def test_the_command(saved: Path, swept: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli.app, ["report", str(saved)])
    assert run.exit_code == 0, run.stderr
    assert (saved / "report.html").is_file() and (saved / "report.md").read_text().startswith("# Net, pruned")
    assert fxprune.load(saved)(X).shape == (4, 3)  # the page beside it does no harm
    out = tmp_path / "all.html"
    both = CliRunner().invoke(cli.app, ["report", str(saved), str(swept), "--out", str(out), "--json"])
    assert both.exit_code == 0, both.stderr
    assert set(json.loads(both.stdout)["files"]) == {str(out), str(tmp_path / "all.md")}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing"], SavedModelError.exit_code, "is missing"),
        (["SAVED", "--out", "x.pdf"], 3, "--out x.pdf: the name must end in .html"),
        (["SAVED", "--markdown", "x.txt"], 3, "--markdown x.txt: the name must end in .md"),
        (["SAVED", "--out", "no/such/place.html"], SavedModelError.exit_code, "cannot be written"),
        (["BROKEN"], SavedModelError.exit_code, "is damaged"),
    ],
)
def test_what_it_cannot_write(
    arguments: list[str], code: int, message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text("{")
    places = {"SAVED": str(saved), "BROKEN": str(tmp_path / "broken")}
    run = CliRunner().invoke(cli.app, ["report", *(places.get(a, a) for a in arguments)])
    assert run.exit_code == code, run.stderr
    assert message in run.stderr


def test_a_sweep_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval(), torch.randn(4, 16)\n"
        "DATA = [torch.randn(8, 16) for _ in range(4)]\n"
        "def score(model):\n    return -float(model(DATA[0]).detach().square().mean())\n"
    )
    (tmp_path / "recipe.yaml").write_text("target: {macs: 0.9}\nbackend: torch\nround_to: 8\n")
    given = ["nets.py:net", "--target", "macs=0.75,0.5", "--target", "params=0.4", "--out", "front", "--threads", "1"]
    data = ["--calibration", "nets.py:DATA", "--metric", "nets.py:score", "--recipe", "recipe.yaml"]
    run = CliRunner().invoke(cli.app, ["sweep", *given, *data, "--json"])
    assert run.exit_code == 0, run.stderr
    answer = json.loads(run.stdout)
    assert list(answer["reports"]) == ["macs=0.75", "macs=0.5", "params=0.4"] and answer["failed"] == {}
    assert all(r["metric"] and r["latency"] and r["recipe"]["round_to"] == 8 for r in answer["reports"].values())
    parsed((tmp_path / "front" / "report.html").read_text())
    assert "macs=0.5" in (tmp_path / "front" / "report.md").read_text()
    again = CliRunner().invoke(cli.app, ["sweep", *given, "--no-measure"])
    assert again.exit_code == SavedModelError.exit_code and "(--overwrite)" in again.stderr
    shown = CliRunner().invoke(cli.app, ["sweep", *given, "--no-measure", "--overwrite", "--target", "macs=0.001"])
    assert shown.exit_code == 0 and "macs=0.001 was not reached" in shown.stdout


# ---------------------------------------------------------------------- in a browser
@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_clicked_through(browser: Any, saved: Path, swept: Path, width: int, tmp_path: Path) -> None:
    """No error on the console, nothing asked of a network, no sideways scrolling; links, folds, filters, sorting."""
    target = tmp_path / "report.html"
    target.write_text(html(page(*read([saved, swept]))), encoding="utf-8")
    view = browser.new_page(viewport={"width": width, "height": 800})
    said: list[str] = []
    asked: list[str] = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(target.as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    for link in view.locator("nav a").all():
        link.click()
        assert view.locator(f"[id='{link.get_attribute('href')[1:]}'] h2").is_visible()
    for summary in view.locator("summary").all():
        before = summary.evaluate("s => s.parentElement.open")
        summary.click()
        assert summary.evaluate("s => s.parentElement.open") is not before
        if before:
            summary.click()
    some = view.locator("section[id$=layers]").first
    for fold in some.locator("summary").all():
        fold.click()
    rows, field = some.locator("tbody tr"), some.locator("input[type=search]")
    every = rows.count()
    field.fill("heads")
    assert 1 <= sum(row.is_visible() for row in rows.all()) < every
    field.fill("")
    head = some.locator("th").nth(2)
    head.locator("button").click()
    shares = [float(v) for v in rows.locator("td:nth-child(3)").evaluate_all("c => c.map(x => x.dataset.value)")]
    assert shares == sorted(shares) and shares[0] < shares[-1]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert not said
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
