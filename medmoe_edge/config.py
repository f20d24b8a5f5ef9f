"""What a model is, as frozen dataclasses that read and write JSON.

Shape letters used throughout: B batch, S sequence, T tokens (B*S flattened), D hidden size,
F feed-forward size, E experts, K top-k, H heads, V vocabulary, N image tokens.
"""

import bisect
import dataclasses
import itertools
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self

from medmoe_edge.errors import LATER, ConfigError, InputError, Told, did_you_mean

MOST = 2**24  # of anything counted: a bound against absurd files, not on models

RuntimeName = Literal["auto", "onnxruntime", "tensorrt", "torch"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "int8", "int4", "mixed"]
Method = Literal["auto", "rtn"]
GroupSize = Literal[32, 64, 128]
VisionScales = Literal["groups", "tokens"]


def later(default: Any, metadata: Mapping[str, Any] | None = None) -> Any:
    """A field that came later: left out of the JSON where it has its default.

    So what was written before it came keeps its bytes.
    """
    return dataclasses.field(default=default, metadata={**(metadata or {}), LATER: True})


@dataclasses.dataclass(frozen=True)
class Config(Told):
    """Base of the configurations: strict JSON in, plain JSON out."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "config") -> Self:
        """Build from parsed JSON; unknown, missing and mistyped keys raise `ConfigError`."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must be an object.", "Check the file's structure.")
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in data:
            if key not in fields:
                raise unknown_key(key, fields, where)
        for name, field in fields.items():
            required = field.default is field.default_factory is dataclasses.MISSING
            if required and name not in data:
                raise ConfigError(f"{where} lacks the key {name!r}.", "Add it.")
        values = {key: _convert(value, hints[key], f"{where}.{key}") for key, value in data.items()}
        return cls(**values)


def unknown_key(key: str, valid: typing.Iterable[str], where: str) -> ConfigError:
    """The error for a key nobody knows, naming the nearest valid one."""
    names = list(valid)
    hint = did_you_mean(key, names).rstrip() or f"Valid keys: {', '.join(sorted(names))}."
    return ConfigError(f"{where} has an unknown key {key!r}.", hint)


@dataclasses.dataclass(frozen=True)
class VisionConfig(Config):
    """The vision tower: an image of side `image_size` in, `features` out.

    `clip` and `siglip` read the transformer sizes; `efficientnet-lite` reads `variant` and
    `feature_size`. `pixel_mean` and `pixel_std` are on the 0..255 scale, per RGB channel.
    `select_feature` "patch" leaves out the first feature, which is CLIP's class token; SigLIP has
    none and loses its first patch, as MoE-LLaVA's code has it. Squares of `pool` x `pool`
    neighbouring features are averaged into one image token, before the projector.
    """

    kind: Literal["clip", "siglip", "efficientnet-lite"]
    image_size: int
    feature_size: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    pad_to_square: bool = True
    variant: str = ""
    layers: int = 0
    heads: int = 0
    intermediate_size: int = 0
    patch_size: int = 32
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = later("patch")
    pool: int = later(1)

    def __post_init__(self) -> None:
        _check_positive(self, "image_size", "feature_size", "patch_size", "pool")
        check_pixels(self.pixel_mean, self.pixel_std)
        if self.layers and (self.heads < 1 or self.feature_size % self.heads):
            raise ConfigError(
                f"vision.heads {self.heads} do not divide the {self.feature_size} features.",
                "Heads must divide the size.",
            )
        if self.kind == "efficientnet-lite" and self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size {self.image_size} is not a multiple of {self.patch_size}.",
                "Choose a multiple.",
            )
        states = self.layers + 1
        if self.is_transformer and not -states <= self.select_layer < states:
            raise ConfigError(
                f"vision.select_layer {self.select_layer} is none of the {states} states.",
                "Med-MoE uses -2, the last state but one.",
            )
        if self.pool > 1 and (self.grid % self.pool or self.features != self.grid**2):
            raise ConfigError(
                f"vision.pool {self.pool} does not divide the {self.features} features of the "
                "tower into whole squares.",
                "Use 1, or a divisor of the side of a square grid.",
            )

    @property
    def is_transformer(self) -> bool:
        """Whether the tower is made of attention layers."""
        return self.kind != "efficientnet-lite"

    @property
    def grid(self) -> int:
        """Feature positions along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def features(self) -> int:
        """Features that the tower gives of an image."""
        return self.grid**2 - (self.kind == "siglip" and self.select_feature == "patch")

    @property
    def image_tokens(self) -> int:
        """Image tokens handed to the decoder."""
        return self.features // self.pool**2

    @property
    def token_counts(self) -> dict[int, int]:
        """How many image tokens there could be, and the `pool` that gives so many."""
        pools = range(1, self.grid + 1) if self.features == self.grid**2 else (1,)
        return {self.features // pool**2: pool for pool in pools if self.grid % pool == 0}

    def with_tokens(self, count: int) -> "VisionConfig":
        """The same with so many image tokens; raises `InputError` where no squares give them."""
        if count not in self.token_counts:
            raise InputError(
                f"The tower's {self.features} features cannot be averaged into {count} tokens.",
                f"It can have: {', '.join(map(str, self.token_counts))}.",
            )
        return dataclasses.replace(self, pool=self.token_counts[count])


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Config):
    """The language model. `phi` is parallel with biased GELU; `stablelm` sequential, SwiGLU.

    `qwen` is `stablelm` with RMSNorm in place of LayerNorm.

    `bos_token_id` is kept for config.json; whether a prompt begins with it, the tokenizer says.
    """

    kind: Literal["phi", "stablelm", "qwen"]
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int
    rotary_fraction: float
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int = 0
    more_eos_token_ids: tuple[int, ...] = later(())

    def __post_init__(self) -> None:
        _check_positive(
            self,
            *("hidden_size", "layers", "heads", "intermediate_size", "vocab_size"),
            *("max_positions", "rope_theta", "norm_eps", "rotary_fraction"),
        )
        if self.hidden_size % self.heads or self.rotary_size % 2 or self.rotary_fraction > 1:
            raise ConfigError(
                f"decoder.hidden_size {self.hidden_size}, heads {self.heads} and rotary_fraction "
                f"{self.rotary_fraction} do not divide evenly.",
                "Heads must divide the size; an even number of their channels rotate, at most all.",
            )

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def parallel(self) -> bool:
        """Whether attention and feed-forward read the same norm, rather than one after another."""
        return self.kind == "phi"

    @property
    def norm_parameters(self) -> tuple[str, ...]:
        """What a norm of the decoder has: LayerNorm a weight and a bias, RMSNorm a weight."""
        return ("weight",) if self.kind == "qwen" else ("weight", "bias")

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.heads

    @property
    def rotary_size(self) -> int:
        """Channels per head that rotate with position."""
        return int(self.head_size * self.rotary_fraction)


@dataclasses.dataclass(frozen=True)
class MoEConfig(Config):
    """Which layers hold experts and how the router chooses.

    `expert_names` says which modality each expert serves, where that is known. Where experts were
    left out, `router_names` says what every row of the router stands for: it still tells images of
    all modalities apart, and tokens are sent to the best expert that is there. `merged`: the only
    expert is one feed-forward with the meta expert, and always counts fully.
    """

    layers: tuple[int, ...]
    num_experts: int = 4
    top_k: int = 1
    use_residual: bool = False
    meta_expert: bool = True
    router_bias: bool = True
    expert_names: tuple[str, ...] = ()
    router_names: tuple[str, ...] = later(())
    merged: bool = later(False)

    def __post_init__(self) -> None:
        _check_positive(self, "num_experts")
        if not self.layers:
            raise ConfigError("moe.layers is empty.", "Name the layers, or leave moe out.")
        if not 1 <= self.top_k <= min(2, self.num_experts):
            raise ConfigError(f"moe.top_k is {self.top_k}.", "Use 1 or 2.")
        if self.expert_names and len(self.expert_names) != self.num_experts:
            raise ConfigError(
                f"moe.expert_names names {len(self.expert_names)} of {self.num_experts} experts.",
                "Name every expert, or none.",
            )
        names = self.modalities
        if len(set(names)) < len(names) or not all(name and name.isprintable() for name in names):
            raise ConfigError(
                f"moe.expert_names are {list(names)!r}.", "Give each a printable name of its own."
            )
        if self.use_residual and not self.meta_expert:
            raise ConfigError(
                "moe.use_residual without a meta expert, as in MoE-LLaVA, is not implemented.",
                "Only Med-MoE's is, whose checkpoints have router biases and meta experts.",
            )
        if self.router_names and not set(self.expert_names) < set(self.router_names):
            raise ConfigError(
                "moe.router_names does not name all experts and one that was left out.",
                "Export the model again.",
            )
        if self.merged and (self.num_experts > 1 or self.use_residual):
            raise ConfigError(
                "moe.merged is for one expert, without a residual coefficient.",
                "Export the model again.",
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """What each row of the router stands for, where that is known."""
        return self.router_names or self.expert_names

    @property
    def router_rows(self) -> int:
        """Rows of the router: one for each expert, those included that were left out."""
        return len(self.router_names) or self.num_experts

    @property
    def left_out(self) -> tuple[str, ...]:
        """The modalities whose experts were left out."""
        return tuple(name for name in self.router_names if name not in self.expert_names)

    @property
    def own_rows(self) -> tuple[int, ...] | None:
        """The router's rows of the experts that are there; None: all of them."""
        if not self.router_names:
            return None
        return tuple(self.router_names.index(name) for name in self.expert_names)


RefusalCode = Literal["not_a_scan", "not_answerable", "language"]


@dataclasses.dataclass(frozen=True)
class Refusal(Config):
    """A token of the tokenizer that stands for a whole answer: why there can be none.

    `not_a_scan`: the picture is no medical image; `not_answerable`: the picture does not show what
    is asked; `language`: the question is in no language that the model reads.
    """

    code: RefusalCode
    token: str


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """A whole Med-MoE: tower, two-layer GELU projector, decoder, experts (None: dense).

    `refusals` are those that the model was trained to give; most models have none.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    moe: MoEConfig | None = None
    refusals: tuple[Refusal, ...] = later(())

    def __post_init__(self) -> None:
        tokens = [refusal.token for refusal in self.refusals]
        if not all(tokens) or len(set(tokens)) < len(tokens) or len(set(self.codes)) < len(tokens):
            raise ConfigError(
                "refusals names a code or a token twice, or an empty token.",
                "Give each code one token of its own.",
            )
        if any(not 0 <= layer < self.decoder.layers for layer in self.moe_layers):
            raise ConfigError(
                f"moe.layers names a layer outside 0..{self.decoder.layers - 1}.",
                "Check moe.layers against decoder.layers.",
            )

    @property
    def codes(self) -> tuple[RefusalCode, ...]:
        """The codes of its refusals."""
        return tuple(refusal.code for refusal in self.refusals)

    @property
    def merged_decoder(self) -> DecoderConfig:
        """The decoder whose feed-forward a merged expert is: as wide as it and the meta expert."""
        copies = 2 if self.moe and self.moe.meta_expert else 1
        width = copies * self.decoder.intermediate_size
        return dataclasses.replace(self.decoder, intermediate_size=width)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that hold experts."""
        return self.moe.layers if self.moe else ()


AnswerKind = Literal["closed", "open"]


def answer_kind(text: str) -> AnswerKind:
    """Of an answer as it was given: "closed" is yes or no, "open" all else."""
    return "closed" if text.strip().rstrip(".").lower() in ("yes", "no") else "open"


def is_yes_and_no(choices: Collection[str]) -> bool:
    """Whether given choices are yes and no, in any order: of these alone the chances are known."""
    return sorted(text.strip().rstrip(".").lower() for text in choices) == ["no", "yes"]


@dataclasses.dataclass(frozen=True)
class Curve(Config):
    """How the probability that a model gives its answer becomes the chance that this is right.

    `points` are pairs (probability, chance): both from 0 to 1, the first rising, the second never
    falling. Between them lie straight lines; below the first and above the last the curve is level.
    It was fitted by `method` on so many `questions`.
    """

    method: Literal["isotonic", "logistic"]
    questions: int
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        rising = all(
            low[0] < high[0] and low[1] <= high[1] for low, high in itertools.pairwise(self.points)
        )
        within = all(0 <= value <= 1 for point in self.points for value in point)
        if not (self.points and rising and within):
            raise ConfigError("confidence has a curve that does not rise.", "Fit it again.")

    def chance(self, probability: float) -> float:
        """The chance (0 to 1) that an answer of this probability is right."""
        at = bisect.bisect_right(self.points, probability, key=lambda point: point[0])
        if at in (0, len(self.points)):
            return self.points[max(at - 1, 0)][1]
        (left, low), (right, high) = self.points[at - 1 : at + 1]
        return low + (high - low) * (probability - left) / (right - left)


@dataclasses.dataclass(frozen=True)
class Bin(Config):
    """The `n` answers whose confidence lies in one tenth: its mean, and the share that is right."""

    n: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Reliability(Config):
    """Whether confidence means anything, over `n` answers of which the share `accuracy` is right.

    `ece` (0..1) is the expected calibration error over `bins`, of which empty ones are left out;
    `risk_coverage` are pairs of the share of answers that is kept, the most confident first, and
    the error rate among them. An answer is right where it matches exactly.
    """

    n: int
    accuracy: float
    ece: float
    bins: tuple[Bin, ...]
    risk_coverage: tuple[tuple[float, float], ...]

    @property
    def half(self) -> float:
        """The accuracy of the more confident half."""
        return 1 - next(risk for share, risk in self.risk_coverage if share >= 0.5)


@dataclasses.dataclass(frozen=True)
class Unsure(Config):
    """What a threshold gives: the share of `answers` and of all `errors` that are below it.

    `accuracy` is that of the answers above it.
    """

    answers: float
    errors: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Confidence(Config):
    """What a bundle's manifest knows of how often its answers are right (`eval --fit-confidence`).

    An answer is unsure whose chance of being right is below `threshold`, which was chosen so that
    the share `selective_accuracy` of the others is right. It was fitted on answers of this bundle
    about so many `images` of `data`. `before` judges the probabilities as the model gives them;
    `after` and `unsure` judge the confidence, each answer by a fit that never saw its image.
    `doubtful_refusals` are the codes of refusals whose threshold does not separate what it is meant
    for from the rest, or flags more than it should.
    """

    closed: Curve
    open: Curve
    threshold: float
    selective_accuracy: float
    images: int
    data: str
    data_sha256: str
    before: Reliability
    after: Reliability
    unsure: Unsure
    doubtful_refusals: tuple[str, ...] = later(())

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"confidence.threshold is {self.threshold}.", "Use one of 0 to 1.")

    def chance(self, text: str, probability: float) -> float:
        """The chance (0 to 1) that the answer `text`, of this probability, is right."""
        curve = self.closed if answer_kind(text) == "closed" else self.open
        return curve.chance(probability)

    def among(self, probabilities: Mapping[str, float]) -> dict[str, float]:
        """Of given choices and their shares of 1, what each is worth; they still add up to 1.

        The curves were fitted on free answers and do not hold for choices in general: these keep
        their shares. Of yes and no the likelier one has its chance by the closed curve, at
        least 0.5 and at most its share, and the other one the rest; their order does not matter.
        At most its share, since the curve was fitted on probabilities among all answers, which are
        smaller than shares: read at a share it may say too much, as of two equal ones.
        """
        if not is_yes_and_no(probabilities):
            return dict(probabilities)
        share = max(probabilities.values())
        chance = min(max(self.closed.chance(share), 0.5), share)
        return {
            text: chance if value == share else 1 - chance for text, value in probabilities.items()
        }


def _check_positive(config: Config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        most = MOST if isinstance(value, int) else math.inf
        if not 0 < value < most:
            raise ConfigError(f"{name} is {value}.", f"It must be above 0 and below {most}.")


def check_pixels(mean: Collection[float], std: Collection[float]) -> None:
    """Raise `ConfigError` unless both are of three channels, and pixels can be divided by `std`."""
    sound = all(map(math.isfinite, (*mean, *std))) and all(value > 0 for value in std)
    if not sound or not len(mean) == len(std) == 3:
        raise ConfigError(
            "vision.pixel_mean and pixel_std are not three numbers each, or no deviations.",
            "Give the values of the tower's preprocessing.",
        )


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        hint = next(argument for argument in arguments if argument is not type(None))
        return _convert(value, hint, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where} is {value!r}.", f"Use one of: {', '.join(map(str, arguments))}."
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list.", "Check its value.")
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise ConfigError(f"{where} must hold {len(arguments)} values.", "Check its value.")
        return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be an object.", "Check its value.")
        return {
            _key(key, arguments[0], where): _convert(part, arguments[1], f"{where}.{key}")
            for key, part in value.items()
        }
    if isinstance(hint, type) and issubclass(hint, Config):
        return hint.from_json(value, where)
    return _scalar(value, hint, where)


def _key(key: str, hint: type, where: str) -> Any:
    """A key of an object as what it stands for: JSON has only strings."""
    try:
        return hint(key)
    except ValueError:
        raise ConfigError(
            f"{where} has the key {key!r}, which is no {hint.__name__}.", "Correct it."
        ) from None


def _scalar(value: Any, hint: type, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(min(value, 2**1023))  # beyond, a float would overflow
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, not {value!r}.", "Correct its value.")
    return value
