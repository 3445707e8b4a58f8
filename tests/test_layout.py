"""The code layout: an import goes down, nothing is a circle, and no command imports another."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vit_jax"

# From top to bottom; what stands on one line is one floor. A room is a folder, or a module at
# the top of the package; every module there that is not named here is a command.
FLOORS = (
    ("commands",),
    ("command_line",),
    ("analysis", "evaluation", "planning", "training"),
    ("checkpoints",),
    ("interop",),
    ("data", "distributed", "objectives"),
    ("config", "models"),
    ("system",),
)
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}


def sources():
    """{dotted name below vit_jax: source code}; packages' own files hold docstrings only."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def imports(source, modules):
    """The modules of the package that some source code imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        assert not getattr(node, "level", 0), "imports name the whole path"
        found |= {name.removeprefix("vit_jax.") for name in names}
    return found & modules


def room(module):
    first, _, rest = module.partition(".")
    return first if rest or first in FLOOR else "commands"


def faults(code):
    """A sentence for everything about the imports of {module: source} that is not allowed."""
    found = []
    graph = {module: imports(source, code.keys()) for module, source in code.items()}
    rooms = {}
    for module, wanted in graph.items():
        if room(module) not in FLOOR:
            found.append(f"{module} stands on no floor")
            continue
        for other in wanted:
            if room(module) == room(other) == "commands":
                found.append(f"the command {module} imports the command {other}")
            elif FLOOR[room(other)] < FLOOR[room(module)]:
                found.append(f"{module} imports {other}, which stands above it")
            if room(module) != room(other):
                rooms.setdefault(room(module), set()).add(room(other))
    for name, each in (("modules", graph), ("rooms", rooms)):
        try:
            graphlib.TopologicalSorter(each).prepare()
        except graphlib.CycleError as error:
            found.append(f"a circle of {name}: {' -> '.join(error.args[1])}")
    return found


def test_imports_go_down_and_nowhere_in_a_circle():
    assert faults(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("models.vit", "from vit_jax.training import step", "models.vit imports training.step"),
        ("system.errors", "import vit_jax.models.vit", "system.errors imports models.vit"),
        ("checkpoints.trained", "    from vit_jax import train", "imports train, which stands"),
        ("train", "from vit_jax import sweep", "the command train imports the command sweep"),
        ("models.layers", "from vit_jax.models.vit import stack_layers", "a circle of modules"),
        ("training.step", "from vit_jax.planning.step import Plan", "a circle of rooms"),
        ("attic.box", "", "attic.box stands on no floor"),
    ],
)
def test_a_planted_fault_is_found(module, line, message):
    code = sources()
    indented = f"if True:\n{line}" if line.startswith(" ") else line
    code[module] = f"{code.get(module, '')}\n{indented}\n"
    assert any(message in fault for fault in faults(code))
