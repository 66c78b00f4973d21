"""The wheel holds everything, and works where the source tree is not."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [folder for folder in ("alignment", "rewards", "launch", "recipes") if (ROOT / folder).is_dir()]
RECIPES = sorted(
    path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml") if path.name != "claim.yaml"
)  # a claim is no recipe, but has one beside it


def run(*command: str | Path, cwd: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=outside, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools leaves build/ beside the sources and would pack what is still in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", out, source, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel. Its dependencies are those of the environment that runs the tests: they
    come through a .pth file, which does not bring along the editable install of the source tree."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    run(*pip, wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        (Path("alignment") / path if path.parts[0] == "recipes" else path).as_posix()
        for folder in SHIPPED
        for path in (file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file())
        if "__pycache__" not in path.parts
    }
    assert wanted <= packed, f"not in the wheel: {sorted(wanted - packed)}"
    extra = {name for name in packed - wanted if ".dist-info/" not in name}
    assert not extra, f"in the wheel only: {sorted(extra)}"
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_the_wheel_is_what_is_imported(installed):
    code = "import alignment, rewards; print(alignment.__file__, rewards.__file__, alignment.__version__)"
    ours, rewards, version = run(installed / "bin" / "python", "-c", code, cwd=installed).split()
    assert Path(ours).is_relative_to(installed) and Path(rewards).is_relative_to(installed)
    assert version == next(iter(installed.rglob("alignment_rl-*.dist-info"))).name.split("-")[1].removesuffix(".dist")


def test_there_is_a_quickstart():
    assert Path("quickstart.yaml") in RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_of_the_wheel_passes_its_check(installed, recipe):
    code = "import importlib.resources as r; print(r.files('alignment.recipes')._paths[0])"
    folder = Path(run(installed / "bin" / "python", "-c", code, cwd=installed).strip())
    assert folder.is_relative_to(installed)
    assert run(installed / "bin" / "align", "check", folder / recipe, cwd=installed)


def test_a_new_project_can_be_started_from_the_wheel(installed, tmp_path):
    align = installed / "bin" / "align"
    run(align, "init", "project", cwd=tmp_path)
    project = tmp_path / "project"
    recipes = list(project.rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        run(align, "check", recipe, cwd=project)
