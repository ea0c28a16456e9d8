"""The package's public names, its version, and its layers."""

import ast
from pathlib import Path

import sb3_a3c

PACKAGE = Path(sb3_a3c.__file__).parent

#: Which modules of ours each module may import: the layout of the architecture, one direction only.
LAYERS = {
    "__init__": {"a3c", "errors", "policies"},
    "a3c": {"archive", "arguments", "collector", "envs", "guard", "interrupts", "policies", "shared", "task"},
    "arguments": {"envs", "policies"},
    "collector": {
        "envs",
        "errors",
        "hints",
        "inprocess",
        "interrupts",
        "normalization",
        "redirect",
        "reports",
        "service",
        "shared",
        "subproc",
        "supervisor",
        "task",
    },
    "doctor": {"a3c", "arguments", "checkup", "collector", "launcher", "machine", "shared", "trial"},
    "checkup": {"errors", "hints", "reports"},
    "trial": {
        "a3c",
        "atari",
        "channel",
        "collector",
        "loss",
        "machine",
        "observations",
        "recurrent",
        "reports",
        "shared",
        "supervisor",
    },
    "machine": set(),
    "guard": {"errors"},
    "hints": {"reports"},
    "inprocess": {"service", "shared", "task", "worker"},
    "service": {"channel", "envs", "normalization", "reports", "shared", "task", "worker"},
    "worker": {
        "actions",
        "guard",
        "loss",
        "lstm",
        "normalization",
        "observations",
        "recurrent",
        "reports",
        "shared",
        "stopwatch",
        "tape",
        "task",
    },
    "supervisor": {"channel", "errors", "interrupts", "launcher"},
    "normalization": {"envs", "guard", "observations"},
    "observations": {"reports"},
    "channel": set(),
    "envs": {"subproc"},
    "actions": set(),
    "archive": set(),
    "atari": set(),
    "convolutions": {"plain"},
    "errors": set(),
    "experiment": {"a3c", "policies", "resume"},
    "interrupts": set(),
    "launcher": set(),
    "loss": set(),
    "lstm": {"plain"},
    "plain": set(),
    "policies": {"actions", "convolutions", "lstm", "plain", "tape"},
    "recurrent": {"actions", "lstm", "plain", "policies", "tape"},
    "redirect": set(),
    "reports": set(),
    "resume": {"a3c", "archive"},
    "search_space": set(),
    "shared": {"errors", "guard"},
    "stopwatch": {"reports"},
    "subproc": set(),
    "tape": {"convolutions", "lstm", "plain"},
    "task": set(),
    "zoo": {"a3c", "experiment", "search_space"},
}


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
        "WorkerDiedError",
        "RemoteTraceback",
        "__version__",
    ]
    assert all(hasattr(sb3_a3c, name) for name in sb3_a3c.__all__)


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_imports_point_one_way() -> None:
    imports = {}
    for path in PACKAGE.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {node.module for node in nodes if node.module and node.module.startswith("sb3_a3c")}
        imports[path.stem] = {name.removeprefix("sb3_a3c.") for name in names}
    assert imports == LAYERS
