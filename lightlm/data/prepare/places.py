"""Where a piece's documents stand among its tokens, as far as its record must know."""

import numpy as np

from lightlm.data.prepare.encoded_block import Record
from lightlm.data.prepare.splitting import KEYS, Candidate


class Places:
    """Counts documents by split in a piece's record, and notes what `splitting.Holder` must know of them."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._least = KEYS  # the smallest key so far

    def add(self, val: np.ndarray, lengths: np.ndarray, keys: np.ndarray, text_bytes: np.ndarray) -> None:
        """The next documents, whose tokens are about to be added: arrays of shape (documents,)."""
        record = self._record
        first = int(val.argmax()) if val.any() else len(val)
        if record.border is None:
            starts = record.tokens["train"] + np.cumsum(lengths) - lengths
            self._note_minima(starts[:first], lengths[:first], keys[:first], text_bytes[:first])
            if first < len(val):
                record.border = int(starts[first])
        record.documents += len(val)
        record.text_bytes["val"] += int(text_bytes[val].sum())
        record.text_bytes["train"] += int(text_bytes[~val].sum())

    def _note_minima(self, starts: np.ndarray, lengths: np.ndarray, keys: np.ndarray, text_bytes: np.ndarray) -> None:
        """Note the documents whose keys are below all before them in the block."""
        if not len(keys):
            return
        before = np.minimum.accumulate(np.concatenate([[self._least], keys[:-1]]))
        self._record.minima += [
            Candidate(
                block=self._record.number,
                key=int(keys[i]),
                start=int(starts[i]),
                tokens=int(lengths[i]),
                text_bytes=int(text_bytes[i]),
            )
            for i in np.flatnonzero(keys < before)
        ]
        self._least = min(self._least, int(keys.min()))
