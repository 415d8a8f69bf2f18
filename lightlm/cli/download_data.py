"""`lightlm prepare-data SOURCE --download-only`: a Hub data set into the Hub's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightlm.data.sources import Source


def download_data(source: Source, tokenizer: str, as_json: bool) -> None:
    """Fetch the files of a Hub data set and the tokenizer, and print where they are and what comes next.

    Raises UsageError for a source that is not on the Hub.
    """
    from huggingface_hub import constants

    from lightlm.cli.console import console, out, print_json
    from lightlm.data.hub_source import HubSource
    from lightlm.data.tokenizer import load_tokenizer, requested_vocab_size
    from lightlm.errors import UsageError

    if not isinstance(source, HubSource):
        raise UsageError(f"--download-only: {source.spec} is no data set on the Hugging Face Hub")
    listing = source.listing
    size = f"{listing.total_bytes / 1e9:,.2f} GB in {len(listing.files)} file{'s' * (len(listing.files) != 1)}"
    console.print(f"{source.spec}, {size}, to {constants.HF_HUB_CACHE}", markup=False, soft_wrap=True)
    source.download()
    if requested_vocab_size(tokenizer) is None:
        load_tokenizer(tokenizer)
    if as_json:
        files, total = len(listing.files), listing.total_bytes
        cache = constants.HF_HUB_CACHE
        print_json({"source": source.spec, "revision": listing.commit, "files": files, "bytes": total, "cache": cache})
        return
    out.print(f"Downloaded {source.spec} at commit {listing.commit}: {size}.", markup=False, soft_wrap=True)
