"""Several sources as one, mixed by tokens; see `lightlm.data.prepare.mixing.schedule`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial

from lightlm.data.readers.texts import Unit, pack_strings
from lightlm.data.shards import MixedSource
from lightlm.data.sources.base import FileCounts, Source, at_revision, check_unchanged, file_counts
from lightlm.data.sources.sample import beginnings

_JOIN = " + "


class MixtureSource:
    """Sources with their shares, which sum to one."""

    def __init__(self, parts: Sequence[tuple[Source, Fraction]]) -> None:
        self.parts = parts
        self.name = "-".join(source.name for source, _ in parts)
        self.spec = _JOIN.join(f"{float(share)!r} {source.spec}" for source, share in parts)
        self.description = _JOIN.join(f"{float(share):.1%} {source.description}" for source, share in parts)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprints of the parts; None if one of them is None."""
        fingerprints = [source.fingerprint for source, _ in self.parts]
        return _JOIN.join(map(str, fingerprints)) if None not in fingerprints else None

    @property
    def revision(self) -> str:
        """The revisions of the parts."""
        return _JOIN.join(str(source.revision) for source, _ in self.parts)

    @property
    def file_counts(self) -> FileCounts:
        """The files of the parts, together."""
        read: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        for source, _ in self.parts:
            counts = file_counts(source)
            read.update(counts.read)
            left_out.update(counts.left_out)
        return FileCounts(dict(read), dict(left_out))

    def check_unchanged(self) -> None:
        """Raise ChangedError where a part changed since it was opened."""
        for source, _ in self.parts:
            check_unchanged(source)

    def at_revision(self, revision: str) -> "MixtureSource":
        """Return the parts at the revisions that an earlier process read. Raises DataError where one has changed."""
        revisions = [None if wanted == str(None) else wanted for wanted in revision.split(_JOIN)]
        parts = zip(self.parts, revisions, strict=True)
        return MixtureSource([(at_revision(source, wanted), share) for (source, share), wanted in parts])

    def reached(self, tokens: Mapping[int, int], documents: Mapping[int, int]) -> list[MixedSource]:
        """Return each part's share of the result, from counts keyed by part; not all may be zero."""
        total = sum(tokens.values())
        return [
            MixedSource(
                source=source.spec,
                share=float(share),
                reached=tokens.get(number, 0) / total,
                tokens=tokens.get(number, 0),
                documents=documents.get(number, 0),
            )
            for number, (source, share) in enumerate(self.parts)
        ]

    def units(self) -> Iterator[Unit]:
        """Yield one unit with the beginnings of documents, in the shares, for training a tokenizer.

        A preparation reads the units of the parts.
        """
        for source, _ in self.parts:
            next(source.units(), None)  # raises now if a source cannot be read
        yield Unit(self.spec, partial(pack_strings, self._sample))

    def _sample(self) -> Iterator[str]:
        """Yield texts of all sources, so that characters are in the shares, until one source ends."""
        texts = [beginnings(source.units(), skip_bad=False) for source, _ in self.parts]
        taken = [0.0] * len(texts)
        while True:
            source = min(range(len(texts)), key=taken.__getitem__)
            text = next(texts[source], None)
            if text is None:
                return
            taken[source] += max(1, len(text)) / float(self.parts[source][1])
            yield text
