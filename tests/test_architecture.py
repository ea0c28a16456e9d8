"""The package's public names, and its layout: imports point downward, from floor to floor."""

import ast
import graphlib
from pathlib import Path

import pytest

import sb3_a3c

PACKAGE = Path(sb3_a3c.__file__).parent

#: From the top floor down. A room (a folder, or a module that stands by itself) imports from floors below it only; rooms of
#: one floor do not import each other.
FLOORS = [
    {"zoo"},
    {"doctor", "resume"},
    {"__init__"},
    {"a3c"},
    {"arguments", "save_util"},
    {"cluster"},
    {"workers"},
    {"actor_learner"},
    {"policies", "store", "envs", "processes"},
    {"errors", "atari", "version"},
]
#: Modules that implement the store. All others are written against the protocols of ``store.base``.
IMPLEMENTATIONS = {"store.shared_memory", "store.replica", "store.layout"}

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, without the package's name; "" for the package itself."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), f"{path}: a relative import"
    return {name.removeprefix("sb3_a3c").lstrip(".") for name in names if name.split(".")[0] == "sb3_a3c"}


def room(module: str) -> str:
    return module.split(".")[0] or "__init__"


def floor(name: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS) if name in rooms]
    assert floors, f"{name} stands on no floor: a new folder or module needs a place in the layout"
    return floors[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downward(module: str) -> None:
    for imported in imports(MODULES[module]):
        if room(imported) != room(module):
            assert floor(room(imported)) > floor(room(module)), f"{module} imports {imported}"


def test_no_import_cycles() -> None:
    known = {name: name for name in MODULES} | {name.removesuffix(".__init__"): name for name in MODULES} | {"": "__init__"}
    graph = {name: {known[imported] for imported in imports(path)} for name, path in MODULES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)  # or it raises CycleError


def test_only_collector_hosts_and_doctor_choose_a_store() -> None:
    users = {name for name, path in MODULES.items() if imports(path) & IMPLEMENTATIONS and room(name) != "store"}
    assert users == {"workers.collector", "cluster.host", "doctor.cli", "doctor.short_run"}


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "util", "common", "helpers", "misc"}
    assert not [name for name in MODULES if vague & set(name.split("."))]


def test_public_names() -> None:
    assert sb3_a3c.__all__ == [
        "A3C",
        "A3CError",
        "CnnLstmPolicy",
        "CnnPolicy",
        "DivergenceError",
        "MlpLstmPolicy",
        "MlpPolicy",
        "MultiInputLstmPolicy",
        "MultiInputPolicy",
        "RemoteTraceback",
        "WorkerDiedError",
        "WorkerTracebackError",
        "__version__",
    ]
    assert all(hasattr(sb3_a3c, name) for name in sb3_a3c.__all__)


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()
