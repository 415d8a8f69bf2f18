"""`--filter "score >= 3 and language in ['en', 'de']"`: a small language over a record's columns.

    expression  = conjunction {"or" conjunction}
    conjunction = negation {"and" negation}
    negation    = "not" negation | "(" expression ")" | comparison
    comparison  = column ("==" | "!=" | "<" | "<=" | ">" | ">=") literal
                | column ["not"] "in" "[" literal {"," literal} "]"
                | column "is" ["not"] "null"
    column      = a name, with dots for a field of a field (metadata.score), in `backticks` if it is not plain
    literal     = a number, 'text' or "text", true, false

A comparison with null is neither true nor false, as in SQL, and a record stays where the whole is true. The same
expression filters a Parquet file within Arrow, where row groups are passed over by their statistics, and a mapping in
Python; nothing of it is ever evaluated as code.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lightlm.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.compute

Literal = str | int | float | bool

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>-?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
      | (?P<operator>==|!=|<=|>=|<|>|[()\[\],])
      | (?P<word>[^\W\d]\w*(?:\.[^\W\d]\w*)*)
      | `(?P<quoted>[^`]+)`
    )""",
    re.VERBOSE,
)
_KEYWORDS = ("and", "or", "not", "in", "is", "null", "true", "false")
_EXAMPLE = "for example --filter \"score >= 3 and language in ['en', 'de']\""


class Filter:
    """A parsed `--filter`; it can be pickled, and two of the same text are equal."""

    def __init__(self, text: str) -> None:
        """Raises UsageError where `text` is no such expression, pointing at the place."""
        self.text = text
        self._root = _Parser(text).parse()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def columns(self) -> list[str]:
        """The columns it names, each once, in their order."""
        return list(dict.fromkeys(self._root.columns()))

    def keeps(self, record: Mapping[str, Any], where: Callable[[], str]) -> bool:
        """Whether the record stays.

        Raises DataError where it lacks a column or holds something that cannot be compared; `where()` names it.
        """
        try:
            return self._root.test(record) is True
        except _MismatchError as error:
            raise DataError(f'{where()}: --filter "{self.text}": {error}') from None

    def arrow(self, schema: "pyarrow.Schema", where: str) -> "pyarrow.compute.Expression":
        """The expression for pyarrow, checked against the columns of a file.

        Raises DataError, with `where`, for a column that is not there or cannot be compared so.
        """
        import pyarrow

        try:
            expression = self._root.arrow(schema)
            schema.empty_table().filter(expression)
        except (_MismatchError, pyarrow.ArrowException, OverflowError) as error:
            raise DataError(f'{where}: --filter "{self.text}": {error}') from None
        return expression

    def arrow_columns(self, schema: "pyarrow.Schema") -> list[str]:
        """The file's columns that must be read to evaluate it; the first part of a dotted name."""
        return list(dict.fromkeys(_arrow_path(column, schema)[0] for column in self.columns))


class _MismatchError(Exception):
    """A record or a file does not fit the expression."""


class _Node(Protocol):
    def columns(self) -> Iterator[str]:
        """The columns named below, in their order."""

    def test(self, record: Mapping[str, Any]) -> bool | None:
        """True, False, or None where a null leaves it open."""

    def arrow(self, schema: "pyarrow.Schema") -> "pyarrow.compute.Expression":
        """The same for pyarrow."""


@dataclass(frozen=True)
class _Comparison:
    column: str
    operator: str
    literal: Literal

    def columns(self) -> Iterator[str]:
        yield self.column

    def test(self, record: Mapping[str, Any]) -> bool | None:
        value = _value(record, self.column)
        if value is None:
            return None
        if _kind(value) != _kind(self.literal):
            raise _MismatchError(f"the column {self.column!r} holds {value!r}, to be compared with {self.literal!r}")
        return bool(_OPERATORS[self.operator](value, self.literal))

    def arrow(self, schema: "pyarrow.Schema") -> "pyarrow.compute.Expression":
        import pyarrow.compute

        path = _arrow_path(self.column, schema)
        kind, wanted = _arrow_kind(path, schema), _kind(self.literal)
        if kind != wanted:
            raise _MismatchError(f"the column {self.column!r} holds {kind}, to be compared with {self.literal!r}")
        return _OPERATORS[self.operator](pyarrow.compute.field(*path), self.literal)


@dataclass(frozen=True)
class _IsNull:
    column: str

    def columns(self) -> Iterator[str]:
        yield self.column

    def test(self, record: Mapping[str, Any]) -> bool | None:
        return _value(record, self.column) is None

    def arrow(self, schema: "pyarrow.Schema") -> "pyarrow.compute.Expression":
        import pyarrow.compute

        return pyarrow.compute.field(*_arrow_path(self.column, schema)).is_null()


@dataclass(frozen=True)
class _Not:
    operand: _Node

    def columns(self) -> Iterator[str]:
        yield from self.operand.columns()

    def test(self, record: Mapping[str, Any]) -> bool | None:
        result = self.operand.test(record)
        return None if result is None else not result

    def arrow(self, schema: "pyarrow.Schema") -> "pyarrow.compute.Expression":
        return ~self.operand.arrow(schema)


@dataclass(frozen=True)
class _Junction:
    """`and` (decided by the first False) or `or` (by the first True)."""

    operands: tuple[_Node, ...]
    decisive: bool

    def columns(self) -> Iterator[str]:
        for operand in self.operands:
            yield from operand.columns()

    def test(self, record: Mapping[str, Any]) -> bool | None:
        # Every operand is tested, so that a mistyped column is found in the first record.
        results = [operand.test(record) for operand in self.operands]
        if self.decisive in results:
            return self.decisive
        return None if None in results else not self.decisive

    def arrow(self, schema: "pyarrow.Schema") -> "pyarrow.compute.Expression":
        first, *others = [operand.arrow(schema) for operand in self.operands]
        for other in others:
            first = first | other if self.decisive else first & other
        return first


def _value(record: Mapping[str, Any], column: str) -> Any:
    """A column by its name, or along its dots; a field of null is null."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            raise _missing(column, list(record))
        value = value[part]
    return value


def _arrow_path(column: str, schema: "pyarrow.Schema") -> tuple[str, ...]:
    """The names that lead to a column, from the outermost."""
    import pyarrow

    if column in schema.names:
        return (column,)
    first, *fields = path = tuple(column.split("."))
    kind: Any = schema.field(first).type if first in schema.names else None
    for field in fields:
        index = kind.get_field_index(field) if kind is not None and pyarrow.types.is_struct(kind) else -1
        kind = kind.field(index).type if index >= 0 else None
    if kind is None:
        raise _missing(column, schema.names)
    return path


def _arrow_kind(path: tuple[str, ...], schema: "pyarrow.Schema") -> str:
    """`number`, `text` or `true/false`; else Arrow's name for the type."""
    from pyarrow import types

    kind = schema.field(path[0]).type
    for field in path[1:]:
        kind = kind.field(field).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_boolean(kind):
        return "true/false"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return "number"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    return str(kind)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else type(value).__name__


def _missing(column: str, columns: list[str]) -> _MismatchError:
    return _MismatchError(f"no column {column!r}; there are: {', '.join(columns) or 'none'}")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int


class _Parser:
    """Recursive descent over the grammar above."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._split())
        self._next = 0

    def parse(self) -> _Node:
        node = self._expression()
        if self._peek().kind != "end":
            raise self._error("'and', 'or' or the end")
        return node

    def _split(self) -> Iterator[_Token]:
        position, text = 0, self._text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error("a column, a comparison or a value", len(text) - len(text[position:].lstrip()))
            kind = str(match.lastgroup)
            word, start = match[kind], match.start(kind)
            if kind == "word" and word.lower() in _KEYWORDS:
                kind, word = "keyword", word.lower()
            yield _Token(kind, word, start)
            position = match.end()
        yield _Token("end", "", len(text))

    def _expression(self) -> _Node:
        return self._junction("or", lambda: self._junction("and", self._negation, decisive=False), decisive=True)

    def _junction(self, word: str, operand: Callable[[], _Node], *, decisive: bool) -> _Node:
        operands = [operand()]
        while self._accept(word):
            operands.append(operand())
        return operands[0] if len(operands) == 1 else _Junction(tuple(operands), decisive)

    def _negation(self) -> _Node:
        if self._accept("not"):
            return _Not(self._negation())
        if self._accept("("):
            node = self._expression()
            self._expect(")")
            return node
        return self._comparison()

    def _comparison(self) -> _Node:
        token = self._peek()
        if token.kind not in {"word", "quoted"}:
            raise self._error("a column's name")
        self._next += 1
        if self._accept("is"):
            negated = self._accept("not")
            self._expect("null")
            return _Not(_IsNull(token.text)) if negated else _IsNull(token.text)
        negated = self._accept("not")
        if negated or self._peek().text == "in":
            self._expect("in")
            options = tuple(_Comparison(token.text, "==", literal) for literal in self._list())
            membership: _Node = options[0] if len(options) == 1 else _Junction(options, decisive=True)
            return _Not(membership) if negated else membership
        if self._peek().text not in _OPERATORS or self._peek().kind != "operator":
            raise self._error(f"{', '.join(_OPERATORS)}, 'in' or 'is' after the column {token.text!r}")
        symbol = self._take().text
        return _Comparison(token.text, symbol, self._literal())

    def _list(self) -> Iterator[Literal]:
        self._expect("[")
        yield self._literal()
        while self._accept(","):
            yield self._literal()
        self._expect("]")

    def _literal(self) -> Literal:
        token = self._take()
        if token.kind == "text":
            return re.sub(r"\\(.)", r"\1", token.text[1:-1])
        if token.kind == "number":
            number = float(token.text) if re.search(r"[.eE]", token.text) else int(token.text)
            if abs(number) < 2**63:
                return number
        if token.kind == "keyword" and token.text in {"true", "false"}:
            return token.text == "true"
        raise self._error("a number, a quoted text, true or false", token.start)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek()
        self._next += token.kind != "end"
        return token

    def _accept(self, text: str) -> bool:
        token = self._peek()
        found = token.kind in {"keyword", "operator"} and token.text == text
        self._next += found
        return found

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._error(repr(text))

    def _error(self, expected: str, position: int | None = None) -> UsageError:
        start = self._peek().start if position is None else position
        place = f"at: {self._text[start : start + 20]}" if start < len(self._text.rstrip()) else "at its end"
        return UsageError(f'--filter "{self._text}": {expected} was expected {place} ({_EXAMPLE})')
