"""Weights beside the graph: one `.data` file, streamed, each expert's bytes together.

Every expert and meta expert begins on a page, after all other weights, so that it can be mapped,
read ahead and dropped by itself.
"""

import re
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import tensor_of

PAGE = 4096
INLINE_BYTES = 1024  # smaller tensors stay in the graph: shapes, scalars, short biases
OWNER = re.compile(r"(.*\.ffn\.(?:experts\.\d+|meta))\.")

Extents = dict[str, list[int]]  # owner -> [offset, bytes]


def save_model(
    model: ir.Model,
    folder: Path,
    name: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Extents:
    """Write `name.onnx` and `name.data` into `folder`, one tensor in memory at a time.

    `progress` is called with the bytes done and the bytes in all. Returns where each expert lies in
    the data file. Raises `CheckpointError`.
    """
    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    large = [value for value in values if tensor_of(value).nbytes >= INLINE_BYTES]
    total = sum(tensor_of(value).nbytes for value in large)
    extents: Extents = {}
    previous = ""
    done = 0
    with (folder / f"{name}.data").open("wb") as file:
        for value in sorted(large, key=_group):  # stable: order within a group is kept
            group = _group(value)
            if group != previous:
                file.write(bytes(-file.tell() % PAGE))
                previous = group
            offset = file.tell()
            tensor = tensor_of(value)
            length = file.write(_bytes(tensor))
            done += length
            if progress:
                progress(done, total)
            value.const_value = ir.ExternalTensor(
                f"{name}.data",
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=folder,
            )
            if group:
                start = extents.setdefault(group, [offset, 0])[0]
                extents[group][1] = offset + length - start
    for value in values:
        if value not in large:  # read now: inside `ir.save` an error would lose its type
            value.const_value = ir.tensor(tensor_of(value).numpy(), name=value.name)
    ir.save(model, folder / f"{name}.onnx")
    return extents


def _group(value: ir.Value) -> str:
    """The expert that owns a weight; the empty string, which sorts first, for all others."""
    match = OWNER.match(value.name or "")
    return match[1] if match else ""


def _bytes(tensor: ir.TensorProtocol) -> bytes:
    data = tensor.tobytes()
    if len(data) != tensor.nbytes:
        raise CheckpointError(
            f"The tensor {tensor.name} changed its size while it was read.",
            "Do not change the checkpoint during an export.",
        )
    return data
