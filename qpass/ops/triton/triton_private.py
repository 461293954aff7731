"""Names of Triton that are no public interface: what changes with a release is to be looked at here."""

from __future__ import annotations

from typing import Any


def interpreted() -> bool:
    """Whether kernels run on the CPU, in numpy: the environment had TRITON_INTERPRET=1 when triton was imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def mend_interpreter() -> None:
    """What Triton's interpreter lacks, for tests that run kernels in it.

    It computes with bfloat16 as if its bits were integers, and rounds to it wrongly; and it makes scalars arrays of one element,
    which numpy 2.4 does not take for the bounds of a loop any more.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch, cast, binary, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.binary_op, builder.create_dot
    if hasattr(builder, "get_bf16"):
        return

    def widened(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def narrowed(values: Any) -> Any:  # to nearest, ties to even
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def is_bf16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def as_fp32(value: Any) -> Any:
        return handle(widened(value.data), tl.float32) if is_bf16(value) else value

    def new_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and not is_bf16(src):
            return handle(narrowed(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, as_fp32(src), dst_type)

    def new_binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_bf16(lhs):
            return binary(self, lhs, rhs, op)
        return handle(narrowed(op(widened(lhs.data), widened(rhs.data))), tl.bfloat16)

    def new_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, as_fp32(a), as_fp32(b), d, *rest)

    def new_patch(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.get_bf16 = lambda self, value: handle(narrowed(np.array([value])), tl.bfloat16)
    builder.cast_impl, builder.binary_op, builder.create_dot = new_cast, new_binary, new_dot
    interpreter._patch_lang_tensor = new_patch
