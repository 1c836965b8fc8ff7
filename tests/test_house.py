"""The rules of the house that a machine can check: functions from source text to faults."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tbpo_cli.core import GENERATORS, LOSSES
from tbpo_cli.evaluation.judges import JUDGES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tbpo_cli"
LAYOUT = (ROOT / "docs/internals.md").read_text(encoding="utf-8")
FILES = {
    str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAX_LINES, MAX_FUNCTION_LINES, MAX_OBVIOUS_LINES = 350, 60, 3

# These may be imported by everything except core.
ANYWHERE = {"errors", "console", "config", "runs"}
LAYERS = {  # room: the rooms it may import, beside ANYWHERE
    "errors": set(),
    "console": set(),
    "core": set(),
    "config": {"core"},
    "runs": set(),
    "data": {"core"},
    "batch": {"core", "data"},
    "model": {"core", "data", "batch"},
    "evaluation": {"core", "data", "batch", "model"},
    "report": {"core", "data", "batch", "model", "evaluation"},
    "train": {"core", "data", "batch", "model", "report"},
    "hub": {"core", "evaluation", "report"},
    "stages": {"core", "data", "batch", "model", "evaluation", "report", "train", "hub"},
    "cli": {"core", "data", "batch", "model", "evaluation", "report", "train", "stages"},
    "__init__": set(),
}


def room_of(name):
    """The folder of the package that a file is in, or the name of a file that is in none."""
    return name.split("/")[0].removesuffix(".py")


def modules(nodes):
    """The modules that some statements import; `from a import b` is a.b."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def at_import(tree):
    """The nodes that run when a module is imported: not those in functions or for type checkers."""
    for node in ast.iter_child_nodes(tree):
        typing = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        if not typing and not isinstance(node, ast.FunctionDef):
            yield node
            yield from at_import(node)


def wrong_imports(name, source):
    """Imports against the layers, of one stage by another, and of more than torch by core."""
    own = room_of(name)
    stage = Path(name).stem
    for module in modules(ast.walk(ast.parse(source))):
        top, room, *inside = [*module.split("."), "__init__"]
        if top != "tbpo_cli":
            wrong = own == "core" and top not in sys.stdlib_module_names | {"torch"}
        elif own == "stages" == room and stage != "chain":
            wrong = inside[0] not in (stage, "chain")
        else:
            wrong = room not in {own} | LAYERS[own] | (ANYWHERE if own != "core" else set())
        if wrong:
            yield module


def imports_by_name(name, source):
    """Modules that are loaded by a string: neither the type checker nor a reader follows it."""
    for node in ast.walk(ast.parse(source)):
        words = (getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", ""))
        if {"import_module", "__import__"} & {*words}:
            yield ast.unparse(node)


def too_long(name, source):
    """The file, and its functions, that are no longer read in one go."""
    if (lines := source.count("\n")) > MAX_LINES:
        yield f"{lines} lines"
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
        ):
            yield node.name


def undocumented(name, source):
    """Public names without a docstring. A method of several classes of a file needs one once.

    Outside core, a function of a single short statement is its own description.
    """
    tree = ast.parse(source)

    def public(body):
        found = (node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        return [node for node in found if not node.name.startswith("_")]

    classes = [node for node in public(tree.body) if isinstance(node, ast.ClassDef)]
    methods = [method for owner in classes for method in public(owner.body)]
    documented = {method.name for method in methods if ast.get_docstring(method)}
    if tree.body and not ast.get_docstring(tree):
        yield name
    for node in [*public(tree.body), *methods]:
        obvious = (
            not name.startswith("core/")
            and isinstance(node, ast.FunctionDef)
            and len(node.body) == 1
        )
        obvious = obvious and node.end_lineno - node.body[0].lineno < MAX_OBVIOUS_LINES
        if not (
            ast.get_docstring(node) or obvious or (node in methods and node.name in documented)
        ):
            yield node.name


def losses_by_name(name, source):
    """Comparisons with the name of a loss: what depends on the loss is asked of the loss."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            if constants & (LOSSES.keys() - {"sft"}):  # which is the name of a stage, too
                yield ast.unparse(node)


def import_cycle(files):
    """A way from a module back to itself through imports that run when it is imported, or []."""
    sources = {
        f"tbpo_cli.{name}".replace("/", ".").removesuffix(".py").removesuffix(".__init__"): name
        for name in files
    }
    graph = {}
    for module, name in sources.items():
        imported = modules(at_import(ast.parse(files[name])))
        graph[module] = {
            one if one in sources else one.rpartition(".")[0] for one in imported
        } & sources.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def room_cycle(files):
    """A way from a room back to itself, or []: by any import, also in functions and for types."""
    graph = {}
    for name, source in files.items():
        own = room_of(name)
        imported = (module.split(".") for module in modules(ast.walk(ast.parse(source))))
        rooms = {parts[1] for parts in imported if parts[0] == "tbpo_cli" and len(parts) > 1}
        graph.setdefault(own, set()).update(rooms - {own})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def private_names(source):
    """Names of the package that begin with an underscore, imported or replaced by a test."""
    tree = ast.parse(source)
    yield from (
        module
        for module in modules(ast.walk(tree))
        if module.startswith("tbpo_cli.") and "._" in module
    )
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else ""
        if isinstance(text, str) and re.fullmatch(r"tbpo_cli(\.\w+)*\._\w+", text):
            yield text


def unread_keys(files):
    """Keys of the recipe that only their own check reads; JUDGES, a table, reads its own."""
    tables = []
    trees = {name: ast.parse(source) for name, source in files.items()}
    for name, tree in trees.items():
        if name.startswith("config/"):
            tables += [node for node in tree.body if isinstance(node, ast.ClassDef)]
    tables = [
        node for node in tables if any(ast.unparse(d) == "table" for d in node.decorator_list)
    ]
    keys = {
        item.target.id for table in tables for item in table.body if isinstance(item, ast.AnnAssign)
    }
    for table in tables:
        table.body = [item for item in table.body if getattr(item, "name", "") != "__post_init__"]
    read = {
        node.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    return keys - read - JUDGES.keys()


def missing_in_layout(readme, names):
    """Rooms, folders or single files, that the layout of docs/internals.md does not name."""
    pattern = r"^## Layout\n+```\n(.*?)^```"
    layout = re.search(pattern, readme, re.DOTALL | re.MULTILINE).group(1)
    rooms = dict.fromkeys(re.sub("/.*", "/", name) for name in names if name != "__init__.py")
    return [room for room in rooms if f"\n  {room} " not in layout]


def without_source(table):
    """Methods of a paper whose docstring, or that of their module, does not say which."""
    return [
        name
        for name, method in table.items()
        if "Source:" not in method.__doc__ + sys.modules[method.__module__].__doc__
    ]


RULES = (wrong_imports, imports_by_name, too_long, undocumented, losses_by_name)
BAD = [
    (wrong_imports, "core/head.py", "import numpy"),
    (wrong_imports, "core/head.py", "from tbpo_cli.errors import TbpoError"),
    (wrong_imports, "data/pairs.py", "def late():\n    import tbpo_cli.train.loop"),
    (wrong_imports, "stages/align.py", "from tbpo_cli.stages.sft import run"),
    (wrong_imports, "stages/align.py", "from tbpo_cli.stages import sft"),
    (imports_by_name, "cli/main.py", "import importlib\nimportlib.import_module(name)"),
    (imports_by_name, "cli/main.py", "from importlib import import_module"),
    (imports_by_name, "cli/main.py", "__import__(name)"),
    (too_long, "runs/run_dir.py", "\n" * 351),
    (too_long, "runs/run_dir.py", "class A:\n    def f(self):\n" + "        self\n" * 60),
    (undocumented, "runs/run_dir.py", "import os"),
    (undocumented, "runs/run_dir.py", '"""."""\nclass A: pass'),
    (
        undocumented,
        "runs/run_dir.py",
        '"""."""\nclass A:\n    """."""\n    def f(self):\n        g()\n        h()',
    ),
    (
        undocumented,
        "runs/run_dir.py",
        '"""."""\ndef f():\n    return (\n        1,\n        2,\n    )',
    ),
    (undocumented, "core/head.py", '"""."""\ndef f():\n    return 1'),
    (losses_by_name, "hub/publish.py", 'if loss.name in ("ipo", "dpo"): pass'),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FILES)
def test_every_file_keeps_every_rule(name, rule):
    assert not [*rule(name, FILES[name])]


@pytest.mark.parametrize(("rule", "name", "source"), BAD, ids=range(len(BAD)))
def test_a_file_that_breaks_a_rule_is_found(rule, name, source):
    assert len([*rule(name, source)]) == 1


def test_no_module_imports_itself_through_others():
    assert not import_cycle(FILES)
    circle = {
        "a.py": "from tbpo_cli.b import c",
        "b/__init__.py": "",
        "b/c.py": "if X:\n    import tbpo_cli.a",
    }
    assert {*import_cycle(circle)} == {"tbpo_cli.a", "tbpo_cli.b.c"}
    for late in ("def f():\n    import tbpo_cli.a", "if TYPE_CHECKING:\n    import tbpo_cli.a"):
        assert not import_cycle({**circle, "b/c.py": late})


def test_no_room_imports_itself_through_others():
    assert not room_cycle(FILES)
    late = {
        "hub/card.py": "if TYPE_CHECKING:\n    from tbpo_cli.report.pages import page",
        "report/pages.py": "def page():\n    from tbpo_cli import console, hub",
        "console.py": "",
    }
    assert {*room_cycle(late)} == {"hub", "report"}
    assert not room_cycle({**late, "hub/card.py": "import tbpo_cli.hub.upload"})


def test_no_test_or_benchmark_names_what_is_private():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert not [*private_names(path.read_text(encoding="utf-8"))], path.name
    bad = [
        "from tbpo_cli.data.store import _schema",
        "import tbpo_cli.data._store",
        'patch("tbpo_cli.train.loop._signals")',
    ]
    for source in bad:
        assert len([*private_names(source)]) == 1, source


def test_no_line_is_longer_than_100_columns():
    """By ruff, which leaves out what cannot be broken, such as a link; in all our Python."""
    ruff = [sys.executable, "-m", "ruff", "check", "--select", "E501", "--line-length", "100"]
    done = subprocess.run(
        [*ruff, "--output-format", "concise"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_every_key_of_a_recipe_is_read():
    assert not unread_keys(FILES)
    checked = (
        "@table\nclass Run:\n    seed: int\n    name: str\n"
        "    def __post_init__(self):\n        self.seed"
    )
    assert unread_keys({"config/recipe.py": checked, "runs/run_dir.py": "recipe.run.name"}) == {
        "seed"
    }


def test_the_layout_names_every_room():
    assert not missing_in_layout(LAYOUT, FILES)
    layout = "## Layout\n```\ntbpo_cli/\n  run.py   a run\n  data/    pairs\n```\n"
    names = ["run.py", "hub.py", "data/tokens.py", "core/losses.py", "core/head.py", "__init__.py"]
    assert missing_in_layout(layout, names) == ["hub.py", "core/"]


def test_every_method_of_a_paper_names_it():
    assert without_source(LOSSES | GENERATORS) == ["sft"]
