"""`--filter "score >= 3 and language in ['en', 'de']"`: an expression over the columns of a record.

    not, and, or, parentheses                  bind in this order
    column == != < <= > >= literal
    column [not] in [literal, ...]
    column is [not] null
    column    a name; dots lead to nested fields (metadata.score); `backticks` quote any other name
    literal   a number, 'text' or "text", true, false

Python's `ast` parses the expression, and only these forms pass; nothing is ever evaluated as code. Arrow evaluates it
for Parquet files, and `Filter.keeps` for other records. As in SQL, a comparison with null is neither true nor false,
and a record stays where the whole expression is true.
"""

import ast
import functools
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightlm.data.select.columns import arrow_field, field_of, has_field
from lightlm.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.compute

FILTERED = "filtered"  # the cause under which the manifest counts the records that a filter leaves out

Comparison = Callable[[Any, Any], Any]  # of the `operator` module
Node = tuple[Any, ...]
"""(comparison, column, literal), ("null", column), ("not", node), ("and", nodes) or ("or", nodes)."""

_OPERATORS: dict[type[ast.cmpop], Comparison] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_KEYWORDS = {"null": "None", "none": "None", "true": "True", "false": "False"}
_KEYWORDS |= {word: word for word in ("and", "or", "not", "in", "is")}
_TOKEN = re.compile(
    r"""(?P<literal>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\.?\d[\w.]*)
      | (?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*|`[^`]+`)
      | (?P<space>\s)
      | (?P<comment>\#)""",
    re.VERBOSE | re.DOTALL,
)
_LARGEST = 2**63 - 1
_EXAMPLE = "for example --filter \"score >= 3 and language in ['en', 'de']\""


@dataclass(frozen=True)
class Filter:
    """A parsed `--filter`. It can be pickled. Raises UsageError for any other text; the message quotes the place."""

    text: str

    def __post_init__(self) -> None:
        _ = self._parsed

    @functools.cached_property
    def _parsed(self) -> tuple[Node, dict[str, str | None]]:
        parser = _Parser(self.text.strip())
        return parser.parse(), parser.kinds

    @property
    def columns(self) -> list[str]:
        """The columns that the expression names, each once, in their order."""
        return list(self._parsed[1])

    @property
    def kinds(self) -> dict[str, str | None]:
        """What each column is compared with: "a number", "text", "true or false"; None for null."""
        return self._parsed[1]

    def arrow(self, schema: "pyarrow.Schema", where: str) -> "pyarrow.compute.Expression":
        """Return the expression for tables of this schema.

        Raises DataError, with `where`, for a missing column or one that cannot be compared so.
        """
        import pyarrow
        import pyarrow.compute

        root, kinds = self._parsed
        fields = {}
        try:
            for column, wanted in kinds.items():
                path, kind = _arrow_column(column, schema)
                if wanted not in {None, kind}:
                    raise _mismatch(column, kind, wanted)
                fields[column] = pyarrow.compute.field(*path)
            expression = _arrow_expression(root, fields)
            schema.empty_table().filter(expression)
        except (_MismatchError, pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise DataError(f'{where}: --filter "{self.text}": {error}') from None
        return expression

    def arrow_columns(self, schema: "pyarrow.Schema") -> list[str]:
        """Return the top-level columns to read for the expression: the first part of each dotted name."""
        return list(dict.fromkeys(_arrow_column(column, schema)[0][0] for column in self.columns))

    def keeps(self, record: Mapping[str, Any], where: Callable[[], str], *, sparse: bool = False) -> bool:
        """Return whether the expression is true of a record; in a `sparse` one, a column that it lacks is null.

        Raises DataError where it lacks a column or holds a value of another kind; `where()` names the record.
        """
        root, kinds = self._parsed
        try:
            values = {
                column: None if sparse and not has_field(record, column) else _value(record, column, kind)
                for column, kind in kinds.items()
            }
        except _MismatchError as error:
            raise DataError(f'{where()}: --filter "{self.text}": {error}') from None
        return _truth(root, values) is True

    def lacking(self, record: Mapping[str, Any]) -> list[str]:
        """Return the columns of the expression that a record lacks."""
        return [column for column in self.columns if not has_field(record, column)]

    def cause(self, record: Mapping[str, Any]) -> str:
        """Return the cause under which a record is counted that is left out; it names a column that is not there."""
        lacking = self.lacking(record)
        return " ".join([FILTERED, ", ".join(map(without, lacking))]) if lacking else FILTERED


def without(column: str) -> str:
    """Return the cause under which a record is counted that stays, although it lacks a column."""
    return f"without {column!r}"


def matching_rows(table: "pyarrow.Table", expression: "pyarrow.compute.Expression") -> np.ndarray:
    """Return the numbers of the rows for which `Filter.arrow`'s expression is true: int64, ascending."""
    numbered = table.append_column("", [np.arange(table.num_rows)])
    return numbered.filter(expression).column(table.num_columns).to_numpy()


class _MismatchError(Exception):
    """A record or a file does not fit the expression."""


def _mismatch(column: str, found: object, wanted: str | None) -> _MismatchError:
    return _MismatchError(f"the column {column!r} holds {found}, which cannot be compared with {wanted}")


def _missing(column: str, columns: list[str]) -> _MismatchError:
    return _MismatchError(f"no column {column!r}; there are: {', '.join(columns) or 'none'}")


class _Parser:
    """Turns the text into a tree; `kinds` are those of the literals that a column is compared with, None for `null`."""

    def __init__(self, text: str) -> None:
        self._text = text
        # Every replacement keeps the length, so that a place in one is a place in the other.
        self._python = _TOKEN.sub(_as_python, text)
        self.kinds: dict[str, str | None] = {}

    def parse(self) -> Node:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # an unknown escape such as '\d'
                return self._node(ast.parse(self._python, mode="eval").body)
        except SyntaxError as error:
            place = error.offset - 1 if error.offset else len(self._python)  # 0 is the end
            equals = "'=='" in error.msg or self._python[place : place + 1] == "="
            raise self._error("write == to compare" if equals else error.msg.partition(".")[0], place) from None
        except (ValueError, RecursionError, MemoryError) as error:  # a null byte; thousands of parentheses
            raise self._error(str(error) or "too deeply nested", 0) from None

    def _node(self, node: ast.expr) -> Node:
        match node:
            case ast.BoolOp(op=junction, values=operands):
                word = "or" if isinstance(junction, ast.Or) else "and"
                return word, [self._node(operand) for operand in operands]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return "not", self._node(operand)
            case ast.Compare(left=ast.Name() as name, ops=[comparison], comparators=[right]):
                return self._comparison(self._source(name).strip("`"), comparison, right)
            case ast.Compare(left=left) if not isinstance(left, ast.Name):
                raise self._expected("a column's name", left)
            case ast.Name():
                raise self._expected(f"a comparison of the column {self._source(node)!r}", node)
        raise self._expected("one comparison of a column with a value", node)

    def _comparison(self, column: str, comparison: ast.cmpop, right: ast.expr) -> Node:
        match comparison, right:
            case ((ast.Is() | ast.IsNot()), ast.Constant(value=None)):
                self.kinds.setdefault(column, None)
                found: Node = ("null", column)
            case ((ast.Is() | ast.IsNot()), _):
                raise self._expected("null after 'is'", right)
            case ((ast.In() | ast.NotIn()), ast.List(elts=[_, *_] as elements) | ast.Tuple(elts=[_, *_] as elements)):
                found = ("or", [self._compared(column, operator.eq, element) for element in elements])
            case ((ast.In() | ast.NotIn()), _):
                raise self._expected("a list of values such as ['en', 'de']", right)
            case _:
                found = self._compared(column, _OPERATORS[type(comparison)], right)
        return ("not", found) if isinstance(comparison, ast.IsNot | ast.NotIn) else found

    def _compared(self, column: str, compare: Comparison, node: ast.expr) -> Node:
        try:
            literal = ast.literal_eval(node)
        except (TypeError, ValueError):
            literal = None
        if not isinstance(literal, str) and not (isinstance(literal, int | float) and abs(literal) <= _LARGEST):
            raise self._expected("a number, a quoted text, true or false", node)
        kind = _kind(literal)
        if self.kinds.get(column) not in {None, kind}:
            raise self._expected(f"{self.kinds[column]}, as {column!r} is compared with elsewhere,", node)
        self.kinds[column] = kind
        return compare, column, literal

    def _source(self, node: ast.expr) -> str:
        return self._text[self._place(node.col_offset) : self._place(node.end_col_offset or 0)]

    def _place(self, offset: int) -> int:
        """Return the index in the text of an offset that `ast` gives in UTF-8 bytes."""
        return len(self._python.encode()[:offset].decode())

    def _expected(self, what: str, node: ast.expr) -> UsageError:
        return self._error(f"{what} was expected", self._place(node.col_offset))

    def _error(self, problem: str, place: int) -> UsageError:
        at = f"at: {self._text[place : place + 20]}" if place < len(self._text) else "at its end"
        return UsageError(f'--filter "{self._text}": {problem} {at} ({_EXAMPLE})')


def _as_python(token: re.Match[str]) -> str:
    """Return a token in Python's spelling, of the same length; columns become `____`, so that any name is allowed."""
    match token.lastgroup:
        case "name":
            return _KEYWORDS.get(token[0].lower(), "_" * len(token[0]))
        case "space":
            return " "
        case "comment":
            return "?"
    return token[0]


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else type(value).__name__


def _value(record: Mapping[str, Any], column: str, kind: str | None) -> Any:
    """Return the value of a column, by its name or along its dots; a field of null is null."""
    try:
        value = field_of(record, column)
    except KeyError:
        raise _missing(column, list(record)) from None
    if value is not None and kind not in {None, _kind(value)}:
        raise _mismatch(column, repr(value), kind)
    return value


def _truth(node: Node, values: Mapping[str, Any]) -> bool | None:
    """Return True, False, or None where nulls leave it open."""
    match node:
        case "null", column:
            return values[column] is None
        case "not", operand:
            found = _truth(operand, values)
            return None if found is None else not found
        case ("and" | "or") as word, operands:
            truths = {_truth(operand, values) for operand in operands}
            return (word == "or") if (word == "or") in truths else None if None in truths else word == "and"
    compare, column, literal = node
    return None if values[column] is None else compare(values[column], literal)


def _arrow_expression(node: Node, fields: Mapping[str, Any]) -> Any:
    match node:
        case "null", column:
            return fields[column].is_null()
        case "not", operand:
            return ~_arrow_expression(operand, fields)
        case ("and" | "or") as word, operands:
            combine = operator.or_ if word == "or" else operator.and_
            return functools.reduce(combine, [_arrow_expression(operand, fields) for operand in operands])
    compare, column, literal = node
    return compare(fields[column], literal)


def _arrow_column(column: str, schema: "pyarrow.Schema") -> tuple[tuple[str, ...], str]:
    """Return the names that lead to a column, from the outermost, and its kind: see `_kind`; else Arrow's type."""
    from pyarrow import types

    try:
        path, kind = arrow_field(column, schema)
    except KeyError:
        raise _missing(column, schema.names) from None
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_boolean(kind):
        return path, "true or false"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return path, "a number"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return path, "text"
    return path, str(kind)
