"""Time of the output head and its loss, forward and backward, on 4,096 tokens (CPU, bf16 products).

    python benchmarks/head_loss.py

Prints milliseconds for several chunk sizes with the vocabulary padded to whole cache lines, and for one without.
"""

import torch
from common import make_parser
from measure import DEMO_VOCABULARY, GPT2_VOCABULARY, seconds_of

from lightlm.train.step import loss

TOKENS = 4096
REPEATS = 4


def fastest_step(vocab_size: int, hidden_size: int, rows: int, multiple: int) -> float:
    """Return the milliseconds of the fastest of a few steps, with chunks of `rows` tokens and a padded vocabulary."""
    loss._CHUNK["cpu"], loss._VOCAB_MULTIPLE = rows, multiple
    x_ND = (0.02 * torch.randn(TOKENS, hidden_size)).bfloat16().requires_grad_()
    weight_VD = torch.randn(vocab_size, hidden_size, requires_grad=True)
    targets_N = torch.randint(vocab_size, (TOKENS,))

    def step() -> None:
        loss._HeadLoss.apply(x_ND, weight_VD, targets_N).backward()

    return 1000 * min(seconds_of(step) for _ in range(REPEATS))


if __name__ == "__main__":
    make_parser(__doc__).parse_args()
    for vocab_size, hidden_size in ((DEMO_VOCABULARY, 256), (GPT2_VOCABULARY, 576)):
        for rows, multiple in ((512, 128), (1024, 128), (2048, 128), (4096, 128), (2048, 1)):
            milliseconds = fastest_step(vocab_size, hidden_size, rows, multiple)
            padding = "padded" if multiple > 1 else "not padded"
            print(f"V {vocab_size:>6,}  D {hidden_size}  {rows:>5,} rows, {padding}: {milliseconds:7.0f} ms")
