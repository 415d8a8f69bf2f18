"""`lightlm prepare-data SOURCE --download-only`: fetch a Hub data set into the Hub's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightlm.data.sources.base import Source


def download_data(source: Source, tokenizer: str | None, as_json: bool) -> None:
    """Fetch the files of a Hub data set and the tokenizer, and print where they are.

    Raises UsageError for a source that is not on the Hub.
    """
    from huggingface_hub import constants

    from lightlm.cli.console import console, out, print_json
    from lightlm.data.prepare.options import defaults
    from lightlm.data.sources.hub.client import download_tokenizer
    from lightlm.data.sources.hub.source import HubSource
    from lightlm.data.tokenizer import load_tokenizer
    from lightlm.data.tokenizer.named import requested_vocab_size
    from lightlm.errors import UsageError

    if not isinstance(source, HubSource):
        raise UsageError(f"--download-only: {source.spec} is not a data set on the Hugging Face Hub")
    listing = source.listing
    size = f"{listing.total_bytes / 1e9:,.2f} GB in {len(listing.files)} file{'s' * (len(listing.files) != 1)}"
    console.print(f"{source.spec}, {size}, to {constants.HF_HUB_CACHE}", markup=False, soft_wrap=True)
    source.download()
    tokenizer = tokenizer or defaults(source)[0]
    if requested_vocab_size(tokenizer) is None:
        load_tokenizer(tokenizer, download_tokenizer)
    if as_json:
        print_json({
            "source": source.spec, "revision": listing.commit, "files": len(listing.files),
            "bytes": listing.total_bytes, "cache": constants.HF_HUB_CACHE,
        })  # fmt: skip
        return
    out.print(f"Downloaded {source.spec} at commit {listing.commit}: {size}.", markup=False, soft_wrap=True)
