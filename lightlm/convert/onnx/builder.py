"""Build an ONNX graph, operation by operation: a thin layer over `onnx.helper`.

Values are the names of tensors in the graph. Shapes: N rows, I features in, O features out, V rows of a table, D its
columns, C blocks of 32 columns.
"""

from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

OPSET = 18  # onnxruntime has it since 1.14
BLOCK = 32  # columns that share a scale in 8 bits
_MICROSOFT = "com.microsoft"  # operations that only onnxruntime has
_KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.uint8: TensorProto.UINT8,
}
Shape = tuple[str | int, ...]  # a text names a size that each call may choose


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix in 8 bits (O, C, 32), where 128 means 0, and the scales of its blocks (O, C) in float32."""
    columns = weight_OI.shape[1]
    padded = torch.nn.functional.pad(weight_OI.float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    scales_OC = padded.abs().amax(2) / 127
    whole = (padded / scales_OC.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
    return (whole + 128).to(torch.uint8), scales_OC


class Builder:
    """A graph that grows. Activations are float32; weights are stored in `dtype`, or matrices in 8 bits."""

    def __init__(self, dtype: torch.dtype, *, quantized: bool) -> None:
        self.dtype, self.quantized = dtype, quantized
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._floats: dict[str, str] = {}  # stored weight -> the same as float32
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def add(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add an operation and return its output."""
        return self.add_several(kind, *inputs, count=1, domain=domain, **attributes)[0]

    def add_several(self, kind: str, *inputs: str, count: int, domain: str = "", **attributes: Any) -> list[str]:
        """Add an operation and return its `count` outputs."""
        name = f"{kind}_{len(self._nodes)}"
        outputs = [name if count == 1 else f"{name}_{number}" for number in range(count)]
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs

    def input(self, name: str, dtype: torch.dtype, shape: Shape) -> str:
        """Add an input of the graph."""
        self._inputs.append(helper.make_tensor_value_info(name, _KINDS[dtype], shape))
        return name

    def output(self, name: str, value: str, shape: Shape) -> None:
        """Make a float32 value an output of the graph, under another name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def ints(self, *values: int) -> str:
        """Return a vector of whole numbers."""
        return self.constant(f"ints_{'_'.join(map(str, values))}", torch.tensor(values))

    def number(self, value: float) -> str:
        """Return a float32 scalar."""
        return self.constant(f"number_{value!r}", torch.tensor(value, dtype=torch.float32))

    def constant(self, name: str, tensor: Tensor) -> str:
        """Store a tensor as it is, once for each name."""
        if name not in self._tensors:
            data = tensor.detach().cpu().contiguous()
            raw = data.flatten().view(torch.uint8).numpy().tobytes() if data.ndim else data.numpy().tobytes()
            self._tensors[name] = helper.make_tensor(name, _KINDS[data.dtype], data.shape, raw, raw=True)
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """Return a tensor of the model as float32, stored in the precision of weights."""
        stored = self.constant(name, tensor.to(self.dtype))
        if stored not in self._floats:
            self._floats[stored] = self._as_float(stored)
        return self._floats[stored]

    def linear(self, x: str, name: str, weight_OI: Tensor, bias_O: Tensor | None = None) -> str:
        """Return x (N, I) times the transposed weight, plus bias: (N, O)."""
        bias = [] if bias_O is None else [self.weight(f"{name}.bias", bias_O)]
        if not self.quantized:
            return self.add("Gemm", x, self.weight(f"{name}.weight", weight_OI), *bias, transB=1)
        size = {"N": weight_OI.shape[0], "K": weight_OI.shape[1], "bits": 8, "block_size": BLOCK}
        size["accuracy_level"] = 4  # activations in 8 bits too; without, a CPU turns the matrix into float32 each time
        y = self.add("MatMulNBits", x, *self._blocks(name, weight_OI), domain=_MICROSOFT, **size)
        return self.add("Add", y, *bias) if bias else y

    def rows(self, name: str, table_VD: Tensor, ids: str) -> str:
        """Return the rows of a table at some ids (N,): (N, D)."""
        if not self.quantized:
            stored = self.constant(f"{name}.weight", table_VD.to(self.dtype))
            return self._as_float(self.add("Gather", stored, ids))
        blocks, scales = (self.add("Gather", stored, ids) for stored in self._blocks(name, table_VD))
        whole = self.add("Sub", self.add("Cast", blocks, to=TensorProto.FLOAT), self.number(128.0))
        values = self.add("Mul", whole, self.add("Unsqueeze", scales, self.ints(2)))
        values = self.add("Reshape", values, self.ints(0, -1))
        return self.add("Slice", values, self.ints(0), self.ints(table_VD.shape[1]), self.ints(1))

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(
            self._nodes, "lightlm", self._inputs, self._outputs, initializer=list(self._tensors.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets[: 1 + self.quantized], producer_name="lightlm")
        model.ir_version = 8  # that of the opset
        helper.set_model_props(model, metadata)
        return model

    def _as_float(self, value: str) -> str:
        return value if self.dtype == torch.float32 else self.add("Cast", value, to=TensorProto.FLOAT)

    def _blocks(self, name: str, weight: Tensor) -> tuple[str, str]:
        """Store a matrix in 8 bits, once for each name; return its blocks and their scales."""
        names = f"{name}.blocks", f"{name}.scales"
        if names[0] not in self._tensors:
            for key, tensor in zip(names, quantize(weight), strict=True):
                self.constant(key, tensor)
        return names
