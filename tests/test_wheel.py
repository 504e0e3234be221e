"""The wheel, installed where the checkout cannot be seen."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("marsinfer_cli", "pipeline")
MODULES = {
    path.relative_to(CHECKOUT).as_posix() for name in PACKAGES for path in CHECKOUT.glob(f"{name}/**/*.py")
}


def run(*command: object, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: in the checkout, modules since deleted would come back from a stale build folder."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source / name)
    built = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source, cwd=built)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel, and borrows its dependencies from the running one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=root)
    # Only now, lest pip take the running environment's installation of the project for an older one to
    # remove. Folders added so take no part with .pth files of their own, such as an editable install's.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", code, cwd=root).strip())
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return root


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {f"{name}/__init__.py" for name in PACKAGES} <= MODULES
    assert sorted(MODULES - held) == [], "is a package missing in pyproject.toml?"
    assert sorted(name for name in held if name.endswith(".py") and name not in MODULES) == []


def test_the_wheel_holds_the_templates_of_pages(wheel: Path) -> None:
    templates = {path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.glob("pipeline/**/templates/*")}
    assert templates
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(templates - set(archive.namelist())) == []


def test_the_wheel_says_that_it_has_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert {f"{name}/py.typed" for name in PACKAGES} <= set(archive.namelist())


def test_the_installed_command_lists_its_commands(environment: Path, tmp_path: Path) -> None:
    printed = run(environment / "bin" / "marsinfer", "--help", cwd=tmp_path).split()
    assert "batch" in printed
    assert "methods" in printed


def test_the_installed_package_tells_its_version(wheel: Path, environment: Path, tmp_path: Path) -> None:
    code = "import pipeline; print(pipeline.__version__)"
    assert run(environment / "bin" / "python", "-c", code, cwd=tmp_path).strip() == wheel.name.split("-")[1]


def test_the_installed_modules_are_not_those_of_the_checkout(environment: Path, tmp_path: Path) -> None:
    code = "from marsinfer_cli import app; from pipeline import records as r; print(app.__file__, r.__file__)"
    places = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert len(places) == 2
    for place in places:
        assert Path(place).is_relative_to(environment)
        assert not Path(place).resolve().is_relative_to(CHECKOUT)
