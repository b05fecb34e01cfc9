"""The architecture: modules import only lower layers, files are short, and imports are light."""

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
    {"jaxtrain.types", "jaxtrain.named", "jaxtrain.lazy", "jaxtrain.hub", "jaxtrain.remote", "jaxtrain.config"},
    {"jaxtrain.parallel"},
    {"jaxtrain.ops", "jaxtrain.nn", "jaxtrain.lora", "jaxtrain.optim", "jaxtrain.objectives", "jaxtrain.observe"},
    {"jaxtrain.train", "jaxtrain.sample"},
    {"jaxtrain.roles"},
    {"jaxtrain.session"},
    {"jaxtrain.rl"},
    {"jaxtrain.recipes", "jaxtrain.serve", "jaxtrain.verify", "jaxtrain.plan", "jaxtrain.launch"},
    {"jaxtrain", "jaxtrain.cli"},
]
HOST_ONLY = {
    *("jaxtrain.types", "jaxtrain.named", "jaxtrain.hub", "jaxtrain.remote"),
    *("jaxtrain.config", "jaxtrain.data", "jaxtrain.launch"),
    *("jaxtrain.observe.status", "jaxtrain.observe.heartbeat", "jaxtrain.observe.run_files"),
    *("jaxtrain.observe.history", "jaxtrain.observe.report_page"),
}
FOR_CONVERTERS = {
    *("jaxtrain.types", "jaxtrain.named", "jaxtrain.hub", "jaxtrain.config", "jaxtrain.nn.config", "jaxtrain.parallel"),
}
USERS_OF_DATA = {
    "jaxtrain.roles",
    "jaxtrain.session",
    "jaxtrain.rl",
    "jaxtrain.recipes",
    "jaxtrain.serve",
    "jaxtrain.plan",
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


class _WithoutTypeChecking(ast.NodeTransformer):
    """Removes what only a type checker reads."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(_WithoutTypeChecking().visit(ast.parse(path.read_text()))):
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


# Public names that several modules define because they are one protocol, and where.
PLATFORMS = (".cpu", ".gpu", ".tpu")
PROTOCOLS = {
    "run": {
        f"jaxtrain.recipes.{name}" for name in ("sft", "preference", "reward", "distill", "rl", "quickstart", "run")
    },
    "main": {"jaxtrain.cli.app", "jaxtrain.rl.reward_worker", "jaxtrain.launch.ray_driver"},  # of a process
    "grouped_matmul": {
        f"jaxtrain.ops{platform}.ragged" for platform in ("", *PLATFORMS)
    },  # and its forms for platforms
    "grouped_outer": {f"jaxtrain.ops{platform}.ragged" for platform in PLATFORMS},
    "supports": {f"jaxtrain.ops.{platform}.ragged" for platform in ("gpu", "tpu")},
    "project_on_table": {"jaxtrain.ops.project", "jaxtrain.ops.cpu.matmul"},
}
FAMILY_PROTOCOL = {"from_hf", "hf_keys"}  # of every family's file


def public_definitions(path: Path) -> set[str]:
    """Public names of classes, functions and type aliases of a module, without commands, whose name a user types."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef() if path.parent.name == "cli" and path.stem in ("runs", "models"):
                continue
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]) if name[0].isupper() and not name.isupper() and len(name) > 1:
                found.add(name)  # an alias; constants and type variables are local to their module
    return {name for name in found if not name.startswith("_")}


def test_a_public_name_has_one_meaning():
    places: dict[str, set[str]] = {}
    for path in SOURCES:
        family = path.parent.name == "families"
        for name in public_definitions(path) - (FAMILY_PROTOCOL if family else set()):
            places.setdefault(name, set()).add(module_name(path))
    several = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert {name: modules for name, modules in several.items() if modules != PROTOCOLS.get(name)} == {}
    assert PROTOCOLS.keys() <= several.keys(), "these names are defined once now: take them off the list"


def test_jaxtrain_imports_without_torch_and_beartype():
    modules = [module_name(path) for path in SOURCES]
    hide = "import sys; sys.modules['torch'] = sys.modules['beartype'] = None\n"
    code = hide + "\n".join(f"import {name}" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_data_pipeline_imports_without_jax():
    modules = [module_name(path) for path in SOURCES if within(module_name(path), HOST_ONLY)]
    code = (
        "import sys, jaxtrain.types; assert 'jax' not in sys.modules\n"  # grain, which the pipeline needs, imports jax
    )
    code += "\n".join(f"import {name}" for name in modules) + "\nassert 'jaxtrain.nn' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Modules of one recipe alone. The objectives of distillation belong to two: recipe rl distils from a teacher too.
MODULES_OF = {
    "sft": {"jaxtrain.recipes.sft"},
    "preference": {"jaxtrain.recipes.preference", "jaxtrain.objectives.preference", "jaxtrain.objectives.kto"},
    "reward": {"jaxtrain.recipes.reward", "jaxtrain.objectives.reward"},
    "distill": {"jaxtrain.recipes.distill"},
    "rl": {"jaxtrain.recipes.rl", "jaxtrain.rl", "jaxtrain.objectives.policies", "jaxtrain.objectives.policy"},
}


def loaded_by(name: str) -> set[str]:
    """Our modules that importing one loads, by reading the statements that run at import."""
    files = {module_name(path): path for path in SOURCES}
    found, left = set(), [name]
    while left:
        name = left.pop()
        if name in found or name not in files:
            continue
        found.add(name)
        left.append(name.rpartition(".")[0])
        nodes = list(_WithoutTypeChecking().visit(ast.parse(files[name].read_text())).body)
        while nodes:
            match node := nodes.pop():
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    continue
                case ast.Import():
                    left += [alias.name for alias in node.names]
                case ast.ImportFrom():
                    left += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


@pytest.mark.parametrize("recipe", MODULES_OF)
def test_importing_one_recipe_loads_no_module_of_another(recipe):
    others = {module for other, modules in MODULES_OF.items() if other != recipe for module in modules}
    assert {name for name in loaded_by(f"jaxtrain.recipes.{recipe}") if within(name, others)} == set()


def test_the_modules_that_an_import_loads_are_those_of_its_statements():
    code = "import sys, jaxtrain.recipes.preference\nprint(*(name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.split(".")[0] in ("jaxtrain", "converters")}
    assert ours == loaded_by("jaxtrain.recipes.preference")


def test_every_module_has_a_test_file_of_its_name():
    """A family's file is a table that tests/converters/test_families.py holds against transformers."""
    missing = set()
    for path in SOURCES:
        place = path.relative_to(ROOT)
        if path.stem in ("__init__", "__main__") or place.parent.name == "families":
            continue
        folder = Path(*place.parent.parts[1:]) if place.parts[0] == "jaxtrain" else place.parent
        if not (ROOT / "tests" / folder / f"test_{path.stem}.py").is_file():
            missing.add(module_name(path))
    assert missing == set(), "a new module needs a test file of its name"
