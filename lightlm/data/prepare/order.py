"""The order of the train documents before the first validation document, as LightLM has always written it.

In the order of the source, each of them whose hash is below those of all before it moves back to the place of the next
such document, the last one to the place of the first validation document. The order itself has no purpose; keeping it
keeps data folders byte-identical to those of earlier versions.
"""

from collections.abc import Iterator, Sequence

from lightlm.data.prepare.encoded_block import EncodedBlock

LEADING = 1_000  # documents; if none of them is for validation, the order is that of the source

Span = tuple[int, int, int]
"""(block, first token, end) among the train tokens of a block."""


def leads(blocks: Sequence[EncodedBlock]) -> bool:
    """Return whether the first validation document may come after these blocks, the first of a corpus."""
    return not blocks[-1].tokens["val"] and sum(len(block.leading) for block in blocks) < LEADING


def train_order(blocks: Sequence[EncodedBlock]) -> Iterator[Span]:
    """Yield the train tokens of a corpus's first blocks, of which the last has the first validation document."""
    moved: tuple[int, Span] | None = None  # the hash and tokens of the document that moves
    for block in blocks:
        start = 0
        for key, tokens in block.leading:
            document = key, (block.number, start, start + tokens)
            start += tokens
            if moved is not None and key >= moved[0]:
                yield document[1]
                continue
            if moved is not None:
                yield moved[1]
            moved = document
    if moved is not None:
        yield moved[1]
    yield blocks[-1].number, start, blocks[-1].tokens["train"]
