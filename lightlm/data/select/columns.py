"""A column named by a user: by its name, or else along its dots into nested fields."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


def field_of(record: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column of a record; a field of null is null. Raises KeyError where there is none."""
    value: Any = record
    for part in (column,) if column in record else column.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(column)
        value = value[part]
    return value


def has_field(record: Mapping[str, Any], column: str) -> bool:
    """Return whether `field_of` finds a column."""
    try:
        field_of(record, column)
    except KeyError:
        return False
    return True


def arrow_field(column: str, schema: "pyarrow.Schema") -> tuple[tuple[str, ...], Any]:
    """Return the names that lead to a column of an Arrow schema, from the outermost, and its type.

    Raises KeyError where there is none.
    """
    from pyarrow import types

    first, *fields = path = (column,) if column in schema.names else tuple(column.split("."))
    if first not in schema.names:
        raise KeyError(column)
    kind: Any = schema.types[schema.names.index(first)]
    for field in fields:
        index = kind.get_field_index(field) if types.is_struct(kind) else -1
        if index < 0:
            raise KeyError(column)
        kind = kind.field(index).type
    return path, kind
