"""Forward and backward of the output head and its loss on 4,096 tokens, for several chunk sizes (CPU, bf16 products).

python benchmarks/head_loss.py
"""

import time

import torch

from lightlm.train import loss

TOKENS = 4096
REPEATS = 4


def fastest_step(vocab_size: int, hidden_size: int, rows: int) -> float:
    """Milliseconds of the fastest of a few steps with chunks of `rows` tokens."""
    loss._CHUNK["cpu"] = rows
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
        for rows in (256, 512, 1024, 4096):
            milliseconds = fastest_step(vocab_size, hidden_size, rows)
            print(f"V {vocab_size:>6,}  D {hidden_size}  {rows:>5,} rows: {milliseconds:7.0f} ms")
