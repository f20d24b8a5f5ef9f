"""A checkpoint in PyTorch, uncompiled: the reference that every other runtime is held against.

And with its decoder's matrices as bitsandbytes stores them, the baseline of our own formats. nf4:
4-bit normal floats in blocks of 64 with fp32 scales (QLoRA, arXiv 2305.14314); int8: a scale per
output channel and per token (LLM.int8(), arXiv 2208.07339), without its outlier columns.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from medmoe_edge._types import Floats
from medmoe_edge.calibration.statistics import input_of
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.errors import ResourceError, needs
from medmoe_edge.models.contrastive import ModalityMoE
from medmoe_edge.models.decoder import KVCache
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.runtimes.base import Cache, CacheArray, Step, check_room
from medmoe_edge.runtimes.contrastive import ImageFeatures, TextFeatures, TextReader

TorchDevice = Literal["cpu", "cuda"]
Kind = Literal["nf4", "int8"]  # of bitsandbytes' matrices
ROUTER = ".router."


class EagerCache(KVCache):
    """The model's own cache."""

    @property
    def capacity(self) -> int:
        """Positions it can hold."""
        return int(self.keys.shape[3])

    @property
    def origin(self) -> str:
        """What computes its contents."""
        return f"torch {torch.__version__} {self.keys.device.type}"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of `arrays`."""
        return self.keys.new_empty(0, device="cpu").numpy().dtype

    def arrays(self) -> Iterator[CacheArray]:
        """What it holds, `[H, length, head_size]`: keys and values of each layer in turn."""
        for buffer in self._buffers():
            yield buffer[:, : self.length].cpu().numpy()

    def fill(self, arrays: Iterable[CacheArray]) -> None:
        """Hold those instead; their number, shape and type must be right."""
        for buffer, array in zip(self._buffers(), arrays, strict=True):
            buffer[:, : array.shape[1]] = torch.from_numpy(array)
            self.length = array.shape[1]

    def _buffers(self) -> Iterator[torch.Tensor]:
        for keys, values in zip(self.keys, self.values, strict=True):  # [1, H, capacity, head_size]
            yield from (keys[0], values[0])


class EagerRuntime:
    """On the CPU in fp32, or as asked; routers are fp32 always.

    Raises `ResourceError` for a CUDA that PyTorch does not have.
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: TorchDevice = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_device(device)
        self.config = checkpoint.config
        with torch.device("meta"):
            self.model = MedMoE(self.config)
        tensors = {
            name: tensor.to(device, torch.float32 if ROUTER in name else dtype)
            for name, tensor in checkpoint
        }
        self.model.load_state_dict(tensors, assign=True)
        self.model.eval()
        if device == "cuda":
            self.name = "torch-cuda"

    @torch.inference_mode()
    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`."""
        return _array(self.model.encode_image(self._tensor(pixels))[0])

    @torch.inference_mode()
    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`."""
        return _array(self.model.embed(torch.tensor(ids, device=self._weight.device)))

    def new_cache(self, capacity: int) -> EagerCache:
        """An empty cache for `capacity` positions."""
        return EagerCache(self.config.decoder, 1, capacity, self._weight)

    @torch.inference_mode()
    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S."""
        assert isinstance(cache, EagerCache)
        check_room(cache, len(embeds))
        output = self.model(self._tensor(embeds)[None], cache)
        logits = _array(self.model.head(output.hidden[0, -1:]))[0]
        if self.config.moe is None:
            return Step(logits, np.zeros((len(embeds), 0, 0), np.float32))
        return Step(logits, _array(self.model.router_logits(output)[0]))

    @property
    def _weight(self) -> torch.Tensor:
        """One that has the device and type of all that is computed."""
        return self.model.decoder.norm.weight

    def _tensor(self, array: Floats) -> torch.Tensor:
        return torch.from_numpy(array).to(self._weight)


def check_device(device: TorchDevice) -> None:
    """Raise `ResourceError` for a CUDA that PyTorch does not have."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            f"PyTorch {torch.__version__} sees no CUDA device.",
            "Use the CPU, or see what is missing: medmoe-edge doctor",
        )


def _array(tensor: torch.Tensor) -> Floats:
    return tensor.float().cpu().numpy()


def bitsandbytes() -> Any:
    """bitsandbytes' modules, which its types do not name as exported.

    Raises `MissingDependencyError` where it is not installed.
    """
    # It warns of kernels it would download, and at every int8 product that fp32 becomes fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    unheard = warnings.catch_warnings(action="ignore", category=DeprecationWarning)  # torch.jit's
    with needs("baselines"), unheard:
        import bitsandbytes.nn
    return bitsandbytes.nn


class BitsAndBytesRuntime(EagerRuntime):
    """The eager runtime with every decoder matrix that our quantisers quantise held in `kind`.

    Routers, coefficients, norms, embeddings and the vision tower stay fp32, and so does the
    arithmetic of nf4; that of int8 is on integers, as the library has it. Weights reach the device
    one by one, quantised. Raises `ResourceError` for a CUDA that PyTorch does not have, and
    `MissingDependencyError` without bitsandbytes.
    """

    def __init__(self, checkpoint: Checkpoint, kind: Kind, device: TorchDevice = "cpu") -> None:
        check_device(device)
        super().__init__(checkpoint)
        self.name = f"bitsandbytes-{kind}" + "-cuda" * (device == "cuda")
        linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and input_of(f"{name}.weight")
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
    library = bitsandbytes()
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


class ModalityTorchRuntime:
    """On the CPU in fp32."""

    name = "torch"

    def __init__(self, model: ModalityMoE, reader: TextReader) -> None:
        self.model, self.config, self._reader = model, model.config, reader
        self.check_whole = reader.check_whole

    @torch.inference_mode()
    def encode_images(self, pixels: Floats) -> ImageFeatures:
        """Normalised pixels `[B, 3, S, S]` to features; of each image only its own expert runs."""
        found = self.model.encode_image(torch.from_numpy(pixels))
        return ImageFeatures(*(part.numpy() for part in found))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Features of each text; raises `InputError` for a text without a word."""
        found = self.model.encode_text(*map(torch.from_numpy, self._reader.encode(texts)))
        return TextFeatures(found.words.numpy(), found.pooled.numpy(), found.mask.numpy())
