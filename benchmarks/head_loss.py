"""Forward and backward of the output head and its loss on 4,096 tokens (CPU, bf16 products): for several chunk sizes,
with the vocabulary padded to whole cache lines, and as it is.

python benchmarks/head_loss.py
"""

import time

import torch

from lightlm.train.step import loss

TOKENS = 4096
REPEATS = 4


def fastest_step(vocab_size: int, hidden_size: int, rows: int, multiple: int) -> float:
    """Milliseconds of the fastest of a few steps with chunks of `rows` tokens, and entries padded to a multiple."""
    loss._CHUNK["cpu"], loss._VOCAB_MULTIPLE = rows, multiple
    x_ND = (0.02 * torch.randn(TOKENS, hidden_size)).bfloat16().requires_grad_()
    weight_VD = torch.randn(vocab_size, hidden_size, requires_grad=True)
    targets_N = torch.randint(vocab_size, (TOKENS,))
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        loss._HeadLoss.apply(x_ND, weight_VD, targets_N).backward()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


if __name__ == "__main__":
    for vocab_size, hidden_size in ((8192, 256), (50_257, 576)):
        for rows, multiple in ((512, 128), (1024, 128), (2048, 128), (4096, 128), (2048, 1)):
            milliseconds = fastest_step(vocab_size, hidden_size, rows, multiple)
            padding = "padded" if multiple > 1 else "as it is"
            print(f"V {vocab_size:>6,}  D {hidden_size}  {rows:>5,} rows, {padding}: {milliseconds:7.0f} ms")
