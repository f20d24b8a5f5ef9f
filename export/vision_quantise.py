"""Pass: the linear layers of a vision transformer in 8 bits, weights and activations in groups.

The groups are small because activations of such towers have outliers: a large one coarsens what
shares its scale. Med-MoE's CLIP ViT-L/14-336 with random weights; then with 6 channels of each norm
and 12 of each fc1 made 30 to 100 times larger (the columns that read them smaller by as much) and
two channels of 4 tokens 100 times. Relative error and mean cosine of the image tokens against
fp32, and seconds an image on two cores (fp32: 2.5):

    8 bits, activations             plain            with outliers    time
    a scale per token (W8A8)        0.027  0.9996    0.44  0.907      0.9
    groups of 128                   0.025  0.9997    0.21  0.979      1.3
    groups of 64                                     0.15  0.988
    groups of 32                    0.020  0.9998    0.11  0.994      1.8

A bundle's gate is a cosine of 0.99, which only groups of 32 keep there; llama.cpp's Q8_0 has the
same. Little of the error is the projector's: without it, groups of 128 have 0.021 and 0.21.
"""

from functools import partial

import onnx_ir as ir

from medmoe_edge.bundle.signature import SignatureMaker
from medmoe_edge.calibration.formats import Format
from medmoe_edge.calibration.rounding import round_to_nearest
from medmoe_edge.export.builder import tensor_of
from medmoe_edge.export.passes.ort_matmul import lower_matmul
from medmoe_edge.export.quantise import Quantiser, quantise_weights

GROUP = 32
INT8_GROUPS = Format(8, GROUP)
LEAST_WIDTH = 128  # inputs of a matrix: narrower ones weigh next to nothing


def quantise_linears(
    model: ir.Model, signature: SignatureMaker | None = None
) -> tuple[ir.Model, bool]:
    """Make `MatMulNBits` of every `MatMul` with a wide matrix `[K, N]` that divides into groups.

    Weights are read, and marked in `signature`, when they are written. Returns
    `(model, modified)`; a weight whose scale fp16 cannot hold raises `CheckpointError` then.
    """
    linears = {name for name, value in model.graph.initializers.items() if _is_linear(value)}

    def policy(name: str) -> tuple[Format, Quantiser] | None:
        if name not in linears:
            return None
        return INT8_GROUPS, partial(round_to_nearest, format=INT8_GROUPS)

    quantise_weights(model, policy, signature)
    return lower_matmul(model)


def _is_linear(value: ir.Value) -> bool:
    shape, uses = tensor_of(value).shape.numpy(), value.uses()
    multiplied = all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses)
    return multiplied and len(shape) == 2 and shape[0] >= LEAST_WIDTH and shape[0] % GROUP == 0
