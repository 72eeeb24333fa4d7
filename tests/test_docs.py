"""The documentation beside the code: each key, command, option, error and name is in it, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import fxprune
from fxprune import cli, errors, passes
from fxprune.backends import BACKENDS
from fxprune.cli import EXIT_CODES
from fxprune.passes import ALLOCATORS, CRITERIA, training
from fxprune.passes.patterns import METHODS
from fxprune.passes.training.find import known_patterns
from fxprune.passes.training.stage import Stage, When
from fxprune.recipe import Recipe, Target
from fxprune.training.recipe import Lock, OptimizerKeys, TrainRecipe, TrainStage, Tune

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
#: Options in the text that are not of `fxprune`: of make, pip, pytest, mkdocs, the benchmarks and the like.
PROGRAMS = re.compile(r"^\s*(?:\$ )?(?:fxprune)\b")

passes.load()


def commands() -> dict[str, set[str]]:
    """Return the options of every command of the command line, "" for those of `fxprune` itself."""
    group: Any = typer.main.get_command(cli.app)
    found = {"": _options(group) | {"--help", "-h"}}
    return found | {name: _options(command) | {"--help", "-h"} for name, command in group.commands.items()}


def _options(command: Any) -> set[str]:
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}


def command_lines(text: str) -> Iterator[str]:
    """Yield what a text tells the reader to type: lines of code, and `code` in sentences, that begin with fxprune."""
    for block in re.findall(r"^```(?:console|text|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from (line.removeprefix("$ ") for line in block.splitlines() if PROGRAMS.match(line))
    yield from re.findall(r"^    (fxprune .*)$", text, re.MULTILINE)
    yield from re.findall(r"(?<!`)`(fxprune [^`\n]+)`(?!`)", text)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings."""
    found: set[str] = set()
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+)$", plain, re.MULTILINE):
        own = re.search(r"\{\s*#([\w-]+)\s*\}", heading)
        slug = re.sub(r"[^\w\s-]", "", re.sub(r"\{.*\}|`", "", heading)).strip().lower()
        found.add(own[1] if own else re.sub(r"[\s-]+", "-", slug))
    return found


# ---------------------------------------------------------------------- recipes
@pytest.mark.parametrize("key", list(Recipe.model_fields))
def test_every_key_of_a_recipe_is_named(key: str) -> None:
    """In the README's table, and in the docs; the reference is made of the docstring."""
    assert f"| `{key}` |" in README, f"README: the table of recipe keys lacks `{key}`"
    assert any(re.search(rf"\b{key}\b", text) for text in PAGES.values()), f"no page of docs/ names the key `{key}`"
    assert f"{key}:" in (Recipe.__doc__ or ""), f"Recipe's docstring, which is the reference, lacks `{key}`"


@pytest.mark.parametrize("key", list(Target.model_fields))
def test_every_target_is_explained(key: str) -> None:
    assert f"| `{key}: " in PAGES["howto/target.md"], f"docs/howto/target.md: the table lacks `{key}`"
    assert f"`{key}: " in README


# ---------------------------------------------------------------------- the command line
def row(parameter: Any) -> str:
    """Return the row of an option in docs/cli.md."""
    value = f" {parameter.metavar}" if parameter.metavar else ""
    names = [*(f"`{name}{value}`" for name in parameter.opts), *(f"`{name}`" for name in parameter.secondary_opts)]
    return f"| {', '.join(names)} | {parameter.help} |"


def test_every_command_and_option_is_on_the_page_of_the_command_line() -> None:
    """What fails here says what to add and where, ready to be pasted."""
    sections = dict(re.findall(r"^## fxprune ([\w-]+)\n(.*?)(?=^## |\Z)", PAGES["cli.md"], re.MULTILINE | re.DOTALL))
    group: Any = typer.main.get_command(cli.app)
    missing = []
    for name, command in group.commands.items():
        if f"](#fxprune-{name})" not in PAGES["cli.md"]:
            about = (command.help or "").partition("\n")[0]
            missing.append(f"to the table of commands: | [`fxprune {name}`](#fxprune-{name}) | {about} |")
            missing.append(f"a section '## fxprune {name}' with a table of its options, as the others have it")
        for parameter in command.params:
            options = [o for o in (*parameter.opts, *parameter.secondary_opts) if o.startswith("-")]
            if not all(f"`{o}" in sections.get(name, "") for o in options):
                missing.append(f"to section '## fxprune {name}': {row(parameter)}")
    missing += [f"`{o}` above the sections" for o in sorted(commands()[""]) if f"`{o}`" not in PAGES["cli.md"]]
    assert not missing, "docs/cli.md lacks:\n  " + "\n  ".join(missing)
    gone = sections.keys() - commands().keys()
    assert not gone, f"docs/cli.md has sections of commands that do not exist: {', '.join(gone)}"
    for name, section in sections.items():
        named = set(re.findall(r"^\| `(--[\w-]+)", section, re.MULTILINE))
        named |= set(re.findall(r"^\| .*?, `(--[\w-]+)` \|", section, re.MULTILINE))
        assert named <= commands()[name], f"docs/cli.md, fxprune {name}: {named - commands()[name]} do not exist"


def test_every_command_line_in_the_text_exists() -> None:
    known = commands()
    lines = [(where, line) for where, text in {"README.md": README, **PAGES}.items() for line in command_lines(text)]
    assert len(lines) > 20
    for where, line in lines:
        words = line.partition("#")[0].split()
        command = words[1] if len(words) > 1 else ""
        if command == "COMMAND" or command.startswith("-"):
            command = ""
        assert command in known, f"{where}: there is no `fxprune {command}` ({line})"
        options = {o.partition("=")[0] for o in re.findall(r"(?<=\s)--[\w-]+", line)}
        assert options <= known[command], f"{where}: `fxprune {command}` has no {options - known[command]} ({line})"


def test_every_option_in_the_text_exists() -> None:
    """`--option` in a sentence is one of some command, or on the short list of other programs' options."""
    known = set().union(*commands().values())
    others = {"--speedup", "--threads", "--peer-limit", "--index-url", "--strict"}  # of benchmarks, pip and mkdocs
    for where, text in {"README.md": README, **PAGES}.items():
        for code in re.findall(r"(?<!`)`(--[^`\n]+)`(?!`)", text):
            for option in re.findall(r"(?:^|(?<=[\s/]))--[a-z][\w-]*", code):
                assert option in known | others, f"{where}: no command has the option {option}"


# ---------------------------------------------------------------------- errors
def test_every_error_class_is_explained() -> None:
    page = PAGES["errors.md"]
    for error in errors.FxpruneError.__subclasses__():
        assert f"## {error.__name__}\n" in page, f"docs/errors.md has no section '## {error.__name__}'"
        assert f"| {error.exit_code} | `{error.__name__}` |" in page, f"docs/errors.md: no row for {error.__name__}"
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == set(EXIT_CODES)
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES["cli.md"], re.MULTILINE)} == codes


def test_the_messages_on_the_page_of_errors_are_those_of_the_code() -> None:
    """What stands between two ellipses occurs in a source file, as one string however its lines are broken."""
    folders = (ROOT / "fxprune", ROOT / "passes", ROOT / "backends")
    files = itertools.chain.from_iterable(folder.rglob("*.py") for folder in folders)
    code = " ".join(re.sub(r'["\']\s*\n\s*f?["\']', "", file.read_text()) for file in files)
    messages = re.findall(r"^\| `([^`]+)`[^|]*\|[^|]+\|$", PAGES["errors.md"], re.MULTILINE)
    assert len(messages) > 60
    for message in messages:
        for part in message.split("…"):
            text = part.strip(" '.")
            assert len(text) < 4 or text in code, f"docs/errors.md: no source has the words '{text}' of '{message}'"


# ---------------------------------------------------------------------- names
def test_the_reference_has_every_registered_name() -> None:
    for page, names in (
        ("criteria", CRITERIA.names()),
        ("allocators", ALLOCATORS.names()),
        ("sparsity", METHODS.names()),
    ):
        text = PAGES[f"reference/{page}.md"]
        for name in names:
            assert f"heading: {name}\n" in text, f"docs/reference/{page}.md lacks '{name}'"
        assert text.count("heading: ") == len(names)
    for name in BACKENDS:
        row = re.search(rf"^\| `{name}` \|.*\|$", PAGES["reference/backends.md"], re.MULTILINE)
        assert row, f"docs/reference/backends.md lacks '{name}'"
        options = BACKENDS[name].OPTIONS
        assert name == "torch-compile" or all(f"`{option}`" in row[0] for option in options), f"{name}: {list(options)}"


def test_the_reference_of_training_is_that_of_the_registries() -> None:
    """Methods, patterns and ramps, each with what it is registered as."""
    training.load()
    text = PAGES["reference/training.md"]
    methods = dict(re.findall(r"^::: (\S+)\n    options:\n      heading: (\w+)\n", text, re.MULTILINE))
    found = {
        f"{cls.__module__}.{cls.__qualname__}": name for name in training.METHODS for cls in [training.METHODS[name]]
    }
    assert methods == found
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    rows = {name: re.findall(r"^\| `(\S+)` \| (.+) \|$", section, re.MULTILINE) for name, section in sections.items()}
    assert sorted(name for name, _ in rows["Patterns"]) == sorted(known_patterns())
    assert rows["Ramps"] == [(name, (training.RAMPS[name].__doc__ or "").strip()) for name in training.RAMPS]


def test_every_key_of_a_training_recipe_is_explained() -> None:
    page = PAGES["howto/training-recipes.md"] + PAGES["reference/training.md"]
    for model in (TrainRecipe, TrainStage, OptimizerKeys, Lock, Tune):
        assert f"::: {model.__module__}.{model.__name__}\n" in page
        for key in model.model_fields:
            assert re.search(rf"^        (?:\w+, )*{key}(?:, \w+)*:", model.__doc__ or "", re.MULTILINE), (
                f"{model}: {key}"
            )
    for key in OptimizerKeys.model_fields:
        assert f"`{key}`" in PAGES["howto/training-recipes.md"]


def test_the_tables_from_other_tools_name_what_there_is() -> None:
    """Methods, patterns, ramps and keys in the right column of the tables of training tools."""
    training.load()
    models = (Stage, When, TrainRecipe, TrainStage, OptimizerKeys, Recipe)
    known = {key for model in models for key in model.model_fields}
    for heading in ("Intel Neural Compressor", "SparseML"):
        section = PAGES["migrate.md"].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        table = re.findall(r"^\| (.+) \| (.+) \|$", section, re.MULTILINE)
        assert len(table) > 20
        for _, right in table:
            for name in re.findall(r"method: (?:\{name: )?(\w+)", right):
                assert name in {*training.METHODS, *METHODS}, name
            for name in re.findall(r"ramp: (\w+)", right):
                assert name in training.RAMPS, name
            for key in re.findall(r"^`(\w+): ", right):
                assert key in known, key


def test_the_reference_has_the_whole_public_api() -> None:
    everything = "\n".join(text for name, text in PAGES.items() if name.startswith("reference/"))
    objects = set(re.findall(r"^::: (\S+)$", everything, re.MULTILINE))
    for path in objects:
        module, _, name = path.rpartition(".")
        if importlib.util.find_spec(path if path == "fxprune.errors" else module) is None:
            pytest.fail(f"docs/reference: there is no module {module}")
        found = importlib.import_module(path if path == "fxprune.errors" else module)
        assert path == "fxprune.errors" or hasattr(found, name), f"docs/reference: there is no {path}"
    for name in fxprune.__all__:
        thing = getattr(fxprune, name)
        path = f"{thing.__module__}.{thing.__qualname__}"
        assert path in objects or thing.__module__ in objects, f"docs/reference lacks `{path}` (fxprune.{name})"


# ---------------------------------------------------------------------- the site
def test_the_pages_are_those_of_the_navigation() -> None:
    def leaves(item: Any) -> Iterator[str]:
        if isinstance(item, str):
            yield item
        else:
            for below in item if isinstance(item, list) else item.values():
                yield from leaves(below)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(leaves(site["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == set(PAGES), set(listed) ^ set(PAGES)


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    folder = ROOT if page == "README.md" else (DOCS / page).parent
    text = README if page == "README.md" else PAGES[page]
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / page if page == "README.md" else DOCS / page
        assert file.exists(), f"{page}: {target} leads nowhere"
        generated = anchor.startswith("fxprune.")  # made by mkdocstrings; `mkdocs build --strict` looks at these
        if anchor and not generated and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), f"{page}: {target}: there is no such heading"


def test_pictures_say_what_they_show() -> None:
    for picture in (DOCS / "images").glob("*.svg"):
        text = picture.read_text()
        assert "<title" in text and "<desc" in text, picture.name
        assert any(picture.name in page for page in PAGES.values()), f"{picture.name} is on no page"


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
