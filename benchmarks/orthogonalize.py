"""CPU time of orthogonalizing 24 matrices in bf16.

    OMP_NUM_THREADS=1 python benchmarks/orthogonalize.py

Prints milliseconds for several shapes: one matrix per call, at most 2**20 elements per call, and all at once.
"""

import time

import torch
from common import make_parser
from measure import seconds_of

from lightlm.optim.orthogonal import orthogonalize, polynomials

MATRICES, ROUNDS = 24, 5


def milliseconds(matrices_NRC: torch.Tensor, per_call: int) -> float:
    """Return the time of the fastest round, with `per_call` matrices in each call."""

    def orthogonalize_all() -> None:
        for call in matrices_NRC.split(per_call):
            orthogonalize(call, polynomials("newton_schulz", 5), torch.bfloat16)

    return 1e3 * min(seconds_of(orthogonalize_all, clock=time.process_time) for _ in range(ROUNDS))


if __name__ == "__main__":
    make_parser(__doc__).parse_args()
    torch.manual_seed(0)
    for rows, columns in ((64, 64), (128, 256), (256, 768), (576, 576), (576, 1536)):
        matrices = torch.randn(MATRICES, rows, columns)
        calls = {"one": 1, "2**20": max(2**20 // (rows * columns), 1), "all": MATRICES}
        print(f"{rows} x {columns}:", *(f"{name} {milliseconds(matrices, n):.1f} ms" for name, n in calls.items()))
