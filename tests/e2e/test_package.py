"""The package as users get it: built, checked, installed into a fresh environment, and served from there."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("build", reason="needs the extra `package`")
pytest.importorskip("twine", reason="needs the extra `package`")
# Installing SGLang takes minutes and 11 GB.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("py.typed", "nano/config.json", "nano/model.safetensors", "cli/play/page/index.html", "plugin.py")
LEFT_OUT = ("tests/", "benchmarks/", "examples/", "docs/")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Its output. Nothing of this environment reaches the command."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    finished = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, which is made from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def fresh(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", built[0])
    return python


def test_both_have_all_that_is_served_and_nothing_else(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    with ZipFile(wheel) as file:
        names = file.namelist()
    assert {f"sglang_orthrus/{name}" for name in NEEDED} <= set(names)
    assert not [name for name in names if name.startswith(LEFT_OUT)]
    with tarfile.open(sdist) as archive:
        inner = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"sglang_orthrus/{name}" for name in NEEDED} | {"LICENSE", "README.md", "pyproject.toml"} <= inner


def test_the_index_would_take_them(built: tuple[Path, Path]) -> None:
    assert "FAILED" not in run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_wheel_serves_from_a_fresh_environment(fresh: Path, tmp_path: Path) -> None:
    """The main job, in a folder that is not the checkout."""
    said = run(fresh, "-m", "sglang_orthrus", "demo", cwd=tmp_path)
    assert "tokens/cycle" in said and "story" in said


def test_the_sdist_installs_the_same(fresh: Path, built: tuple[Path, Path], tmp_path: Path) -> None:
    where = "import sglang_orthrus, pathlib; print(pathlib.Path(sglang_orthrus.__file__).parent)"
    folder = Path(run(fresh, "-c", where, cwd=tmp_path).strip())

    def files() -> dict[str, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    from_wheel = files()
    run(fresh, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", built[1], cwd=tmp_path)
    assert files() == from_wheel
    flags = ("--model-path", str(folder / "nano"), "--speculative-algorithm", "ORTHRUS")
    run(fresh, "-m", "sglang_orthrus", "doctor", *flags, cwd=tmp_path)
