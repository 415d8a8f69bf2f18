"""Sources, tokenizers, shards, and the order of batches."""

import os

# Arrow's own allocator keeps a decompressed Parquet page for a second; the system's frees it immediately. Arrow reads
# this variable when it is first imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
