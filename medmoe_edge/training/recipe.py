"""What a training run is: a TOML or JSON recipe of a model, its data and three phases.

Each field says in its metadata what it is for: the schema and `train --show-recipe` are made of it.
"""

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from medmoe_edge._types import once
from medmoe_edge.config import Config, RefusalCode, later
from medmoe_edge.errors import ConfigError, DataError

MIN_VOCABULARY = 257  # one token a byte, and the end of an answer
RecipeT = TypeVar("RecipeT", bound=Config)
PrecisionChoice = Literal["auto", "fp32", "bf16"]


def about(text: str, default: Any = dataclasses.MISSING, *, came_later: bool = False) -> Any:
    """A field of a recipe, and what it is for; `came_later`: as of `config.later`."""
    metadata = {"about": text}
    if came_later:
        return later(default, metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Schedule(Config):
    """What the loop does. `train` lists patterns of parameter names that learn; others are frozen.

    `tower_rate` scales the learning rate of the vision tower, `matrix_rate` that of the matrices
    that Muon trains.
    """

    epochs: int = about("how often all images are seen; 0 leaves the phase out")
    learning_rate: float = about("at its highest, after the warm-up")
    train: tuple[str, ...] = about("patterns of the parameters that learn; all others are frozen")
    tower_rate: float = about("learning rate of the vision tower, as a multiple", 0.1)
    matrix_rate: float = about("learning rate of matrices under Muon, as a multiple", 1.0)
    batch_images: int = about("images in a step", 16)
    accumulation: int = about("steps whose gradients are added up", 1)
    warmup: float = about("share of the phase in which the learning rate rises", 0.05)
    weight_decay: float = about("of matrices", 0.05)
    dropout: float = about("share of each layer's output that is dropped", 0.0)
    optimiser: Literal["muon", "adamw"] = about(
        "of the matrices inside: muon from nothing, adamw for what was trained with it", "muon"
    )
    lora_rank: int = about(
        "0, or the rank of LoRA adapters that learn in place of the decoder's matrices: they "
        "take a fraction of the memory, and are merged when the phase ends",
        0,
    )
    lora_alpha: float = about("what the adapters are scaled by, over their rank", 32.0)

    def __post_init__(self) -> None:
        if self.epochs < 0 or min(self.batch_images, self.accumulation, len(self.train)) < 1:
            raise ConfigError(
                "A phase of the recipe has a count that is too small.",
                "Set batch_images and accumulation to 1 or more; name what to train.",
            )
        rates = (self.learning_rate, self.tower_rate, self.matrix_rate, self.weight_decay)
        if not all(0 <= rate < math.inf for rate in rates):
            raise ConfigError(
                "A phase of the recipe has a rate below 0, or one that is no number.",
                "Check learning_rate, tower_rate, matrix_rate and weight_decay.",
            )
        if not (0 <= self.warmup < 1 and 0 <= self.dropout <= 1):
            raise ConfigError(
                "A phase of the recipe has a share outside 0 to 1.",
                "Check warmup (below 1) and dropout.",
            )
        if self.lora_rank < 0 or not self.lora_alpha > 0:
            raise ConfigError(
                f"A phase of the recipe has lora_rank = {self.lora_rank} and lora_alpha = "
                f"{self.lora_alpha}.",
                "Use a rank of 8 to 64, or 0 for none; alpha is positive.",
            )


@dataclass(frozen=True)
class PhaseConfig(Schedule):
    """One of Med-MoE's phases.

    `labelled_share` is the part of the labelled images that each epoch draws beside the questions.
    """

    label_smoothing: float = about("share of the target spread over all tokens", 0.0)
    router_weight: float = about("of the router's loss, where it is trained jointly", 0.0)
    labelled_share: float = about(
        "share of the labelled images that an epoch draws beside the questions", 1.0
    )
    max_turns: int = about("questions about one image in an epoch", 12)
    asked_share: float = about(
        "share of the questions made of labels and findings that an epoch asks",
        1.0,
        came_later=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_turns < 1:
            raise ConfigError("A phase of the recipe asks nothing.", "Set max_turns to 1 or more.")
        shares = (self.labelled_share, self.label_smoothing, self.asked_share)
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError(
                "A phase of the recipe has a share outside 0 to 1.",
                "Check labelled_share, asked_share and label_smoothing.",
            )


@dataclass(frozen=True)
class DecoderShape(Config):
    """What of the preset's decoder is another."""

    kind: Literal["phi", "stablelm"] | None = about("the family", None)
    hidden_size: int | None = about("channels", None)
    layers: int | None = about("how many; every second one holds experts", None)
    heads: int | None = about("of attention", None)
    intermediate_size: int | None = about("of the feed-forward layers", None)
    rotary_fraction: float | None = about("of a head's channels that rotate", None)
    max_positions: int | None = about("tokens of image, question and answer", None)


@dataclass(frozen=True)
class TowerShape(Config):
    """What of the preset's vision tower is another."""

    kind: Literal["clip", "efficientnet-lite"] | None = about("the family", None)
    variant: Literal["lite0", "lite2"] | None = about("of an EfficientNet-lite", None)
    image_size: int | None = about("side of the image in pixels", None)
    patch_size: int | None = about("side of a CLIP's patches in pixels", None)
    feature_size: int | None = about("channels of a CLIP", None)
    layers: int | None = about("of a CLIP", None)
    heads: int | None = about("of a CLIP", None)
    intermediate_size: int | None = about("of a CLIP", None)
    pad_to_square: bool | None = about("pad an image rather than cut it", None)


@dataclass(frozen=True)
class BorderConfig(Config):
    """Where yes ends and no begins for findings: fitted to images that no phase learns from.

    A model knows the images that it learned from by heart, rare findings most of all, and leans to
    no where it sees others. See `training.border`.
    """

    share: float = about("of the patients in the file of findings that are kept for it")
    penalty: float = about("of the squares of what the output's rows change by", 0.001)

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and self.penalty > 0):
            raise ConfigError(
                f"The recipe's border has share {self.share} and penalty {self.penalty}.",
                "Use a share such as 0.15, and a penalty above 0.",
            )


@dataclass(frozen=True)
class Recipe(Config):
    """A whole run: which model, which data (relative to the data folder), which phases."""

    alignment: PhaseConfig = about("phase 1: the projector learns the decoder's language")
    instruction: PhaseConfig = about("phase 2: the model learns to answer, the router to route")
    moe: PhaseConfig = about("phase 3: the experts specialise; the router is frozen")
    tower: PhaseConfig | None = about(
        "before the phases: the vision tower learns to see what labels, findings and frequent "
        "questions say of the images",
        None,
        came_later=True,
    )
    preset: str | None = about(
        "the model's shape, by the name of a preset; left out where the run starts from a "
        "checkpoint",
        None,
    )
    seed: int = about("of the first weights and of all draws", 0)
    precision: PrecisionChoice = about(
        "of the products: auto takes what this processor does fastest", "auto"
    )
    vocab_size: int | None = about(
        f"tokens of the tokenizer, which is trained on the questions: {MIN_VOCABULARY} or "
        "more; left out, the preset's; a checkpoint brings its own tokenizer",
        None,
    )
    modalities: tuple[str, ...] | None = about(
        "one expert each, in this order; left out, those of the data", None
    )
    top_k: int | None = about("experts that see a token: 1 or 2; left out, the preset's", None)
    moe_layers: tuple[int, ...] | None = about(
        "the decoder's layers that hold experts; left out, the preset's", None
    )
    router: Literal["joint", "fitted"] = about(
        "joint: the router learns in the instruction phase, by router_weight; fitted: it is "
        "fitted to the labelled images after that phase",
        "joint",
    )
    experts_from: Literal["moe", "instruction"] = about(
        "the phase that begins with experts: moe as in the paper; instruction makes them of "
        "the feed-forward after the alignment, so that they differ more in the end",
        "moe",
        came_later=True,
    )
    views: int = about(
        "0: every epoch sees images changed at random; else so many views of each image are "
        "kept as the first stages of the tower see them, which must be frozen",
        0,
        came_later=True,
    )
    moved: bool = about(
        "change what the front saw in a view a little, anew in each epoch, as images are "
        "changed where no views are kept",
        False,
        came_later=True,
    )
    pools: tuple[int, ...] | None = about(
        "sides of the squares of image tokens that are averaged into one, of which each batch "
        "takes one at random: with 1 and 2 the model learns to answer from a quarter too; left "
        "out, the model's own",
        None,
        came_later=True,
    )
    border: BorderConfig | None = about(
        "after the phases: where yes ends and no begins, for findings", None, came_later=True
    )
    phrases: bool = about(
        "ask what labels and findings say in many wordings, as often with yes as with no, and "
        "the questions of question files in other words too",
        False,
        came_later=True,
    )
    questions: str | None = about("to train on; left out, train.jsonl", None)
    labels: str | None = about("of images; left out, labels.jsonl", None)
    findings: str | None = about("of images; left out, findings.jsonl", None, came_later=True)
    validation: str | None = about("questions to watch; left out, val.jsonl", None)
    refusals: tuple[RefusalCode, ...] | None = about(
        "why a question can have no answer, each a token of its own: not_a_scan, "
        "not_answerable, language; left out, none; a checkpoint brings its own",
        None,
        came_later=True,
    )
    decoder: DecoderShape | None = about("what of the preset's decoder is another", None)
    vision: TowerShape | None = about("what of the preset's tower is another", None)

    def __post_init__(self) -> None:
        least = MIN_VOCABULARY + len(self.refusals or ())
        if self.vocab_size is not None and self.vocab_size < least:
            raise ConfigError(
                f"The recipe's vocab_size is {self.vocab_size}.",
                f"Use {least} or more: one token for each byte, the end and each refusal.",
            )
        if self.views < 0:
            raise ConfigError(f"The recipe's views are {self.views}.", "Use 0 or more.")
        if self.moved and not self.views:
            raise ConfigError(
                "The recipe moves views, and keeps none.",
                "Set views, or leave moved out: without views each epoch moves images anew.",
            )
        if self.pools is not None and (not self.pools or min(self.pools) < 1):
            raise ConfigError(
                f"The recipe's pools are {list(self.pools)}.", "Use [1], or [1, 2] to learn both."
            )
        names = self.modalities
        if names is not None and (not names or len(set(names)) < len(names) or not all(names)):
            raise ConfigError(
                "The recipe's modalities are none, empty or twice the same.",
                "Name each once, or leave modalities out to take those of the data.",
            )


def read_recipe(name_or_path: str) -> Recipe:
    """A Med-MoE recipe that ships with the package, by name, or a TOML or JSON file."""
    return recipe_of(Recipe, name_or_path)


def recipe_of(kind: type[RecipeT], name_or_path: str) -> RecipeT:
    """A recipe of a kind, as of `read_recipe`; raises `DataError`, which names it."""
    try:
        return kind.from_json(recipe_json(name_or_path), "recipe")
    except ConfigError as error:
        raise DataError(f"The recipe {name_or_path!r}: {error.what}", error.remedy) from error


def shipped_recipes() -> list[str]:
    """The names of the recipes in the package."""
    folder = files("medmoe_edge.training").joinpath("recipes")
    return sorted(
        file.name.removesuffix(".json")
        for file in folder.iterdir()
        if file.name.endswith(".json") and not file.name.endswith(".schema.json")
    )


def recipe_json(name_or_path: str) -> dict[str, Any]:
    """The content of a shipped recipe or of a file, not yet checked; raises `DataError`."""
    shipped = files("medmoe_edge.training").joinpath("recipes", f"{name_or_path}.json")
    try:
        source = shipped if shipped.is_file() else Path(name_or_path)
        text = source.read_text(encoding="utf-8-sig")
        is_json = text.lstrip()[:1] in ("{", "")
        data = json.loads(text, object_pairs_hook=once) if is_json else tomllib.loads(text)
    except FileNotFoundError as error:
        raise DataError(
            f"There is no recipe {name_or_path!r}.",
            f"Give a TOML or JSON file, or one of: {', '.join(shipped_recipes())}.",
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise DataError(
            f"The recipe {name_or_path!r} is not valid TOML ({error}).", "Correct that place."
        ) from error
    except (OSError, UnicodeError, RecursionError) as error:
        raise DataError(
            f"The recipe {name_or_path!r} cannot be read.",
            f"Give a TOML or JSON file, or one of: {', '.join(shipped_recipes())}.",
        ) from error
    except ValueError as error:
        raise DataError(
            f"The recipe {name_or_path!r} is not valid JSON ({error}).", "Correct that place."
        ) from error
    if not isinstance(data, dict) or not data:
        raise DataError(
            f"The recipe {name_or_path!r} is empty or no object.",
            "See one with: medmoe-edge train --show-recipe nano",
        )
    return data


def as_toml(recipe: Config) -> str:
    """The recipe as TOML, each key with what it is for; what has no value is commented out."""
    return "\n".join(_toml_lines(recipe, "")) + "\n"


def _toml_lines(config: Config, path: str) -> Iterator[str]:
    fields = dataclasses.fields(config)
    values = {each.name: getattr(config, each.name) for each in fields}
    for each in fields:
        if _config_type(typing.get_type_hints(type(config))[each.name]) is None:
            yield f"# {each.metadata.get('about', each.name.replace('_', ' '))}"
            value = values[each.name]
            yield f"# {each.name} =" if value is None else f"{each.name} = {_toml_value(value)}"
    for each in fields:
        kind = _config_type(typing.get_type_hints(type(config))[each.name])
        if kind is not None:
            yield ""
            yield f"# {each.metadata.get('about', each.name)}"
            value = values[each.name]
            yield f"{'# ' if value is None else ''}[{path}{each.name}]"
            if value is None:
                yield from (f"# {part.name} =" for part in dataclasses.fields(kind))
            else:
                yield from _toml_lines(value, f"{path}{each.name}.")


def _toml_value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _config_type(hint: Any) -> type[Config] | None:
    """The configuration that a field holds, perhaps; None where it holds plain values."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Config)), None)
