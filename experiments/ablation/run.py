"""What each part of the structure is worth, all else being equal.

Every variant has the vision tower of one checkpoint, which does not learn: what it sees of each
view of an image is computed once for all. The projector and a decoder without experts learn from
nothing in phase 1, once; from there each variant trains phases 2 and 3. Then all answer the same
questions on the same runtime.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor, nn

from experiments.ablation.results import (
    Ablation,
    Latency,
    Result,
    Routing,
    Row,
    Size,
    difference,
    read_json,
    read_result,
    write_json,
)
from experiments.ablation.variants import MERGED, VARIANTS, Start, Variant, applicable
from medmoe_edge._types import Floats
from medmoe_edge.atomic import file_sha256
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.data.datasets import Example, LabelledImage, read_examples, read_labels
from medmoe_edge.engine.engine import Engine
from medmoe_edge.errors import DataError, InputError, ResourceError
from medmoe_edge.evaluation.evaluate import (
    Evaluation,
    ModalityAccuracy,
    Score,
    evaluate,
    evaluate_labels,
)
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.models.med_moe import EfficientNetLite, MedMoE
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Decoding, chosen_experts, greedy
from medmoe_edge.runtimes.torch.eager import EagerRuntime
from medmoe_edge.training.data import UNKNOWN, Batches, Pictures, Views
from medmoe_edge.training.initialise import new_dense_model, new_router
from medmoe_edge.training.loop import Session, accelerated
from medmoe_edge.training.phases import (
    Objective,
    align,
    fit_instructions,
    tie_routers,
    untie_routers,
)
from medmoe_edge.training.questions import Asking
from medmoe_edge.training.recipe import PhaseConfig, Recipe
from medmoe_edge.training.report import PRECISION, RunReport
from medmoe_edge.training.router import loaded
from medmoe_edge.training.run import TOKENIZER, data_files, read_corpus, trainable_config

ROUNDS = 24  # questions that latencies are measured on
PIXEL_AXES = 4  # of a batch of images
TOKENS = 8  # decoded in every round, wherever the answer would end


@dataclass(frozen=True)
class Options:
    """What is compared, and how.

    Attributes:
        variants: Names; all that apply where none is given. The others are held against the first.
        epochs: Of phase 2, in place of the recipe's.
        image_tokens: In place of the checkpoint's.
        seed: Of all that is drawn, the start too, in place of the recipe's.
    """

    variants: Sequence[str] = ()
    epochs: int | None = None
    image_tokens: int | None = None
    seed: int | None = None


def ablate(
    recipe: Recipe, checkpoint: Path, data: Path, out: Path, options: Options, progress: Progress
) -> Ablation:
    """Train and evaluate variants of a structure on the tower of a checkpoint.

    Each variant keeps its training state and its result in `out/NAME`, so a second call goes on
    where the first was interrupted; only the latencies, which say something only side by side, are
    measured again. The whole lies in `out/ablation.json` at the end.

    Args:
        recipe: Of the decoder, its experts and the phases; patterns of the tower are left out.
        checkpoint: Whose tower and tokenizer are used.
        data: A folder with the files that the recipe names.
        out: Where the variants are kept.
        options: What is compared.
        progress: Shows how far it is.

    Raises:
        InputError: An unknown variant, or a number of image tokens that cannot be.
        DataError: The recipe or the data cannot be used, or `out` holds another ablation.
    """
    variants = options.variants
    for name in variants:
        if name not in VARIANTS:
            raise InputError(
                f"There is no variant {name!r}.", f"Use some of: {', '.join(VARIANTS)}."
            )
    if len(set(variants)) < len(variants):
        raise InputError("A variant is named twice.", "Name each once.")
    if options.epochs is not None:
        shorter = replace(recipe.instruction, epochs=options.epochs)
        recipe = replace(recipe, instruction=shorter)
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    experiment = _Experiment(recipe, checkpoint, data, out, options.image_tokens, progress)
    chosen = variants or applicable(experiment.config)
    entries = [experiment.entry(name) for name in chosen]  # refuses at once
    task = progress.add_task("variants", total=len(entries))
    for entry in entries:
        experiment.finish(entry)
        progress.advance(task)
    results = [experiment.result(entry) for entry in entries]
    latencies = measure({entry.name: entry.engine for entry in entries}, experiment.examples)
    images = [str(example.image) for example in experiment.examples]
    rows = [
        Row(
            VARIANTS[result.variant].description,
            result,
            latencies[result.variant],
            *difference(result, results[0], images),
        )
        for result in results
    ]
    ablation = Ablation(recipe, tuple(rows))
    write_json(out / "ablation.json", ablation.to_json())
    return ablation


@dataclass(frozen=True)
class _Entry:
    """A variant in its folder: the model to be trained, and the engine that asks it."""

    name: str
    folder: Path
    variant: Variant
    model: MedMoE
    phases: dict[str, PhaseConfig]
    settings: dict[str, Any]
    engine: Engine


class _Grouped(Batches):
    """Batches for experts of several modalities, whose names join theirs."""

    def modality_index(self, name: str | None) -> int:
        """The expert that serves a modality."""
        served = (at for at, own in enumerate(self.modalities) if name in own.split(MERGED))
        return next(served, UNKNOWN)


class _Seen(nn.Module):
    """A tower that does not learn: it takes pixels, or what it gave for them before."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def front(self, pixels: Tensor) -> Tensor:
        """All that the tower sees, `[B, N, C]`, of `[B, 3, S, S]`."""
        seen: Tensor = self.tower(pixels)
        return seen

    def forward(self, images: Tensor) -> Tensor:
        """`[B, N, C]`."""
        return self.front(images) if images.ndim == PIXEL_AXES else images


class _Experiment:
    """What all variants share: the recipe, the model they start from, the data."""

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Path,
        data: Path,
        out: Path,
        image_tokens: int | None,
        progress: Progress,
    ) -> None:
        files = data_files(recipe, data)
        if files.questions is None or files.labels is None or files.validation is None:
            raise DataError(
                f"{data} lacks questions, labels or validation questions.",
                "Give the data that the checkpoint was trained on.",
            )
        if recipe.experts_from != "instruction":
            raise DataError(
                "The recipe's experts begin in phase 3; variants are compared from phase 2 on.",
                'Set experts_from to "instruction".',
            )
        read = read_checkpoint(checkpoint)
        self.tower: Any = _Seen(loaded(read).vision).eval()  # where a tower of a kind is expected
        self.out, self.progress = out, progress
        self.recipe = replace(
            recipe,
            alignment=_without_tower(recipe.alignment),
            instruction=_without_tower(recipe.instruction),
            moe=_without_tower(recipe.moe),
        )
        self.corpus = read_corpus(recipe, data)
        config, self.moe = trainable_config(recipe, self.corpus)
        vision = read.config.vision
        if image_tokens is not None:
            vision = vision.with_tokens(image_tokens)
        self.config = replace(config, vision=vision)
        if recipe.phrases:
            asking = Asking(self.corpus.known, self.config.refusals)
            self.corpus = replace(self.corpus, asking=asking)
        self.examples = read_examples(files.validation)
        labels = read_labels(files.labels)
        self.labels = [item for item in labels if item.split != "train"]
        given = filter(None, (files.questions, files.labels, files.validation, files.findings))
        self.sources = {file.name: _sha256(file) for file in given}
        self.sources |= {"checkpoint": read.sha256(), "image_tokens": str(vision.image_tokens)}
        self.tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER)
        pictures = Pictures(vision)
        tower = cast(EfficientNetLite, self.tower)  # has a front, which is all
        self.views = Views(tower, pictures, max(recipe.views, 1), recipe.seed)
        out.mkdir(parents=True, exist_ok=True)
        start = {
            "preset": recipe.preset,
            "seed": recipe.seed,
            "decoder": config.decoder.to_json(),
            "alignment": self.recipe.alignment.to_json(),
            "sources": self.sources,
        }
        _claim(out, start)  # before phase 1, which all variants in it share
        self.accelerator, _ = accelerated(recipe.precision, out / PRECISION)

    def entry(self, name: str) -> _Entry:
        """A variant before it learns; raises `DataError` where its folder holds another's work."""
        chosen = VARIANTS[name]
        start = self._start()
        torch.manual_seed(self.recipe.seed)  # what a variant draws is the same after a resume
        model = chosen.build(start)
        left = {"instruction": self.recipe.instruction, "moe": self.recipe.moe}
        phases = {
            phase: replace(own, train=chosen.patterns(own.train, model, self.moe.layers))
            for phase, own in left.items()
        }
        settings = {
            "variant": name,
            "preset": self.recipe.preset,
            "seed": self.recipe.seed,
            "phases": {phase: own.to_json() for phase, own in phases.items()},
            "sources": self.sources,
        }
        engine = Engine(_Runtime(model), self.tokenizer, name, "")
        folder = self.out / name
        entry = _Entry(name, folder, chosen, model, phases, settings, engine)
        _claim(entry.folder, settings)
        if _file(entry).exists():
            self.result(entry)
        return entry

    def _start(self) -> Start:
        """What all variants begin with: phase 1 is trained by the first call, and kept."""
        dense = new_dense_model(self.config, self.recipe.seed)
        dense.vision = self.tower
        batches = self._batches(self.moe.expert_names)
        align(dense, self.corpus, self.recipe.alignment, batches, self._session(self.out))
        return Start(dense.cpu(), new_router(self.config, self.recipe.seed), self.config)

    def _batches(self, names: Sequence[str]) -> Batches:
        batches = _Grouped(self.config, self.tokenizer, names, self.recipe.seed)
        batches.reword, batches.views = self.recipe.phrases, self.views
        return batches

    def _session(self, folder: Path) -> Session:
        report = RunReport(folder, self.progress, lambda line: None, tensorboard=False)
        return Session(folder, self.recipe.seed, self.accelerator, report)

    def finish(self, entry: _Entry) -> None:
        """Train and evaluate what has not been done."""
        model, session = entry.model, self._session(entry.folder)
        batches = self._batches(entry.engine.expert_names)
        one_router = entry.variant.names and model.config.moe is not None
        if one_router:
            tie_routers(model)
        objective = Objective(model, None, self.moe.layers)
        for name, phase in entry.phases.items():
            if name == "moe" and one_router:
                untie_routers(model)
            fit_instructions(name, objective, self.corpus, phase, batches, session)
        model.cpu()
        if not _file(entry).exists():
            write_json(_file(entry), asdict(self._evaluated(entry)))

    def result(self, entry: _Entry) -> Result:
        """The variant's finished result; raises `DataError`."""
        return read_result(_file(entry), entry.settings, len(self.examples))

    def _evaluated(self, entry: _Entry) -> Result:
        engine = entry.engine
        task = self.progress.add_task("questions", total=None)
        evaluation = evaluate(
            engine,
            self.examples,
            progress=lambda done, total: self.progress.update(task, completed=done, total=total),
        )
        self.progress.remove_task(task)
        router = {}
        if engine.expert_names:
            router["questions"] = _merged(evaluation.router, engine.expert_names)
        if engine.expert_names and self.labels:
            found = evaluate_labels(engine, self.labels)
            router["labels"] = _merged(found, engine.expert_names)
        return Result(
            variant=entry.name,
            settings=entry.settings,
            size=size_of(entry.model),
            scores=_scores(evaluation),
            router=router,
            routing=routing(engine, self.labels),
            correct=[prediction.correct for prediction in evaluation.predictions],
        )


def _without_tower(phase: PhaseConfig) -> PhaseConfig:
    return replace(phase, train=tuple(name for name in phase.train if "vision." not in name))


def _file(entry: _Entry) -> Path:
    return entry.folder / "result.json"


class _Runtime(EagerRuntime):
    """The torch runtime of a model in memory: not every variant has the layout of a checkpoint."""

    def __init__(self, model: MedMoE) -> None:
        self.config, self.model = model.config, model.eval()


def routing(engine: Engine, images: Sequence[LabelledImage]) -> Routing:
    """How the tokens of images of each modality are spread over the experts; empty if dense."""
    moe = engine.config.moe
    if moe is None:
        return {}
    prefix = engine.tokenizer.prefix_ids()
    shares: dict[str, list[npt.NDArray[np.float64]]] = {}
    for item in images:
        pixels = preprocess(load_image(item.image), engine.config.vision)
        tokens = engine.runtime.encode_image(pixels)
        embeds = np.concatenate((engine.runtime.embed(prefix), tokens))
        step = engine.runtime.step(embeds, engine.runtime.new_cache(len(embeds)))
        chosen = chosen_experts(step.router_logits[len(prefix) :], moe.top_k)
        shares.setdefault(item.modality, []).append(np.eye(moe.num_experts)[chosen].mean((0, 2)))
    return {name: np.mean(found, axis=0).tolist() for name, found in sorted(shares.items())}


def _merged(found: ModalityAccuracy, names: Sequence[str]) -> ModalityAccuracy:
    """An expert of several modalities is right for each of them."""
    serves = {modality: name for name in names for modality in name.split(MERGED)}
    rows = {true: row for true, row in found.confusion.items() if true in serves}
    images = sum(sum(row.values()) for row in rows.values())
    right = sum(row.get(serves[true], 0) for true, row in rows.items())
    return replace(found, images=images, accuracy=right / images if images else None)


def _scores(evaluation: Evaluation) -> dict[str, Score]:
    closed = {"closed": evaluation.closed} if evaluation.closed else {}
    sources = {name: score.overall for name, score in evaluation.by_source.items()}
    return {"all": evaluation.overall, **closed, **sources}


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin a folder, or see that what lies there was made with the same settings."""
    file = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be made ({error.strerror}).", "Choose another output folder."
        ) from error
    if not file.exists() and not any(folder.glob("*.safetensors")):
        write_json(file, settings)
    elif read_json(file) != settings:
        raise DataError(
            f"{folder} was made with another recipe, checkpoint or data.", "Use an empty folder."
        )


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}).",
            "Give a folder with the files that the recipe names.",
        ) from error


def size_of(model: MedMoE) -> Size:
    """Counted from the module, so that layers of any width count as what they are."""
    sizes = {name: parameter.numel() for name, parameter in model.decoder.named_parameters()}
    language = activated = sum(sizes.values())
    if moe := model.config.moe:
        experts = sum(size for name, size in sizes.items() if ".ffn.experts." in name)
        activated -= experts - experts * moe.top_k // moe.num_experts
    tensors = [*model.parameters(), *model.buffers()]
    return Size(
        total=sum(parameter.numel() for parameter in model.parameters()),
        language=language,
        activated=activated,
        bytes=sum(tensor.nbytes for tensor in tensors),
    )


def measure(engines: Mapping[str, Engine], examples: Sequence[Example]) -> dict[str, Latency]:
    """Every engine answers the same questions; they take turns, in changing order."""
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    chosen = [examples[number * len(examples) // ROUNDS] for number in range(ROUNDS)]
    for number, example in enumerate([chosen[0], *chosen]):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            engine = engines[name]
            pixels = preprocess(load_image(example.image), engine.config.vision)
            lap = _answer(engine, pixels, example.question)
            if number:  # the first only warms up
                laps[name].append(lap)
    return {
        name: Latency(median(first for first, _ in own), median(token for _, token in own))
        for name, own in laps.items()
    }


def _answer(engine: Engine, pixels: Floats, question: str) -> tuple[float, float]:
    """Seconds to the first token and per further token."""
    runtime, tokenizer = engine.runtime, engine.tokenizer
    prefix, ids = tokenizer.prefix_ids(), tokenizer.question_ids(question)
    started = time.perf_counter()
    image = runtime.encode_image(pixels)
    embeds = np.concatenate((runtime.embed(prefix), image, runtime.embed(ids)))
    cache = runtime.new_cache(len(embeds) + TOKENS)
    step = runtime.step(embeds, cache)
    first = time.perf_counter()
    on_and_on = Decoding(ends=(), allow_repetition=True)
    for _ in greedy(
        step, lambda token: runtime.step(runtime.embed([token]), cache), on_and_on, limit=TOKENS + 1
    ):
        pass
    return first - started, (time.perf_counter() - first) / TOKENS
