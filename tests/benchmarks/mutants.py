"""The mutants of a source file: copies with one small fault each.

Comparisons, arithmetic, logic, constants, negated conditions, swapped arguments and dropped
statements. Not touched: annotations, decorators, docstrings, text, assertions (they are for the
type checker; the `strict` of a zip is one too), and the arguments of what is raised (its text).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Swapped arguments of these change nothing, or raise an error at once.
UNSWAPPED = {"max", "min", "isinstance", "issubclass", "getattr", "hasattr", "setattr", "cast"}
LONGEST_CHANGE = 90


@dataclass(frozen=True)
class Mutant:
    """A fault in a file.

    Args:
        file: path from the root of the repository.
        lines: first and last line of the statement that has the fault; of a compound statement,
            those of its head.
        function: the dotted name of the class or function around it, "" at the top of the file.
        change: the code before and after.
        source: the text of the whole file with the fault.
    """

    file: str
    lines: tuple[int, int]
    function: str
    change: str
    source: str


@dataclass(frozen=True)
class Site:
    """Where a node stands (`parent.field`, or its item `index`), and what replaces it."""

    parent: ast.AST
    field: str
    index: int | None
    replacement: ast.AST
    lines: tuple[int, int]
    function: str


def mutants_of(file: str, source: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    tree = ast.parse(source)
    return [_applied(file, tree, site) for site in _sites(tree, "", (1, 1))]


def _applied(file: str, tree: ast.Module, site: Site) -> Mutant:
    """Puts the replacement into the tree, writes the file, and puts the tree right again."""
    holder = getattr(site.parent, site.field)
    before = holder if site.index is None else holder[site.index]
    _put(site, site.replacement)
    try:
        source = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    finally:
        _put(site, before)
    texts = [_shortened(node) for node in (before, site.replacement)]
    return Mutant(file, site.lines, site.function, " → ".join(texts), source)


def _put(site: Site, node: ast.AST) -> None:
    if site.index is None:
        setattr(site.parent, site.field, node)
    else:
        getattr(site.parent, site.field)[site.index] = node


def _shortened(node: ast.AST) -> str:
    code = ast.unparse(node)
    if isinstance(node, ast.If | ast.While):
        code = f"{type(node).__name__.lower()} {ast.unparse(node.test)}"
    line = " ".join(code.split())
    return line if len(line) <= LONGEST_CHANGE else line[: LONGEST_CHANGE - 1] + "…"


def _sites(node: ast.AST, function: str, lines: tuple[int, int]) -> Iterator[Site]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _is_left_alone(child):
                continue
            if isinstance(child, ast.stmt):
                lines = _head(child)
            for replacement in (*_statements(child), *_expressions(child)):
                yield Site(node, field, index, replacement, lines, function)
            if not isinstance(child, ast.Raise) and not _is_negative_number(child):
                yield from _sites(child, function, lines)


def _is_left_alone(node: ast.AST) -> bool:
    typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    strict = isinstance(node, ast.keyword) and node.arg == "strict"
    return typing or text or strict or isinstance(node, ast.Assert | ast.JoinedStr)


def _is_negative_number(node: ast.AST) -> bool:
    """−1, say, which becomes 1 and not −2 as well."""
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    return negative and isinstance(node.operand, ast.Constant)


def _head(statement: ast.stmt) -> tuple[int, int]:
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno
    return statement.lineno, max(statement.lineno, last)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """What a statement becomes: nothing at all, its opposite."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.YieldFrom)
    is_change = isinstance(node, ast.Assign) and not isinstance(
        node.targets[0], ast.Name | ast.Tuple
    )
    if is_call or is_change or isinstance(node, ast.AugAssign | ast.Raise | ast.Delete):
        yield ast.Pass()
    if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
    if isinstance(node, ast.Continue):
        yield ast.Break()
    if isinstance(node, ast.Break):
        yield ast.Continue()


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """What an expression becomes."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            other = COMPARISONS[type(operator)]()
            yield ast.Compare(node.left, [other], node.comparators)
        case ast.BinOp() if type(node.op) in OPERATORS and not _is_text(node):
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.IfExp():
            yield ast.IfExp(node.test, node.orelse, node.body)
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float() as value):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Call(args=[first, second, *rest]) if not _is_unswapped(node):
            yield ast.Call(node.func, [second, first, *rest], node.keywords)
        case ast.If() | ast.While():
            yield _negated(node)


def _negated(node: ast.If | ast.While) -> ast.If | ast.While:
    kind = type(node)
    return kind(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def _is_text(node: ast.BinOp) -> bool:
    """Text that is joined or formatted, which has no other operator."""
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) or _is_string(side) for side in sides)


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_unswapped(node: ast.Call) -> bool:
    starred = any(isinstance(argument, ast.Starred) for argument in node.args[:2])
    same = ast.dump(node.args[0]) == ast.dump(node.args[1])
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    return starred or same or name in UNSWAPPED
