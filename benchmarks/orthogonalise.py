"""CPU time of orthogonalising 24 matrices in bf16, one by one, in calls of at most 2**20 elements, and all at once.

OMP_NUM_THREADS=1 python benchmarks/orthogonalise.py
"""

import time

import torch

from lightlm.optim.orthogonal import orthogonalize

MATRICES, ROUNDS = 24, 5


def milliseconds(matrices_NRC: torch.Tensor, a_call: int) -> float:
    """Of the fastest round."""
    rounds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for call in matrices_NRC.split(a_call):
            orthogonalize(call, 5, torch.bfloat16)
        rounds.append(time.process_time() - started)
    return 1e3 * min(rounds)


if __name__ == "__main__":
    torch.manual_seed(0)
    for rows, columns in ((64, 64), (128, 256), (256, 768), (576, 576), (576, 1536)):
        matrices = torch.randn(MATRICES, rows, columns)
        calls = {"one": 1, "2**20": max(2**20 // (rows * columns), 1), "all": MATRICES}
        print(f"{rows} x {columns}:", *(f"{name} {milliseconds(matrices, n):.1f} ms" for name, n in calls.items()))
