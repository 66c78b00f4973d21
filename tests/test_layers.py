"""The layers, read from the source: who may import whom, what may not be called, and how long things may be."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("alignment", "rewards", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
HEAVY = {"transformers", "peft", "trl", "datasets", "accelerate"}
CLUSTER = {"vllm", "deepspeed", "ray"}
TOP = {f"alignment.{name}" for name in ("cli", "recipe", "trainer", "online", "offline", "job")}
BELOW = "algorithms engines tasks curricula environments batching registry types errors".split()
BELOW += [f"data/{name}" for name in ("sources", "rows", "files", "hub", "procedural", "reasoning_gym")]
FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "os.system", "__import__"}

each_file = pytest.mark.parametrize("path", FILES, ids=NAMES)


def imports(tree: ast.AST, package: str, *, run: bool = True) -> Iterator[tuple[str, int]]:
    """Modules named by import statements. ``run=False`` leaves out what waits for a call or only serves types."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (parent, node.module) if part)
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif run or not (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_for_types(node)):
            yield from imports(node, package, run=run)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def found(path: Path, *, run: bool = True) -> list[tuple[str, int]]:
    return list(imports(ast.parse(path.read_text()), ".".join(path.parent.relative_to(ROOT).parts), run=run))


def under(path: Path, *folders: str) -> bool:
    return any(path.is_relative_to(ROOT / folder) for folder in folders)


def root(module: str) -> str:
    return module.partition(".")[0]


def call_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield ast.unparse(node.func), node.lineno


def test_the_checks_see_what_they_are_meant_to_see():
    source = (
        "from . import a\nfrom ..b import c\nif TYPE_CHECKING:\n    import ray\ndef f():\n    import vllm\n    eval('')"
    )
    tree = ast.parse(source)
    at_import = ["alignment.x", "alignment.x.a", "alignment.b", "alignment.b.c"]
    assert [m for m, _ in imports(tree, "alignment.x")] == [*at_import, "ray", "vllm"]
    assert [m for m, _ in imports(tree, "alignment.x", run=False)] == at_import
    assert dict(call_names(tree)) == {"eval": 7}
    assert len(FILES) > 20


@pytest.mark.parametrize("path", [f for f in FILES if under(f, "alignment/algorithms")], ids=lambda p: p.name)
def test_algorithms_import_torch_registry_records_errors_and_each_other_only(path):
    for module, line in found(path):
        ours = ("alignment.registry", "alignment.types", "alignment.errors", "alignment.algorithms")
        allowed = module == "alignment" or any(module == m or module.startswith(f"{m}.") for m in ours)
        if root(module) != "alignment":
            allowed = root(module) == "torch" or root(module) in sys.stdlib_module_names
        assert allowed, f"{path}:{line} imports {module}"


@each_file
def test_cluster_libraries_stay_under_engines(path):
    for module, line in found(path):
        assert root(module) not in CLUSTER or under(path, "alignment/engines", "launch"), f"{path}:{line}: {module}"


@each_file
def test_libraries_that_are_slow_to_import_wait_until_they_are_used(path):
    """So that checking a recipe is quick. Engines and models are themselves imported only when a run starts."""
    if under(path, "alignment/engines", "alignment/models.py") and not path.name.endswith("config.py"):
        return
    for module, line in found(path, run=False):
        assert root(module) not in HEAVY | CLUSTER, f"{path}:{line} imports {module} when it is itself imported"


@each_file
def test_what_lies_below_does_not_import_what_stands_on_it(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if not under(path, *(f"alignment/{b}" for b in BELOW), *(f"alignment/{b}.py" for b in BELOW), "rewards"):
        return
    for module, line in found(path, run=False):
        assert module not in TOP, f"{path}:{line}: {name} imports {module}"


@each_file
def test_nothing_runs_text_or_unpickles(path):
    for name, line in call_names(ast.parse(path.read_text())):
        assert name not in FORBIDDEN_CALLS, f"{path}:{line} calls {name}"


@each_file
def test_a_file_can_be_read_in_one_sitting(path):
    text = path.read_text()
    assert text.count("\n") <= 350, f"{path} has {text.count(chr(10))} lines, more than 350"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 50, f"{path}:{node.lineno}: {node.name} has {lines} lines, more than 50"


def test_what_is_imported_is_declared_and_what_is_always_imported_always_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = {distribution(r) for r in project["dependencies"]} | {"pydantic-core"}  # pydantic pins its version
    declared = always | {distribution(r) for extra in project["optional-dependencies"].values() for r in extra}
    known = importlib.metadata.packages_distributions()
    for path in FILES:
        for run, allowed in ((True, declared), (False, always)):
            for module, line in found(path, run=run):
                if root(module) in sys.stdlib_module_names or root(module) in PACKAGES or not module:
                    continue
                if root(module) in CLUSTER and under(path, "alignment/engines") and not path.name.endswith("config.py"):
                    allowed = declared  # these modules are imported when such an engine is built
                names = {distribution(name) for name in (root(module), *known.get(root(module), ()))}
                assert names & allowed, f"{path}:{line} imports {module} of {names}, which pyproject.toml lacks"


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0].lower().replace("_", "-")
