"""What a MedMoE model is: Swin and BERT towers joined by one expert for each modality.

Shape letters beside those of `config.py`: h, w a grid of image positions (regions, R = h * w),
C channels of a scale, W words of a text, D the joint size of image regions and words.

`Scores` turn similarities into scores; they are fitted on data once a model is trained.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from medmoe_edge.atomic import read_small
from medmoe_edge.config import Config, check_pixels, later
from medmoe_edge.errors import ConfigError, Notice, of_file

MODALITIES = ("xray", "ct", "mri", "ultrasound", "pathology", "fundus")  # the paper's class order
PUBLISHED_GRID = 16  # regions a side that the authors' code pools an image into
SUMMED_LAYERS = 4  # of BERT, counted from the last

# Beyond these a few lines of JSON, without any weights, would fill the memory with masks.
MAX_GRID, MAX_WINDOW, MAX_LAYERS = 512, 32, 1024


@dataclass(frozen=True)
class SwinConfig(Config):
    """A Swin pyramid (https://arxiv.org/abs/2103.14030): stage i has `embed_size * 2**i` channels.

    `pixel_mean` and `pixel_std` are on the 0..255 scale, per RGB channel.
    """

    image_size: int
    patch_size: int
    embed_size: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window_size: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    mlp_ratio: int = 4
    norm_eps: float = 1e-5
    pad_to_square: bool = True

    def __post_init__(self) -> None:
        _check_sizes(
            "vision",
            *(self.image_size, self.patch_size, self.embed_size, self.window_size, self.mlp_ratio),
            *(*self.depths, *self.heads),
        )
        if not 0 < len(self.depths) == len(self.heads) <= 8 or sum(self.depths) > MAX_LAYERS:
            raise ConfigError(
                f"vision.depths has {len(self.depths)} stages and {sum(self.depths)} blocks, "
                f"vision.heads {len(self.heads)} stages.",
                "Give both for each of up to 8 stages.",
            )
        if any(size % heads for size, heads in zip(self.channels, self.heads, strict=True)):
            raise ConfigError(
                f"vision.heads {list(self.heads)} do not divide the channels "
                f"{list(self.channels)}.",
                "Heads must divide their stage's channels.",
            )
        if self.image_size % self.patch_size or self.grids[-1] < self.window_size:
            raise ConfigError(
                f"vision.image_size {self.image_size} has no grid of patches of "
                f"{self.patch_size} pixels that holds a window of {self.window_size} "
                f"in each of {len(self.depths)} stages.",
                "Choose a multiple of the patch, large enough for the last stage.",
            )
        if self.grids[0] > MAX_GRID or self.window_size > MAX_WINDOW:
            raise ConfigError(
                f"vision has {self.grids[0]} patches a side, in windows of {self.window_size}.",
                f"Use at most {MAX_GRID}, in windows of at most {MAX_WINDOW}.",
            )
        check_pixels(self.pixel_mean, self.pixel_std)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_size * 2**stage for stage in range(len(self.depths)))

    @property
    def grids(self) -> tuple[int, ...]:
        """Positions along one side in each stage; an odd grid is padded before it is halved."""
        sides = [self.image_size // self.patch_size]
        for _ in self.depths[1:]:
            sides.append((sides[-1] + 1) // 2)
        return tuple(sides)


@dataclass(frozen=True)
class BertConfig(Config):
    """A BERT encoder (https://arxiv.org/abs/1810.04805).

    `max_pieces` is how many word pieces of a text are read, the two marks around it included.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    max_positions: int = 512
    max_pieces: int = 25
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        _check_sizes(
            "text",
            *(self.vocab_size, self.hidden_size, self.layers, self.heads),
            *(self.intermediate_size, self.max_positions, self.max_pieces),
        )
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"text.heads {self.heads} do not divide text.hidden_size {self.hidden_size}.",
                "Heads must divide the size.",
            )
        if not SUMMED_LAYERS <= self.layers <= MAX_LAYERS:
            raise ConfigError(
                f"text.layers is {self.layers}.", f"The last {SUMMED_LAYERS} layers are summed."
            )
        if not 3 <= self.max_pieces <= self.max_positions:
            raise ConfigError(
                f"text.max_pieces is {self.max_pieces}, text.max_positions {self.max_positions}.",
                "Read at least 3 word pieces and no more than there are positions.",
            )


@dataclass(frozen=True)
class ModalityConfig(Config):
    """A whole MedMoE (https://arxiv.org/abs/2506.08356); `modalities` are the router's classes.

    `shared_expert` is the model without experts that they are compared with: one expert sees
    every modality, and the router only names them. All else, the losses included, is the same.

    `as_published` computes what the authors' repository does (GitHub `shivangchopra11/MedMoE`)
    where ours differs on purpose: the page "Where ours differs" lists it.
    """

    vision: SwinConfig
    text: BertConfig
    modalities: tuple[str, ...] = MODALITIES
    shared_expert: bool = False
    as_published: bool = later(False)

    def __post_init__(self) -> None:
        if self.as_published and self.shared_expert:
            raise ConfigError("as_published does not go with shared_expert.", "Leave one out.")
        names = set(self.modalities)
        if not 2 <= len(names) == len(self.modalities) or "" in names:
            raise ConfigError(
                f"modalities are {list(self.modalities)}.", "Name two or more, each once."
            )

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return 1 if self.shared_expert else len(self.modalities)

    @property
    def grid(self) -> int:
        """Regions along one side of an image."""
        return PUBLISHED_GRID if self.as_published else self.vision.grids[0]

    @property
    def size(self) -> int:
        """D: experts give regions of the size that words have."""
        return self.text.hidden_size


def _check_sizes(where: str, *sizes: int) -> None:
    if not all(0 < size <= 2**20 for size in sizes):
        raise ConfigError(f"{where} has an impossible size.", "Sizes and counts are positive.")


MAX_TEMPERATURE = 1e6  # of similarities from -1 to 1; far more than any is fitted
SCORES = "scores.json"  # in a checkpoint; a bundle has them in its manifest


@dataclass(frozen=True)
class Scores(Config):
    """`temperature` makes logits of similarities; the limits are for images of known modalities.

    An image is unfamiliar where the router's entropy, in nats, is above `entropy_limit`, or its
    evidence (`modality_router.py`) below `evidence_limit`. Unfitted, the temperature is that of
    training.
    """

    temperature: float = 10.0
    entropy_limit: float = 0.5
    evidence_limit: float = 0.0

    def __post_init__(self) -> None:
        possible = 0 < self.temperature <= MAX_TEMPERATURE and 0 <= self.entropy_limit < math.inf
        if not (possible and math.isfinite(self.evidence_limit)):
            raise ConfigError(
                f"scores have the temperature {self.temperature:g}, the entropy limit "
                f"{self.entropy_limit:g} and the evidence limit {self.evidence_limit:g}.",
                "All are finite, the first two positive, and no temperature is that high.",
            )

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What must be known of every answer: that these are no model's own."""
        if self != Scores():
            return ()
        what = "Nobody fitted to this model how similarities become scores and what is unfamiliar"
        return (Notice("scores_not_fitted", f"{what} ({SCORES}): these are defaults."),)


def read_scores(checkpoint: Path) -> Scores:
    """Those of a checkpoint folder; raises `ConfigError` for a file that is no such scores."""
    path = checkpoint / SCORES
    if not path.exists():
        return Scores()
    try:
        data = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        damaged = ConfigError(f"{path} cannot be read.", "Train or copy the model again.")
        raise of_file(str(path), error, damaged) from error
    return Scores.from_json(data, SCORES)
