"""First-order mutants: every small change that a rule makes in the text of the reference's ops and sampler.

Operators and comparisons are exchanged, numbers are moved by a little, terms, negations, named arguments and
statements are left out, conditions are held true or false. The sampler is core's own text, which the clone
then uses in place of the sampler that it is given.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from conformance.zoo.clone import Edit, edited, sources
from core.contract.errors import ConfigError

SAMPLER = "sampler"
_SAMPLER_TEXT = "core.sampling.reference"
_OWN_SAMPLER: tuple[Edit, ...] = (
    ("compiler", "self._sampler = request.reference_sampler", "self._sampler = sample"),
    (
        "compiler",
        "from core.contract.batch import Step, StepBatch",
        "from backends.cpu_reference.sampler import sample\nfrom core.contract.batch import Step, StepBatch",
    ),
)

FAMILIES = {
    "attention": r"L2/(attend|attend_latent|norm_rope_attend|norm_rope_attend_latent)/"
    r"|L2/(addressing|extremes|isolation|metamorphic)/",
    "state": r"L2/(short_conv|state_scan|checkpoints)/",
    SAMPLER: r"L2/sampling/|L5/engine/(seeded|identity)-llama",
}
"""Modules that are mutated, and the checks that must find what was changed in them."""
UNUSED = {SAMPLER: ("gumbel",)}
"""Functions that the clone has, but never calls."""

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_NAMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "argmax": "argmin",
}
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Continue, ast.Raise)


@dataclass(frozen=True)
class Mutant:
    """A module's text with one change.

    Attributes:
        module: of the clone. function: in which the change is, "" = at the module's level. line: counted
            from 1. before, after: the changed lines, each without its indentation.
        text: the whole module.
    """

    module: str
    function: str
    line: int
    before: str
    after: str
    text: str = field(repr=False, compare=False)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is known by, wherever its line is."""
        return self.module, self.function, self.before, self.after


@dataclass(frozen=True)
class Equivalent:
    """A mutant that no check can find, and why: it gives what the original gives, or something as right."""

    module: str
    function: str
    before: str
    after: str
    reason: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """As `Mutant.key`."""
        return self.module, self.function, self.before, self.after


def texts() -> dict[str, str]:
    """Of the clone without a change, which samples by a module of its own."""
    path = import_module(_SAMPLER_TEXT).__file__ or ""
    return {**edited(sources(), _OWN_SAMPLER), SAMPLER: Path(path).read_text(encoding="utf-8")}


def mutants(modules: Sequence[str] = tuple(FAMILIES)) -> list[Mutant]:
    """Every mutant of some modules, in the order of their texts.

    Raises:
        ConfigError: a module is not among those that are mutated.
    """
    unknown = [module for module in modules if module not in FAMILIES]
    if unknown:
        raise ConfigError(f"module {unknown[0]!r} is not mutated; {', '.join(FAMILIES)} are")
    whole = texts()
    return [mutant for module in modules for mutant in of_text(module, whole[module])]


def equivalents() -> tuple[Equivalent, ...]:
    """The mutants that were looked at and cannot be found."""
    text = Path(__file__).with_name("equivalent.toml").read_text(encoding="utf-8")
    return tuple(Equivalent(**entry) for entry in tomllib.loads(text).get("equivalent", ()))


def of_text(module: str, text: str) -> list[Mutant]:
    """Every mutant of a text; those that come to the same program are given once."""
    tree = ast.parse(text)
    seen = {ast.dump(tree)}
    found = []
    for function, node, new in _changes(tree, UNUSED.get(module, ())):
        mutant = _spliced(module, function, text, node, new)
        dump = ast.dump(ast.parse(mutant.text))
        if dump not in seen:
            seen.add(dump)
            found.append(mutant)
    return sorted(found, key=lambda mutant: mutant.line)


Node = ast.expr | ast.stmt


def _changes(tree: ast.Module, unused: Sequence[str]) -> Iterator[tuple[str, Node, str]]:
    """The function, a node, and the text in its place."""
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            if statement.name not in unused:
                for node in _within(statement):
                    for new in _replacements(node):
                        yield statement.name, node, new
        elif isinstance(statement, ast.Assign) and _is_constant(statement):
            for part in ast.walk(statement.value):
                if isinstance(part, ast.expr):
                    for new in _replacements(part):
                        yield "", part, new


def _is_constant(statement: ast.Assign) -> bool:
    return all(
        name.id.isupper()
        for target in statement.targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    )


def _within(function: ast.FunctionDef) -> Iterator[Node]:
    """Nodes of a function that run: no annotations, no docstring, no texts of errors."""
    waiting: list[ast.AST] = [*function.args.defaults, *function.body]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.expr | ast.stmt):
            yield node
        if isinstance(node, ast.JoinedStr | ast.Raise):
            continue
        skipped = node.annotation if isinstance(node, ast.AnnAssign) else None
        waiting += [child for child in ast.iter_child_nodes(node) if child is not skipped]


def _replacements(node: Node) -> Iterator[str]:
    if isinstance(node, ast.expr):
        for new in _expressions(node):
            yield f"({ast.unparse(new)})"
        return
    if isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        changed = deepcopy(node)
        changed.op = _OPERATORS[type(node.op)]()
        yield ast.unparse(changed)
    if isinstance(node, _SIMPLE):
        yield "pass"
    if isinstance(node, ast.If):
        for value in (True, False):
            changed_if = deepcopy(node)
            changed_if.test = ast.Constant(value)
            yield ast.unparse(changed_if)


def _expressions(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield from _of_operation(node)
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in _COMPARISONS:
                ops = [*node.ops[:i], _COMPARISONS[type(op)](), *node.ops[i + 1 :]]
                yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from _of_number(node)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_operation(node: ast.BinOp) -> Iterator[ast.expr]:
    if type(node.op) in _OPERATORS:
        yield ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right)
    if isinstance(node.op, ast.Add | ast.Sub):
        yield node.left
        yield node.right if isinstance(node.op, ast.Add) else ast.UnaryOp(ast.USub(), node.right)


def _of_number(node: ast.Constant) -> Iterator[ast.expr]:
    if type(node.value) is int:
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif type(node.value) is float:
        yield ast.Constant(node.value * 1.01 if node.value else 0.01)


def _of_call(node: ast.Call) -> Iterator[ast.expr]:
    function = node.func
    if isinstance(function, ast.Name) and function.id in _NAMES:
        yield ast.Call(ast.Name(_NAMES[function.id]), node.args, node.keywords)
    elif isinstance(function, ast.Attribute) and function.attr in _NAMES:
        yield ast.Call(ast.Attribute(function.value, _NAMES[function.attr]), node.args, node.keywords)
    for i in range(len(node.keywords)):
        yield ast.Call(function, node.args, [*node.keywords[:i], *node.keywords[i + 1 :]])


def _spliced(module: str, function: str, text: str, node: Node, new: str) -> Mutant:
    """The text with `new` in the node's place. A statement of several lines keeps its indentation."""
    lines = text.encode().splitlines(keepends=True)
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    head, tail = lines[first][: node.col_offset], lines[last][node.end_col_offset or 0 :]
    indent = head.decode() if isinstance(node, ast.stmt) else ""
    put = new.replace("\n", f"\n{indent}").encode()
    changed = head + put + tail
    before, after = b"".join(lines[first : last + 1]), changed
    if isinstance(node, ast.If):
        before, after = lines[first], changed.splitlines()[0]
    return Mutant(
        module,
        function,
        node.lineno,
        _joined(before.decode()),
        _joined(after.decode()),
        b"".join([*lines[:first], changed, *lines[last + 1 :]]).decode(),
    )


def _joined(text: str) -> str:
    return " ".join(text.split())
