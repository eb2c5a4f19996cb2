"""The order of the rooms: imports run downhill, and each room asks for no more packages than it needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = """
    config settings noise loss
    attention objectives checkpoints store strategies launch presets follow published gate review suites sandbox_child sandbox
    reading lora models conversion embedded data tracking tasks
    likelihood cache policies sampling infill watch replay scoring
    guard trainer harness pyfunc_model registry chat terminal report perplexity
    stages
    plan commands
    __main__
""".split()
"""Lowest first, a layer a line; a room imports from lower layers, and from those that stand before it in its own."""
FILES = sorted((ROOT / "a2d_core").rglob("*.py"))
NUMERIC_CORE = """
    config settings noise objectives attention reading models conversion loss likelihood cache policies sampling infill guard
    trainer launch watch chat terminal
""".split()
QUICK = """
    config settings presets strategies suites report launch store checkpoints follow tracking gate review registry stages.checks
    stages.register plan published commands __main__
""".split()
PIPELINE = {"peft", "metaflow", "mlflow", "datasets", "lm_eval"}
HEAVY = {"torch", "transformers", "accelerate", "numpy", "pandas"} | PIPELINE


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "a2d_core").with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports, wherever in the file it does so."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "a2d_core":
            rooms |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("a2d_core."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {name.name.split(".")[1] for name in node.names if name.name.startswith("a2d_core.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downhill(path):
    room = room_of(path)
    if room == "__init__":  # what it imports, when it is asked for: see the test of that
        return
    uphill = {other for other in imports_of(path) - {room} if ORDER.index(other) >= ORDER.index(room)}
    assert not uphill, f"{room} imports {', '.join(sorted(uphill))}, which stands above it"


def test_only_tracking_and_registry_import_mlflow_and_only_store_metaflow():
    rooms = {"mlflow": {"tracking", "registry", "pyfunc_model"}, "metaflow": {"store"}}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for package in {name.split(".")[0] for name in names} & set(rooms):
                assert room_of(path) in rooms[package], f"{path.name} imports {package}"


def import_without(absent: set[str], modules: list[str]) -> None:
    """Import modules in a process of its own, in which some packages are not to be found."""
    program = f"""
import importlib
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in {sorted(absent)!r} else find_spec(name, *rest))
for module in {modules!r}:
    importlib.import_module("a2d_core." + module)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_imports_nothing_before_a_name_is_asked_for():
    program = """
import sys, a2d_core
assert not [name for name in sys.modules if name.startswith(("a2d_core.", "torch"))]
assert a2d_core.SampleConfig.__name__ == "SampleConfig" and "torch" not in sys.modules
assert set(a2d_core.__all__) <= set(dir(a2d_core)) and not hasattr(a2d_core, "nothing")
for name in a2d_core.__all__:
    assert getattr(a2d_core, name).__name__ == name
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_numeric_core_needs_no_pipeline_packages():
    import_without(PIPELINE, NUMERIC_CORE)


def test_the_command_line_and_the_flows_helpers_start_without_anything_heavy():
    import_without(HEAVY, QUICK)


def refuses(function: ast.FunctionDef) -> bool:
    """Whether a function itself raises an error that its caller should know of."""
    calls = {getattr(node.func, "id", "") for node in ast.walk(function) if isinstance(node, ast.Call)}
    return "require" in calls or any(isinstance(node, ast.Raise) and node.exc for node in ast.walk(function))


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) != "commands"], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_public_function_that_refuses_says_so(path):
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    silent = [f.name for f in functions if not f.name.startswith("_") and refuses(f) and "Error" not in (ast.get_docstring(f) or "")]
    assert not silent, f"{', '.join(silent)}: say in the docstring which error they raise"
