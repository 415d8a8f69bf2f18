"""A `--filter` on the rows of a Parquet file, within Arrow."""

import pyarrow

from lightlm.data.readers.texts import BadRecord, FilteredOut
from lightlm.data.select.filters import Filter


class RowFilter:
    """A filter on the rows of one file."""

    def __init__(self, where: str, schema: pyarrow.Schema, chosen: Filter) -> None:
        """`where` names the file in an error. Raises DataError where it lacks a column, or it cannot be compared so."""
        self.columns = chosen.arrow_columns(schema)
        self._expression = chosen.arrow(schema, where)

    def rows(self, batch: pyarrow.RecordBatch, bad: BadRecord) -> pyarrow.RecordBatch:
        """The rows that stay; `bad` is told how many do not."""
        table = pyarrow.Table.from_batches([batch]).filter(self._expression)
        if table.num_rows == batch.num_rows:
            return batch
        bad(FilteredOut(batch.num_rows - table.num_rows))
        return next(iter(table.combine_chunks().to_batches()), batch.slice(0, 0))
