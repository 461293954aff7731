"""Adding nodes and constants to an ONNX graph."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qpass_export.targets import Target

#: Domain of onnxruntime's own operators.
CONTRIB = "com.microsoft"
Input = ir.Value | np.ndarray | Sequence[int] | float | int | None


class Build:
    """New nodes, in order. Inputs may be numpy arrays: they become constants, equal small ones once in a graph."""

    def __init__(self, graph: ir.Graph, target: Target, metadata: dict[str, str] | None = None) -> None:
        self.graph, self.target, self.dtype, self.metadata = graph, target, target.ir_dtype, metadata or {}
        self._tape = Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """What was added so far."""
        return self._tape.nodes

    def __call__(self, op_type: str, *inputs: Input, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """One node; -> its output, or a list of them."""
        values = [self._value(x) for x in inputs]
        while values and values[-1] is None:
            values.pop()
        kept = {name: value for name, value in attributes.items() if value is not None}
        made = self._tape.op_multi_out(
            op_type, values, kept, num_outputs=outputs, domain=domain, metadata_props=dict(self.metadata)
        )
        return made[0] if outputs == 1 else list(made)

    def _value(self, x: Input) -> ir.Value | None:
        if x is None or isinstance(x, ir.Value):
            return x
        if isinstance(x, float):
            x = np.array(x, self.dtype.numpy())
        array = np.asarray(x)
        content = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        name = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{content}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self.constant(name, ir.tensor(array))

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer; the one that is there already, if it has this name."""
        if name not in self.graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
            self.graph.register_initializer(value)
        there = self.graph.initializers[name]
        assert (there.dtype, there.shape) == (tensor.dtype, tensor.shape), f"{name} stands for two tensors"
        return there
