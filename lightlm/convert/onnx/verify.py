"""Compare an ONNX model with the model that it was made of, by running onnxruntime."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

from lightlm.checkpoint import LoadedModel, build_model, clean_state
from lightlm.convert.onnx.graph import PAST, PRESENT
from lightlm.convert.samples import sample_tokens
from lightlm.errors import ConvertError

# The largest accepted difference of logits computed from the same weights: only sums differ in order. In 8 bits,
# onnxruntime rounds activations too; then distributions of the next token may diverge by so many nats.
TOLERANCE, QUANTIZED_DIVERGENCE = 1e-3, 0.1
# The largest accepted relative error of a tensor, by the type in which it is stored.
_ROUNDING = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.uint8: 0.02}
_STEPS = 4  # tokens that are computed one by one, after the prompt


class Session:
    """An ONNX model in onnxruntime that keeps keys and values between calls."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its types are not public
            raise ConvertError(f"onnxruntime cannot load {path}: {error}") from None
        self.outputs = [each.name for each in self.session.get_outputs()]
        self._cache: dict[str, np.ndarray] = {}

    def __call__(self, tokens_BT: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) of tokens that follow those of earlier calls.

        Args:
            mask_BS: 0 where a row has padding, which must be on the left; all earlier tokens included.
        """
        batch, length = tokens_BT.shape
        if not self._cache:
            shapes = {each.name: each.shape for each in self.session.get_inputs() if each.name.startswith("past")}
            self._cache = {name: np.zeros((batch, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
        total = self._cache[PAST[0].format(0)].shape[2] + length
        mask_BS = torch.ones(batch, total, dtype=torch.int64) if mask_BS is None else mask_BS
        positions_BT = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -length:]
        given = {"input_ids": tokens_BT, "attention_mask": mask_BS, "position_ids": positions_BT}
        results = self.session.run(None, {name: each.numpy() for name, each in given.items()} | self._cache)
        found = dict(zip(self.outputs, results, strict=True))
        for layer in range(len(self._cache) // 2):
            for new, old in zip(PRESENT, PAST, strict=True):
                self._cache[old.format(layer)] = found[new.format(layer)]
        return torch.from_numpy(found["logits"])


@torch.no_grad()
def verify(loaded: LoadedModel, folder: Path) -> float:
    """Return the largest difference of logits between onnxruntime and LightLM, with weights as they are stored.

    Raises:
        ConvertError: the folder holds other weights than the model, or onnxruntime computes something else.
    """
    path = next((folder / "onnx").glob("*.onnx"))
    state, quantized = stored_state(path, clean_state(loaded.model.state_dict()))
    ours = build_model(loaded.model.config, state, str(path)).eval()
    tokens_BT = sample_tokens(loaded)
    session, prompt = Session(path), max(tokens_BT.shape[1] - _STEPS, 1)
    chunks = [tokens_BT[:, :prompt], *tokens_BT[:, prompt:].split(1, dim=1)]
    theirs_BTV, ours_BTV = torch.cat([session(chunk) for chunk in chunks], 1), ours(tokens_BT)
    difference_BT = (theirs_BTV - ours_BTV).abs().amax(-1)
    difference = measured = difference_BT.max().item()
    limit = TOLERANCE * max(ours_BTV.abs().max().item(), 1.0)
    if loaded.model.config.num_experts:  # where two experts tie, either may be chosen
        measured = difference_BT.median().item()
    if quantized:
        log_BTV = ours_BTV.log_softmax(-1)
        divergence_BT = (log_BTV.exp() * (log_BTV - theirs_BTV.log_softmax(-1))).sum(-1)
        measured, limit = divergence_BT.median().item(), QUANTIZED_DIVERGENCE
    if not measured <= limit:
        raise ConvertError(
            f"{path} does not compute what {loaded.path} does: onnxruntime and LightLM differ by {measured:.2e} "
            f"{'nats' if quantized else 'in logits'}, more than rounding ({limit:.0e}); do not use the conversion, and "
            "report this"
        )
    return difference


def stored_state(path: Path, expected: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the weights of a graph that we wrote as float32 tensors of our model, and whether some are in 8 bits.

    Args:
        expected: the tensors that it must hold, rounded.

    Raises:
        ConvertError: it does not.
    """
    stored = {each.name: each for each in onnx.load(path).graph.initializer}

    def matrix(stem: str, shape: torch.Size) -> tuple[Tensor, float]:
        """Return a tensor and the largest accepted error, by its name without `.weight`."""
        if f"{stem}.blocks" in stored:
            blocks, scales = (_tensor(stored[f"{stem}.{part}"]).float() for part in ("blocks", "scales"))
            return ((blocks - 128) * scales[..., None]).flatten(1)[:, : shape[-1]], _ROUNDING[torch.uint8]
        tensor = _tensor(stored[f"{stem}.weight" if f"{stem}.weight" in stored else stem])
        return tensor.float(), _ROUNDING[tensor.dtype]

    state = {}
    for name, wanted in expected.items():
        stem = name.removesuffix(".weight")
        stems = [f"{stem}.{expert}" for expert in range(len(wanted))] if wanted.ndim == 3 else [stem]
        parts = [matrix(each, wanted.shape) for each in stems]
        found = torch.stack([part for part, _ in parts]) if wanted.ndim == 3 else parts[0][0]
        if found.shape != wanted.shape or not (found - wanted).norm() <= parts[0][1] * wanted.norm():
            raise ConvertError(f"{path}: {name} is not the model's; do not use the conversion, and report this")
        state[name] = found
    return state, any(name.endswith(".blocks") for name in stored)


def _tensor(stored: onnx.TensorProto) -> Tensor:
    values = numpy_helper.to_array(stored)
    if stored.data_type == onnx.TensorProto.BFLOAT16:  # numpy has no such type
        return torch.from_numpy(values.astype(np.float32)).bfloat16()
    return torch.from_numpy(values.copy())
