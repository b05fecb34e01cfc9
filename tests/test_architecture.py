"""The layers of the house: imports point down only, files stay short, nothing heavy sneaks in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("jaxtrain/**/*.py"), *ROOT.glob("converters/**/*.py")])
EVERYTHING = sorted([*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])

# A module may import its own layer and those above it in this list.
LAYERS = [
    {"jaxtrain.types", "jaxtrain.named", "jaxtrain.lazy", "jaxtrain.config"},
    {"jaxtrain.parallel"},
    {"jaxtrain.ops", "jaxtrain.nn", "jaxtrain.lora", "jaxtrain.optim", "jaxtrain.objectives", "jaxtrain.observe"},
    {"jaxtrain.train", "jaxtrain.sample"},
    {"jaxtrain.roles"},
    {"jaxtrain.session"},
    {"jaxtrain.rl"},
    {"jaxtrain.recipes", "jaxtrain.serve", "jaxtrain.verify", "jaxtrain.plan"},
    {"jaxtrain", "jaxtrain.cli"},
]
HOST_ONLY = {"jaxtrain.types", "jaxtrain.config", "jaxtrain.data"}
FOR_CONVERTERS = {"jaxtrain.types", "jaxtrain.config", "jaxtrain.nn.config", "jaxtrain.parallel"}
USERS_OF_DATA = {
    "jaxtrain.roles",
    "jaxtrain.session",
    "jaxtrain.rl",
    "jaxtrain.recipes",
    "jaxtrain.serve",
    "jaxtrain.cli",
}
USERS_OF_TORCH = {"converters.reference"}  # inside functions only: every module is imported without torch below
USERS_OF_CONVERTERS = {
    *("jaxtrain.roles", "jaxtrain.session", "jaxtrain.rl", "jaxtrain.recipes"),
    *("jaxtrain.serve", "jaxtrain.verify", "jaxtrain.plan", "jaxtrain.cli"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
    return found


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def layer(name: str) -> int:
    package = ".".join(name.split(".")[:2])
    return next((depth for depth, members in enumerate(LAYERS) if package in members), -1)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    for imported in imports(path):
        if imported.split(".")[0] == "converters":
            allowed = within(name, USERS_OF_CONVERTERS | {"converters"})
        elif imported.split(".")[0] != "jaxtrain":
            allowed = imported.split(".")[0] != "torch" or within(name, USERS_OF_TORCH)
            if within(name, HOST_ONLY):
                allowed &= imported.split(".")[0] not in {"jax", "flax", "optax", "orbax"}
        elif name.startswith("converters"):
            allowed = within(imported, FOR_CONVERTERS)
        elif within(name, {"jaxtrain.data"}):
            allowed = within(imported, HOST_ONLY)
        else:
            assert layer(name) >= 0, f"{name} is in no layer"
            allowed = within(imported, {"jaxtrain.data"}) or 0 <= layer(imported) <= layer(name)
            allowed &= not within(imported, {"jaxtrain.data"}) or within(name, USERS_OF_DATA)
        assert allowed, f"{name} must not import {imported}"


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.name != "utils.py"


def test_jaxtrain_imports_without_torch():
    modules = [module_name(path) for path in SOURCES]
    hide = "import sys; sys.modules['torch'] = None\n"
    code = hide + "\n".join(f"import {name}" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_data_pipeline_imports_without_jax():
    modules = [module_name(path) for path in SOURCES if within(module_name(path), HOST_ONLY)]
    code = "\n".join(f"import {name}" for name in modules) + "\nimport sys; assert 'jaxtrain.nn' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("recipe", "other"), [("sft", ("jaxtrain.rl", "jaxtrain.recipes.rl")), ("rl", ("jaxtrain.recipes.sft",))]
)
def test_importing_one_recipe_loads_no_module_of_another(recipe, other):
    code = f"import sys, jaxtrain.recipes.{recipe}; assert not set(sys.modules) & {set(other)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
