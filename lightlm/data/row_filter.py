"""A `--filter` on the rows of a Parquet file, within Arrow."""

import pyarrow
import pyarrow.parquet as parquet

from lightlm.data.filters import Filter
from lightlm.data.texts import BadRecord, FilteredOut


class RowFilter:
    """A filter on the rows of one file."""

    def __init__(self, where: str, file: parquet.ParquetFile, chosen: Filter) -> None:
        """`where` names the file in an error. Raises DataError where it lacks a column, or it cannot be compared so."""
        self.columns = chosen.arrow_columns(file.schema_arrow)
        self._expression = chosen.arrow(file.schema_arrow, where)
        self._metadata = file.metadata

    def passes_over(self, group: int) -> bool:
        """Whether the statistics of a row group say that none of its rows stays."""
        from pyarrow import dataset

        footer = pyarrow.BufferOutputStream()  # has all that is asked for, wherever the file itself is
        self._metadata.write_metadata_file(footer)
        source = pyarrow.BufferReader(footer.getvalue())
        fragment = dataset.ParquetFileFormat().make_fragment(source, row_groups=[group])
        return not fragment.subset(filter=self._expression).row_groups

    def rows(self, batch: pyarrow.RecordBatch, bad: BadRecord) -> pyarrow.RecordBatch:
        """The rows that stay; `bad` is told how many do not."""
        table = pyarrow.Table.from_batches([batch]).filter(self._expression)
        if table.num_rows == batch.num_rows:
            return batch
        bad(FilteredOut(batch.num_rows - table.num_rows))
        return next(iter(table.combine_chunks().to_batches()), batch.slice(0, 0))
