"""The environment in which chat templates run: Jinja's sandbox, with bounds on what a template computes.

Jinja's sandbox keeps a template from Python's internals. It does not keep it from loops without end, or from a text
that fills the memory. Here every round of a loop and every call of a macro is a step, and what operators make has a
size. A filter can still make a text of gigabytes; one that the memory does not hold is an error.
"""

from contextvars import ContextVar
from typing import Any

from jinja2 import Template, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # of one rendering; a template takes a few per message
MAX_SIZE = 100_000_000  # characters of a text, elements of a list
_MAX_BITS = 10_000  # of a number

_steps: ContextVar[int] = ContextVar("steps")  # that the rendering in this thread has taken


def render_bounded(template: Template, **variables: Any) -> str:
    """Return what a template of a `BoundedEnvironment` writes. Raises SecurityError where it goes past a bound."""
    token = _steps.set(0)
    try:
        pieces, size = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            _check_size(size := size + len(piece))
        return "".join(pieces)
    finally:
        _steps.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox in which steps are counted, and the operators that make large things know their size before."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def step(self) -> str:
        """Count a round of a loop or a call of a macro."""
        taken = _steps.get() + 1
        _steps.set(taken)
        if taken > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        return ""

    def joined(self, *values: Any) -> str:
        """Return what `~` makes of its operands."""
        texts = [str(value) for value in values]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator to operands whose result has a bounded size."""
        if operator == "+":
            _check_size(_size(left) + _size(right))
        elif operator == "*":
            _check_size(max(_size(left) * _times(right), _size(right) * _times(left)))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise SecurityError(f"it computes a number of more than {_MAX_BITS:,} bits")
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        _Counted(self).visit(source)  # changes it in place; a template is neither a loop nor an expression
        return super()._generate(source, *arguments, **options)


class _Counted(NodeTransformer):
    """Rewrites a template so that each round of a loop and call of a macro is a step, and `~` is bounded."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.Concat):
            return self._call("joined", node.nodes, node.lineno)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            node.body.insert(0, nodes.ExprStmt(self._call("step", [], node.lineno), lineno=node.lineno))
        return node

    def _call(self, method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
        """A call of a method of the environment, which a template cannot replace by a variable."""
        called = nodes.EnvironmentAttribute(method)
        call = nodes.Call(called, arguments, [], None, None, lineno=line)
        call.set_environment(self._environment)
        return call


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _times(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it makes a text or list of {size:,} elements, more than {MAX_SIZE:,}")
