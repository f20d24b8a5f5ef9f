"""bitsandbytes' weights in the eager runtime: the baseline that our own formats are compared with.

nf4: 4-bit normal floats in blocks of 64 with fp32 scales (QLoRA, arXiv 2305.14314); int8: a scale
per output channel and per token (LLM.int8(), arXiv 2208.07339), without its outlier columns.
"""

import logging
import warnings
from typing import Any, Literal

import torch
from torch import nn

from medmoe_edge.calibration.statistics import site_of
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.errors import MissingDependencyError
from medmoe_edge.runtimes.torch.eager import EagerRuntime, TorchDevice, check_device

# It warns of kernels it would download, and at every int8 product that fp32 becomes fp16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
try:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torch.jit's
        import bitsandbytes
except ModuleNotFoundError as error:
    raise MissingDependencyError("bitsandbytes", "baselines") from error

library: Any = bitsandbytes.nn  # whose types name none of what follows as exported
Kind = Literal["nf4", "int8"]


class BitsAndBytesRuntime(EagerRuntime):
    """The eager runtime with every decoder matrix that our quantisers quantise held in `kind`.

    Routers, coefficients, norms, embeddings and the vision tower stay fp32, and so does the
    arithmetic of nf4; that of int8 is on integers, as the library has it. Weights reach the device
    one by one, quantised. Raises `ResourceError` for a CUDA that PyTorch does not have.
    """

    def __init__(self, checkpoint: Checkpoint, kind: Kind, device: TorchDevice = "cpu") -> None:
        check_device(device)
        super().__init__(checkpoint)
        self.name = f"bitsandbytes-{kind}" + "-cuda" * (device == "cuda")
        linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and site_of(f"{name}.weight")
        }
        bits = weights = 0
        for name, linear in linears.items():
            quantised, stored = quantise_linear(linear, kind, device)
            self.model.set_submodule(name, quantised)
            bits, weights = bits + stored, weights + linear.weight.numel()
        self.bits_per_weight = bits / weights
        self.model.to(device)


def quantise_linear(
    linear: nn.Linear, kind: Kind, device: TorchDevice = "cpu"
) -> tuple[nn.Module, int]:
    """bitsandbytes' counterpart of a `linear` on the CPU, and the bits of its weights and scales.

    The weights are on `device`; the bias is `linear`'s own.
    """
    shape, weight = (linear.in_features, linear.out_features, False), linear.weight.detach()
    quantised: Any
    if kind == "nf4":
        nf4 = library.Params4bit(weight, compress_statistics=False, quant_type="nf4")
        quantised = library.Linear4bit(*shape, torch.float32, False, "nf4", device="meta")
        quantised.support_avx512bf16_for_cpu = False  # the kernel rounds inputs and scales to bf16
        quantised.weight = nf4.to(device)  # quantises here
        scales = quantised.weight.absmax
    else:
        int8 = library.Int8Params(weight, requires_grad=False)
        quantised = library.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        quantised.weight = int8.to(device)
        scales = quantised.weight.SCB
    quantised.bias = linear.bias
    return quantised.eval(), 8 * (quantised.weight.nbytes + scales.nbytes)
