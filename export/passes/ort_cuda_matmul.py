"""Pass: `DequantizeLinear -> MatMul` as ONNX Runtime runs it on CUDA, `MatMulNBits`.

Groups stay as they are. A scale per output channel becomes blocks that repeat it: the same numbers,
and the kernel reads 8 bits a weight, where `DequantizeLinear` before a `MatMul` would write the
weights in fp16 and read them again at every token. 2-bit integers are stored in 4: CUDA's fast
kernels (`fpA_intB`: blocks of 32, 64 or 128) know 4 and 8.
No `accuracy_level` is set: activations keep their type. CUDA knows no other way; the CPU provider,
which runs this graph too, is exact so, and slow with 8 bits.

Known from ONNX Runtime's source and its CPU provider; what runs on CUDA is in the README's table.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge.export.builder import CONTRIB, Builder, initializer, replace_node
from medmoe_edge.export.stored_matrix import StoredMatrix, lazy_tensor

BLOCKS = (128, 64, 32, 16)
LEAST_BITS = 4


def lower_matmul_cuda(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every pair whose width divides into blocks; returns `(model, modified)`."""
    pairs = [
        (node, matrix, block)
        for node in model.graph
        if node.op_type == "MatMul"
        and (matrix := StoredMatrix.behind(node.inputs[1])) is not None
        and (block := matrix.group or _block(matrix.width)) is not None
    ]
    for node, matrix, block in pairs:
        build = Builder()
        replace_node(node, build, _product(build, model.graph, node.inputs[0], matrix, block))
        model.graph.opset_imports[CONTRIB] = 1
    if pairs:
        RemoveUnusedNodesPass()(model)
    return model, bool(pairs)


def _block(width: int) -> int | None:
    return next((block for block in BLOCKS if width % block == 0), None)


def _product(
    build: Builder, graph: ir.Graph, x: ir.Value | None, matrix: StoredMatrix, block: int
) -> ir.Value:
    name, bits = matrix.integers.name, max(matrix.bits, LEAST_BITS)
    blocks = [matrix.channels, matrix.width // block, block * bits // 8]
    tensors = [
        lazy_tensor(
            f"{name}.packed",
            lambda: matrix.packed(bits).reshape(blocks),
            ir.DataType.UINT8,
            blocks,
        ),
        lazy_tensor(
            f"{name}.blocks.scale", lambda: matrix.scales(block), matrix.scale.dtype, blocks[:2]
        ),
    ]
    weight, scale = (register(graph, tensor) for tensor in tensors)
    return build.op(
        "MatMulNBits",
        *(x, weight, as_float(build, scale)),
        domain=CONTRIB,
        K=matrix.width,
        N=matrix.channels,
        bits=bits,
        block_size=block,
    )


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A tensor as an initializer of the graph; one that two products share is stored once."""
    found = graph.initializers.get(str(tensor.name))
    if found is not None:
        return found
    value = initializer(tensor)
    graph.register_initializer(value)
    return value


def as_float(build: Builder, scale: ir.Value) -> ir.Value:
    """Scales in fp32, as the op wants them beside fp32 activations."""
    if scale.dtype == ir.DataType.FLOAT:
        return scale
    return build.op("Cast", scale, to=int(ir.DataType.FLOAT))
