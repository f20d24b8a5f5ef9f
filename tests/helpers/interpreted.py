"""The plugin's kernels under Triton's interpreter, and the two ops for ONNX's evaluator."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton.language as tl
from onnx.reference.op_run import OpRun
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

from medmoe_edge.kernels import launch

Array = npt.NDArray[Any]


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Let `launch` run on CPU tensors, without changing how kernels are compiled."""
    patch.setattr(launch, "kernels", launch.interpreted_kernels())
    patch.setattr(InterpreterBuilder, "cast_impl", cast)
    patch.setattr(InterpreterBuilder, "create_dot", dot)


def cast(self: Any, source: Any, kind: Any) -> Any:
    """As the interpreter's, and right for bf16, which it only knows from fp32 and truncates."""
    target = kind.scalar
    numbers = floats(source).astype(
        ml_dtypes.bfloat16 if target == tl.bfloat16 else interpreter._get_np_dtype(kind)
    )
    stored = numbers.view(np.uint16) if target == tl.bfloat16 else numbers
    return interpreter.TensorHandle(stored, target)


def dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
    """As the interpreter's, which would multiply the bits of bf16."""
    product = np.matmul(floats(a).astype(np.float32), floats(b).astype(np.float32))
    return interpreter.TensorHandle(product + total.data, total.dtype.scalar)


def floats(handle: Any) -> Array:
    """The numbers that an interpreter's handle stands for; it keeps bf16 as uint16."""
    data: Array = handle.data
    return data.view(ml_dtypes.bfloat16) if handle.dtype.scalar == tl.bfloat16 else data


def to_torch(array: Array) -> torch.Tensor:
    """Also of bf16, which torch does not take from numpy."""
    array = np.array(array, order="C")  # initializers are read-only, which torch warns of
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.uint16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


class RoutedHidden(OpRun):
    op_domain = "medmoe"

    def _run(self, *inputs: Array, activation: str, **_: Any) -> tuple[Array]:
        x, tokens, offsets, *parts = map(to_torch, inputs)
        experts = grouped(parts, 4 if activation == "swiglu" else 3)
        return (to_numpy(launch.routed_hidden(x, tokens, offsets, experts, activation)),)


class RoutedOutput(OpRun):
    op_domain = "medmoe"

    def _run(self, *inputs: Array, plugin_namespace: str, **_: Any) -> tuple[Array]:
        hidden, order, gates, offsets, *parts = map(to_torch, inputs)
        experts = grouped(parts, 2 if "swiglu" in plugin_namespace else 3)
        return (to_numpy(launch.routed_output(hidden, order, gates, offsets, experts)),)


def grouped(parts: list[torch.Tensor], size: int) -> list[list[torch.Tensor]]:
    return [parts[start : start + size] for start in range(0, len(parts), size)]
