"""`medmoe-edge train`: a recipe and a data folder in, a checkpoint in the official layout out.

The tokenizer is a small byte-level BPE, trained on the questions and answers that the model meets.
"""

import hashlib
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import filter as filter_names
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from rich.progress import Progress
from torch import nn

from medmoe_edge.atomic import check_apart, check_target
from medmoe_edge.checkpoint.keys import expected_parameters
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint, write_checkpoint
from medmoe_edge.config import (
    Config,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    Refusal,
    VisionConfig,
)
from medmoe_edge.data.datasets import (
    FINDINGS_FILE,
    LABELS_FILE,
    QUESTION_FILES,
    Finding,
    LabelledImage,
    questions_of,
    read_examples,
    read_findings,
    read_labels,
)
from medmoe_edge.errors import DataError, ResourceError
from medmoe_edge.models.med_moe import (
    FRONT_STAGES,
    EfficientNetLite,
    feature_size,
)
from medmoe_edge.presets import PRESETS
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.training.border import border_findings, border_tokens, fit_border, set_aside
from medmoe_edge.training.data import (
    Batches,
    as_labelled,
    captions,
    check_pictures,
    from_examples,
    instructions,
)
from medmoe_edge.training.initialise import (
    new_dense_model,
    new_router,
    train_tokenizer,
)
from medmoe_edge.training.loop import Session
from medmoe_edge.training.phases import (
    ROUTER,
    Corpus,
    align,
    expand,
    instruct,
    keeps_router,
    route,
    specialise,
    upcycle,
)
from medmoe_edge.training.questions import (
    Asking,
    facts_of_examples,
    facts_of_findings,
    facts_of_labels,
)
from medmoe_edge.training.recipe import MIN_VOCABULARY, PhaseConfig, Recipe
from medmoe_edge.training.report import PRECISION, Planned, TrainOptions, begin_run
from medmoe_edge.training.router import loaded, settle
from medmoe_edge.training.tower import teach_tower, what_is_seen

PHASES = ("alignment", "instruction", "moe")
TOKENIZER = "tokenizer.json"
FRONT = ("vision.stem.", *(f"vision.stages.{index}." for index in range(FRONT_STAGES)))


def train(
    recipe: Recipe, data: Path, out: Path, progress: Progress, options: TrainOptions | None = None
) -> Path:
    """Run the three phases; returns the checkpoint folder `out/checkpoint`.

    `data` is a dataset folder, or a question file alone. Each phase saves its state in `out` after
    every epoch, so a second call goes on where the first was interrupted. Runs under
    `accelerate launch` unchanged.

    Raises `DataError` for a recipe, data or a state that cannot be used, `ConfigError` for an
    impossible model, `InputError` where `out/checkpoint` is something else, and as
    `read_checkpoint` does where it starts from a checkpoint.
    """
    options = options or TrainOptions()
    recipe = _with_options(recipe, options)
    folder = out / "checkpoint"
    check_target(folder, force=True, marker="config.json")  # refused here, not after the phases
    check_apart(folder, options.base, options.vision_tower, around=(data,))
    corpus = read_corpus(recipe, data)
    read = None
    if options.base is not None:
        read = read_checkpoint(options.base, vision_tower=options.vision_tower)
        config, moe = continued_config(recipe, read, corpus)
    else:
        config, moe = trainable_config(recipe, corpus)
    if recipe.phrases:
        corpus = replace(corpus, asking=Asking(corpus.known, config.refusals))
    check_trainable(recipe, config, corpus, dense=read is None or read.config.moe is None)
    check_memory(recipe, config)
    with PartialState().main_process_first():
        told = {
            "recipe": recipe.to_json(),
            "base": read.sha256() if read else None,
            "data": _digest(corpus),
        }
        begin_run(out, told, ("tower", *PHASES), (TOKENIZER, PRECISION, ROUTER))
    session = Session.begin(
        out, recipe.seed, progress, recipe.precision, options.say, tensorboard=options.tensorboard
    )
    texts = [turn for c in [*corpus.questions, *corpus.captions] for turn in c.turns]
    if corpus.asking is not None:
        order = random.Random(recipe.seed)
        texts += [turn for own in corpus.asking.epoch(order, 1.0, 1.0) for turn in own]
    tokenizer_file = session.once(
        TOKENIZER,
        lambda file: (
            read.tokenizer.write(file)
            if read
            else train_tokenizer(texts, config.decoder.vocab_size, file, config.refusals)
        ),
    )
    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.check_vocabulary(config.decoder.vocab_size)
    if recipe.border is not None:
        border_tokens(tokenizer)  # refused here, not after the phases
    batches = Batches(config, tokenizer, moe.expert_names, recipe.seed)
    batches.reword = recipe.phrases
    batches.moved = recipe.moved
    batches.take_pools(recipe.pools or (config.vision.pool,))
    session.report.plan(planned(recipe, corpus))
    session.say(
        f"{moe.num_experts} experts: {', '.join(moe.expert_names) or 'unnamed'}; "
        f"{len({c.image for c in corpus.everything})} images to learn from."
    )

    if read is None:
        model = new_dense_model(config, recipe.seed)
    else:
        model = loaded(read)
        if read.config.moe is not None:
            model = expand(model, config, corpus, batches)
    if recipe.views:
        batches.keep_views(with_front(model.vision), recipe.views)
    if recipe.tower is not None:
        teach_tower(
            model,
            corpus.seen,
            corpus.seen_held_out,
            recipe.tower,
            batches,
            session,
            new_projector=read is None,
        )
    align(model, corpus, recipe.alignment, batches, session)
    if recipe.experts_from == "instruction" and model.config.moe is None:
        model = upcycle(model, new_router(config, recipe.seed), config)
    router = instruct(model, moe, corpus, recipe, batches, session)
    if recipe.experts_from == "moe":
        model = route(model, router, config, corpus, batches, session)
    specialise(model, corpus, recipe.moe, batches, session)
    if not keeps_router(model, moe, corpus):
        close, left = settle(model, batches.prefix)
        settled = f"{close - left} of {close} close choices"
        session.say(f"Settled {settled} of the tokens that begin every prompt.")
    if recipe.border is not None:
        asking = Asking(corpus.border, config.refusals)
        fit_border(model, asking, corpus.questions, recipe.border, batches, session)
    if session.accelerator.is_main_process:
        write_checkpoint(
            folder, config, model.state_dict().items(), tokenizer_file=tokenizer_file, force=True
        )
    session.report.close()
    return folder


def with_front(tower: nn.Module) -> EfficientNetLite:
    """The tower as one that has a front."""
    assert isinstance(tower, EfficientNetLite)  # check_trainable has seen to it
    return tower


def check_trainable(recipe: Recipe, config: ModelConfig, corpus: Corpus, *, dense: bool) -> None:
    """Raise `DataError` for what a later phase would stumble over; `dense` before the third.

    That is a pattern that matches no parameter, and what a router or a border has no images to be
    fitted to.
    """
    experts = expected_parameters(config)
    early = expected_parameters(replace(config, moe=None)) if dense else experts
    router = {} if recipe.router == "fitted" else {"router.weight": (), "router.bias": ()}
    instructed = experts if recipe.experts_from == "instruction" else early | router
    outputs: dict[str, tuple[int, ...]] = {"everywhere.weight": (), "somewhere.weight": ()}
    for phase, names in (
        (recipe.tower, early | outputs),
        (recipe.alignment, early),
        (recipe.instruction, instructed),
        (recipe.moe, experts),
    ):
        for pattern in phase.train if phase is not None and phase.epochs else ():
            if not filter_names(names, pattern):
                raise DataError(
                    f"The recipe trains {pattern!r}, which matches no parameter.", "Correct it."
                )
    if recipe.views:
        _check_front(recipe, config, experts)
    if recipe.border is not None:
        border_findings(corpus.border)
    taught = {answer for each in corpus.questions for _, answer in each.turns}
    untaught = [each.code for each in config.refusals if each.token not in taught]
    if recipe.refusals and corpus.asking is None and untaught:
        raise DataError(
            f"Nothing teaches the recipe's refusals {', '.join(untaught)}.",
            "Set phrases to true, or give questions whose answers are these tokens.",
        )
    named = config.moe.expert_names if config.moe else ()
    without = [name for name in named if name not in corpus.modalities]
    keeps_router = not dense and set(corpus.modalities) < set(named)
    if without and recipe.router == "fitted" and not keeps_router:
        raise DataError(
            f"There is no labelled image of {', '.join(without)}, which an expert is to be for.",
            "Label some, or leave these modalities out of the recipe.",
        )


def _check_front(recipe: Recipe, config: ModelConfig, names: Iterable[str]) -> None:
    """Raise `DataError` where views cannot be kept: the tower's front must exist and not learn."""
    if config.vision.kind != "efficientnet-lite":
        raise DataError(
            f"The recipe keeps views, which a tower of the kind {config.vision.kind!r} has no "
            "front for.",
            "Set views to 0.",
        )
    front = [name for name in names if name.startswith(FRONT)]
    for phase in (recipe.tower, recipe.alignment, recipe.instruction, recipe.moe):
        for pattern in phase.train if phase is not None and phase.epochs else ():
            if filter_names(front, pattern):
                raise DataError(
                    f"The recipe keeps views, and trains {pattern!r}, which is part of what they "
                    "are made with.",
                    f"Set views to 0, or train stages from {FRONT_STAGES} on alone.",
                )


def check_memory(recipe: Recipe, config: ModelConfig) -> None:
    """Raise `ResourceError` where weights and optimiser alone need more than is free.

    A weight takes 4 bytes, one that learns 12 more: its gradient and Adam's two moments.
    """
    sizes = {name: math.prod(shape) for name, shape in expected_parameters(config).items()}
    most = 0
    for phase in filter(None, (recipe.tower, recipe.alignment, recipe.instruction, recipe.moe)):
        learning = {name for pattern in phase.train for name in filter_names(sizes, pattern)}
        if phase.lora_rank:  # adapters are a few thousandths of the matrices
            learning = {name for name in learning if not name.startswith("decoder.")}
        if phase.epochs:
            most = max(most, sum(sizes[name] for name in learning))
    needed = 4 * sum(sizes.values()) + 12 * most
    device = PartialState().device
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if needed > free:
        lora = recipe.instruction.lora_rank and recipe.moe.lora_rank
        raise ResourceError(
            f"Training takes {needed / 1e9:.1f} GB and more, {free / 1e9:.1f} GB are free.",
            "Use a larger machine." if lora else "Train adapters instead: add --lora 16.",
        )


def _with_options(recipe: Recipe, options: TrainOptions) -> Recipe:
    if options.vision_tower is not None and options.base is None:
        raise DataError(
            "A vision tower was given, and no checkpoint to start from that lacks it.",
            "Add --from CHECKPOINT, or leave --vision-tower out.",
        )
    if options.precision is not None:
        recipe = replace(recipe, precision=options.precision)
    if options.lora_rank is not None:
        recipe = replace(
            recipe,
            instruction=replace(recipe.instruction, lora_rank=options.lora_rank),
            moe=replace(recipe.moe, lora_rank=options.lora_rank),
        )
    if options.base is None and recipe.preset is None:
        raise DataError(
            "The recipe names no preset, and no checkpoint to start from was given.",
            "Add --from CHECKPOINT, or a preset to the recipe.",
        )
    return recipe


def _digest(corpus: Corpus) -> str:
    """A hash of what is learned from: the names of images, and all that is known about them."""
    digest = hashlib.sha256()
    for each in corpus.everything:
        digest.update(f"{each.image.name}|{each.modality}|{each.turns}\n".encode())
    for facts in (*(corpus.known if corpus.asking is not None else ()), *corpus.border):
        digest.update(f"{facts.image.name}|{facts.told()}\n".encode())
    return digest.hexdigest()


def planned(recipe: Recipe, corpus: Corpus) -> list[Planned]:
    """How many images each phase sees an epoch."""

    def drawn(phase: PhaseConfig) -> int:
        if corpus.asking is not None:
            return len(corpus.asked(random.Random(recipe.seed), phase))
        return int(len(corpus.classification) * phase.labelled_share)

    questions = len(corpus.questions)
    return [
        Planned("alignment", recipe.alignment.epochs, len(corpus.captions)),
        *(
            Planned(name, phase.epochs, questions + drawn(phase))
            for name, phase in (("instruction", recipe.instruction), ("moe", recipe.moe))
        ),
    ]


def trainable_config(recipe: Recipe, corpus: Corpus | None = None) -> tuple[ModelConfig, MoEConfig]:
    """The model that a recipe trains from nothing, and its experts.

    Experts are named by the recipe, else after the modalities of the data, else by the preset.
    Raises `DataError` where it cannot be trained, `ConfigError` where it cannot be at all.
    """
    preset = PRESETS.get(recipe.preset or "")
    if preset is None:
        raise DataError(
            f"The recipe's preset {recipe.preset!r} is none.", f"Use one of: {', '.join(PRESETS)}."
        )
    decoder = _other(preset.decoder, recipe.decoder)
    if recipe.vocab_size is not None:
        decoder = replace(decoder, vocab_size=recipe.vocab_size)
    refusals = _refusals(recipe)
    least = MIN_VOCABULARY + len(refusals)
    if decoder.vocab_size < least:
        raise DataError(
            f"The preset {recipe.preset!r} has {decoder.vocab_size} tokens, fewer than bytes and "
            "special tokens.",
            f"Add vocab_size to the recipe: {least} or more.",
        )
    # the tokenizer that is trained gives the end of an answer the first id
    decoder = replace(decoder, eos_token_id=0, bos_token_id=None)
    vision = _other(preset.vision, recipe.vision)
    if vision.kind == "efficientnet-lite" and (recipe.vision and not recipe.vision.feature_size):
        vision = replace(vision, feature_size=feature_size(vision.variant))
    names = recipe.modalities or (corpus.modalities if corpus else ())
    if not names:
        names = preset.moe.expert_names if preset.moe else ()
    if not names:
        raise _no_modalities()
    kept = preset.moe or MoEConfig(layers=(0,))
    layers = kept.layers
    if preset.moe is None or (recipe.decoder and recipe.decoder.layers):
        layers = tuple(range(0, decoder.layers, 2))
    moe = replace(
        kept,
        layers=recipe.moe_layers or layers,
        num_experts=len(names),
        top_k=min(recipe.top_k or kept.top_k, len(names)),
        expert_names=tuple(names),
    )
    return ModelConfig(vision, decoder, moe, refusals), moe


def _refusals(recipe: Recipe) -> tuple[Refusal, ...]:
    return tuple(Refusal(code, f"<|{code}|>") for code in recipe.refusals or ())


def continued_config(
    recipe: Recipe, read: Checkpoint, corpus: Corpus
) -> tuple[ModelConfig, MoEConfig]:
    """The model that a recipe makes of a checkpoint: its own, with experts for the modalities.

    Raises `DataError` for what a checkpoint decides, where the recipe says otherwise, and where
    nothing says the modalities that a checkpoint without experts is to learn.
    """
    for name in ("preset", "vocab_size", "refusals", "decoder", "vision"):
        if getattr(recipe, name) is not None:
            raise DataError(
                f"The recipe says {name!r}, which the checkpoint decides.",
                "Leave it out of the recipe, or leave --from out.",
            )
    config, old = read.config, read.config.moe
    found = recipe.modalities or corpus.modalities
    if old is not None and set(found) <= set(old.expert_names):
        names = old.expert_names  # also where the data is of some of them alone
    elif found:
        names = tuple(found)
    elif old is None:
        raise _no_modalities()
    else:
        names = old.expert_names
    base = old or MoEConfig(layers=tuple(range(0, config.decoder.layers, 2)))
    if old is not None and recipe.moe_layers not in (None, old.layers):
        raise DataError(
            f"The recipe puts experts into the layers {list(recipe.moe_layers or ())}, the "
            f"checkpoint has them in {list(old.layers)}.",
            "Leave moe_layers out of the recipe.",
        )
    count = len(names) or base.num_experts
    moe = replace(
        base,
        layers=recipe.moe_layers or base.layers,
        num_experts=count,
        top_k=min(recipe.top_k or base.top_k, count),
        expert_names=tuple(names),
    )
    return replace(config, moe=moe), moe


def _no_modalities() -> DataError:
    return DataError(
        "No image of the data says its modality, and the router learns to tell modalities apart.",
        "Label images (medmoe-edge data labels), or add 'modality' to the questions.",
    )


Part = TypeVar("Part", VisionConfig, DecoderConfig)


def _other(preset: Part, changes: Config | None) -> Part:
    """A part of the preset with what the recipe says of it."""
    given = vars(changes).items() if changes else ()
    return replace(preset, **{name: value for name, value in given if value is not None})


@dataclass(frozen=True)
class DataFiles:
    """The files that a run reads; each may be absent, but not all that one can learn from."""

    questions: Path | None
    labels: Path | None
    validation: Path | None
    findings: Path | None


def data_files(recipe: Recipe, data: Path) -> DataFiles:
    """Those that the recipe names, else those of the usual names; `data` may be a question file.

    Raises `DataError` where there is neither a question file nor one of labels.
    """
    named = (recipe.questions, recipe.labels, recipe.validation, recipe.findings)
    if data.is_file():
        others = [data.parent / name if name else None for name in named[1:]]
        return DataFiles(data, *others)
    if not data.is_dir():
        raise DataError(f"{data} does not exist.", "Give a dataset folder or a question file.")
    labels, findings = data / LABELS_FILE, data / FINDINGS_FILE
    usual = (
        questions_of(data, "train"),
        labels if labels.is_file() else None,
        questions_of(data, "val"),
        findings if findings.is_file() else None,
    )
    found = DataFiles(
        *(data / name if name else file for name, file in zip(named, usual, strict=True))
    )
    if found.questions is None and found.labels is None and found.findings is None:
        raise DataError(
            f"{data} holds no questions ({QUESTION_FILES['train'][0]}), no labels "
            f"({LABELS_FILE}) and no findings ({FINDINGS_FILE}).",
            "Make them with: medmoe-edge data",
        )
    return found


def read_corpus(recipe: Recipe, data: Path) -> Corpus:
    """All conversations of the data; what is labelled `val` or `test` is not learned from.

    Raises `DataError` as `data_files` does, and where nothing is to be learned from.
    """
    files = data_files(recipe, data)
    examples = read_examples(files.questions, check_images=True) if files.questions else []
    labelled = read_labels(files.labels, check_images=True) if files.labels else []
    findings = read_findings(files.findings, check_images=True) if files.findings else []
    learned = {each.image for each in labelled} | {
        named for each in examples for named in (each.image, each.patient)
    }
    kept, findings = set_aside(findings, recipe.border.share if recipe.border else 0.0, learned)
    shown = [*labelled, *as_labelled(findings)]
    trained = [item for item in shown if item.split == "train"]
    if not examples and not trained:
        raise DataError(
            f"{files.labels or files.findings} labels no image to train on.",
            "Give some of them the split train.",
        )
    held = read_examples(files.validation, check_images=True) if files.validation else []
    told: list[LabelledImage | Finding] = [*labelled, *findings]
    check_pictures(
        [*examples, *kept, *(each for each in told if each.split == "train")],
        [*held, *(each for each in told if each.split != "train")],
    )
    validation = from_examples(held) or instructions(item for item in shown if item.split == "val")
    questions = from_examples(examples)
    known, known_held = (
        [
            *facts_of_labels(item for item in labelled if item.split == split),
            *facts_of_findings(item for item in findings if item.split == split),
            *facts_of_examples(asked),
        ]
        for split, asked in (("train", examples), ("val", held))
    )
    return Corpus(
        # without a label, what is asked and answered aligns too, as in the official first phase
        captions=captions(trained, examples) or questions,
        questions=questions,
        classification=instructions(trained),
        validation=validation,
        known=known,
        seen=what_is_seen(known, examples),
        seen_held_out=what_is_seen(known_held, held),
        border=facts_of_findings(kept),
    )
