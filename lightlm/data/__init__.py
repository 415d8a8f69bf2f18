"""Sources, tokenizers, shards, and the order of batches."""

import os

# Arrow's own allocator holds on to what a Parquet page is decompressed from for a second; the system's gives it back at
# once (benchmarks/large_document.py). Arrow looks when it is first imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
