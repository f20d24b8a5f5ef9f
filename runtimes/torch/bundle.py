"""A portable bundle in PyTorch, from its own weights: no checkpoint is read.

The parameters come from the bundle's graphs, one by one. On CUDA activations are fp16, and what is
stored in int8, or in int4 in groups of 32 or 128, stays as it is stored: the plugin's kernels
(`medmoe_edge/kernels`) read those very bytes, of experts the chosen ones. Dense layers, attention
and the head go through them too, one expert each: they are a third of the weights of Med-MoE's
StableLM, and dequantised to fp16 would outweigh its experts in int4. Formats without a kernel,
which a mixed export may choose, are dequantised.

Experts as deltas stay what they are where the kernels take the meta expert and all deltas of a
layer alike, those of 2 bits in 4: int8, 4 bits, low ranks of either. Others are made whole.

On the CPU, where Triton does not run, everything is dequantised to fp32: slow, for comparison.
"""

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.bundle import DEFAULT, Bundle
from medmoe_edge.errors import ModelError
from medmoe_edge.export.decoder import ACTIVATIONS, MATRICES
from medmoe_edge.export.quantise import pack_rows, unpack_rows
from medmoe_edge.export.stored import GROUP_SCALE, INPUT_SCALE, PACKED, SCALE, StoredWeights
from medmoe_edge.kernels import TILES, group_of
from medmoe_edge.models.decoder import MoE
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.runtimes.base import Cache, EmbeddingTable, Step
from medmoe_edge.runtimes.torch.eager import EagerCache, EagerRuntime, TorchDevice, check_device

if TYPE_CHECKING:
    from medmoe_edge.kernels.launch import Expert


class Stored(NamedTuple):
    """A parameter as it lies in a bundle: floats, or integers of so many `bits` and their scale.

    Integers are int8 `[K, N]` with scales `[N]`, or unsigned and packed along K as `[N, groups,
    bytes]`, the first lowest, zero point in the middle, with scales `[N, groups]`.
    """

    matrix: ir.TensorProtocol
    scale: ir.TensorProtocol | None = None
    bits: int = 8

    @property
    def has_kernel(self) -> bool:
        """Whether the plugin's kernels take it as it is stored."""
        shape = self.matrix.shape.numpy()
        if self.scale is None or len(shape) == 2:
            return self.scale is not None
        return self.bits == 4 and group_of(shape) in TILES


class BundleWeights:
    """The weights under the checkpoint's names, on a device."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        self.bundle, self.device = bundle, device
        self._vision = StoredWeights(bundle.path("vision.onnx"))
        self._decoder = StoredWeights(bundle.path("decoder.onnx"))
        self._names = {*self._vision.names_under(""), *self._decoder.names_under("")}

    def __contains__(self, name: str) -> bool:
        """Whether the graphs read it."""
        return name in self._names

    def floats(self, name: str) -> Tensor:
        """A parameter in fp32, matrices `[in, out]` as the graphs have them, maybe dequantised."""
        matrix, scale, bits = self.stored(name)
        scales = None if scale is None else self.tensor(scale)
        weight = dequantise(self.tensor(matrix), scales, bits)
        divisor = self._vision.tensors.get(f"{name}{INPUT_SCALE}")  # of what the matrix reads
        return weight if divisor is None else weight * self.tensor(divisor).float()[:, None]

    def stored(self, name: str) -> Stored:
        """A parameter as the graphs store it; raises `BundleError` where its scale is missing."""
        weights = self._decoder if name.startswith("decoder.") else self._vision
        tensors, packed = weights.tensors, f"{name}{PACKED}"
        if weights.quantised(name) is None:
            return Stored(weights.tensor(name))
        if packed in tensors:
            return Stored(tensors[packed], tensors[f"{name}{GROUP_SCALE}"], weights.bits[packed])
        return Stored(tensors[name], tensors[f"{name}{SCALE}"])

    def has_kernel(self, name: str) -> bool:
        """Whether the plugin's kernels take this weight of the decoder as it is stored."""
        return name.startswith("decoder.") and name in self and self.stored(name).has_kernel

    def for_kernel(self, name: str) -> tuple[Tensor, Tensor]:
        """The bytes and scales of a weight that `has_kernel`, see `export.plugin`."""
        matrix, scale, _ = self.stored(name)
        return self.tensor(matrix), self.tensor(there(scale))

    def delta(self, stem: str, dtype: torch.dtype) -> "list[Expert] | None":
        """The factors of an expert's delta for the kernels; None where it has none for them."""
        names = sorted(self._decoder.deltas.get(f"{stem}.weight", ()))
        stored = [widened(self.stored(name)) for name in names]
        if not stored or not all(each.has_kernel for each in stored):
            return None
        factors = [[self.tensor(part) for part in each[:2] if part is not None] for each in stored]
        if f"{stem}.bias" in self:
            factors[-1].append(self.floats(f"{stem}.bias").to(dtype))
        return list(factors)

    def tensor(self, tensor: ir.TensorProtocol) -> Tensor:
        """What is stored, on the device."""
        return torch.from_numpy(np.array(tensor.numpy())).to(self.device)  # the file is mapped


def widened(stored: Stored) -> Stored:
    """Integers of 2 bits in 4; all others as they are."""
    if stored.bits != 2:
        return stored
    packed = stored.matrix.numpy()  # [N, groups, bytes]
    rows = pack_rows(unpack_rows(packed.reshape(len(packed), -1), 2), 4)
    return Stored(ir.tensor(rows.reshape(*packed.shape[:2], -1)), stored.scale, 4)


def dequantise(matrix: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """What is `Stored` in fp32, a matrix as `[K, N]`."""
    if scale is None:
        return matrix.float()
    if scale.ndim == 1:
        return matrix.float() * scale
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=matrix.device)
    integers = (matrix[..., None] >> shifts) & (2**bits - 1)  # [N, groups, bytes, 8 / bits]
    centred = integers.flatten(2).float() - 2 ** (bits - 1)  # [N, groups, group]
    weight: Tensor = centred * scale.float()[..., None]
    return weight.flatten(1).T.contiguous()


KEPT_FP32 = ("vision.", "projector.", ".router.", ".coefficient.", "norm.")

logger = logging.getLogger(__name__)


class TorchBundleRuntime(EagerRuntime):
    """The bundle's decoder in `dtype`, by default fp16 on CUDA and fp32 on the CPU.

    In fp16 and bf16 only products and the cache are half: routing, norms, the residual stream and
    the vision tower are fp32. Of the embedding table only rows in use are read. Raises
    `ModelError` for a bundle of another target, `MissingDependencyError` where the kernels need
    Triton, and `ResourceError` for a CUDA that PyTorch does not have.
    """

    def __init__(
        self, bundle: Bundle, device: TorchDevice = "cuda", dtype: torch.dtype | None = None
    ) -> None:
        if bundle.target.name != DEFAULT:
            raise ModelError(
                f"{bundle.name} is made for {bundle.target}, not for torch.",
                "Give the portable bundle that it was made from.",
            )
        check_device(device)
        self.config = bundle.config
        self.device: TorchDevice = device
        self.dtype = dtype or (torch.float16 if device == "cuda" else torch.float32)
        self.half = self.dtype != torch.float32
        with torch.device("meta"):
            self.model = MedMoE(self.config).eval()
        self._load(BundleWeights(bundle, device))
        if device == "cuda":
            self.name = "torch-cuda"
        self._embedding = EmbeddingTable(bundle.path("embedding.npy"))

    def _load(self, weights: BundleWeights) -> None:
        """Give the model on `meta` its weights."""
        if self.half:
            use_kernels(self.model, weights, self.dtype)
        fill(self.model, weights, self.dtype)

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`."""
        return self._embedding[ids]

    def new_cache(self, capacity: int) -> EagerCache:
        """An empty cache for `capacity` positions."""
        return EagerCache(self.config.decoder, 1, capacity, self._weight.to(self.dtype))

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S."""
        with torch.autocast(self.device, self.dtype, enabled=self.half):
            return super().step(embeds, cache)


def use_kernels(model: MedMoE, weights: BundleWeights, dtype: torch.dtype) -> None:
    """Replace the decoder's matrices that the kernels take, and layers of experts made of them."""
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and weights.has_kernel(f"{name}.weight")
    ]
    if not linears:
        return
    from medmoe_edge.kernels.launch import DeltaMoE, StoredLinear, StoredMoE  # needs Triton

    for name, linear in linears:
        bias = None if linear.bias is None else weights.floats(f"{name}.bias").to(dtype)
        stored = weights.for_kernel(f"{name}.weight")
        model.set_submodule(name, StoredLinear(*stored, bias, dtype))
    activation = ACTIVATIONS[model.config.decoder.kind]
    for layer in model.config.moe_layers:
        moe: MoE = model.moe_layer(layer)
        deltas = deltas_of(weights, f"decoder.layers.{layer}.ffn", moe, activation, dtype)
        together = (
            DeltaMoE.of(moe, deltas, activation, dtype)
            if deltas
            else StoredMoE.of(moe, activation, dtype)
        )
        if together is None:
            logger.info("The experts of layer %d differ in format and run one by one.", layer)
        else:
            model.decoder.layers[layer].ffn = together


def deltas_of(
    weights: BundleWeights, owner: str, moe: MoE, activation: str, dtype: torch.dtype
) -> "dict[str, list[list[Expert]]]":
    """Of each matrix the factors of all experts' deltas; empty where they must be made whole."""
    found: dict[str, list[list[Expert]]] = {}
    for part in MATRICES[activation]:
        stems = [f"{owner}.experts.{index}.{part}" for index in range(len(moe.experts))]
        experts = [made for stem in stems if (made := weights.delta(stem, dtype)) is not None]
        if len(experts) < len(stems) or len({len(each) for each in experts}) != 1:
            return {}
        found[part] = [list(factor) for factor in zip(*experts, strict=True)]
    return found


def fill(model: MedMoE, weights: BundleWeights, dtype: torch.dtype) -> None:
    """Give the parameters on `meta` their values, in fp32 or, where that is enough, in `dtype`.

    What the graphs do not read stays there: the embeddings, and a tower's layers behind the chosen.
    """
    matrices = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }

    def value(name: str) -> Tensor:
        tensor = weights.floats(name)
        tensor = tensor.T if name in matrices else tensor  # [in, out] to [out, in]
        return tensor if any(part in name for part in KEPT_FP32) else tensor.to(dtype)

    tensors = {name: value(name) for name, _ in model.named_parameters() if name in weights}
    model.load_state_dict(tensors, strict=False, assign=True)
