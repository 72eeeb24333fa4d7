"""The wheel as a stranger gets it: built from a copy of the sources, and imported with the sources out of reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What a plain `import fxprune` must not load.
HEAVY = ["onnxruntime", "onnx", "onnxscript", "transformers", "timm", "matplotlib", "tensorrt", "tensorrt_rtx"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the unpacked wheel."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    # A copy, because setuptools leaves build/ behind in the folder that it builds, and packages what is stale there.
    for name in ("fxprune", "passes", "backends"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(base),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = base.glob("fxprune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(base / "unpacked")
    return base / "unpacked"


def sources(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_the_wheel_holds_every_module_as_a_real_file(unpacked: Path) -> None:
    for name in ("passes", "backends"):
        inside = unpacked / "fxprune" / name
        assert inside.is_dir()
        assert not inside.is_symlink()
        assert sources(inside) == sources(ROOT / name)
    assert "base.py" in sources(unpacked / "fxprune" / "backends")
    assert (unpacked / "fxprune" / "py.typed").exists()


def test_the_wheel_installs_nothing_but_fxprune(unpacked: Path) -> None:
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"fxprune"}
    (info,) = unpacked.glob("*.dist-info")
    assert "fxprune = fxprune.cli:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").exists()


@pytest.fixture(scope="module")
def loaded(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return what a fresh interpreter says after `import fxprune` from the unpacked wheel."""
    program = (
        "import json, sys\n"
        f"sys.path[:] = [{str(unpacked)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
        # An editable install finds the sources through an entry of its own on these.
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
        "import fxprune, torch\n"
        "print(json.dumps({'file': fxprune.__file__, 'modules': sorted({m.split('.')[0] for m in sys.modules}),\n"
        "                  'cuda': torch.cuda.is_initialized()}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_unpacked_wheel_is_what_was_imported(loaded: dict[str, object], unpacked: Path) -> None:
    assert loaded["file"] == str(unpacked / "fxprune" / "__init__.py")


@pytest.mark.parametrize("library", HEAVY)
def test_importing_fxprune_loads_no_backend_and_no_model_library(loaded: dict[str, object], library: str) -> None:
    assert library not in loaded["modules"]  # type: ignore[operator]


def test_importing_fxprune_starts_no_cuda(loaded: dict[str, object]) -> None:
    assert loaded["cuda"] is False
