"""The router as a classifier of modalities: fitted to labelled images, or taken from a file.

The official router is trained so: the feed-forward inputs of the layers that hold experts, averaged
over layers and tokens, are classified by one linear layer, which is then copied into each of these
layers (arXiv 2404.10237, section 3.2).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.atomic import atomic_folder, check_apart, check_target, link
from medmoe_edge.checkpoint.keys import is_router
from medmoe_edge.checkpoint.reader import Checkpoint, import_router, read_checkpoint
from medmoe_edge.checkpoint.tensors import read_json, save_shard
from medmoe_edge.config import MoEConfig
from medmoe_edge.data.datasets import LABELS_FILE, modality_name, read_labels
from medmoe_edge.embedded import is_installed
from medmoe_edge.errors import CheckpointError, DataError, InputError
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.training.data import (
    IMAGE_ID,
    SHARED,
    UNKNOWN,
    Batches,
    Conversation,
    check_pictures,
    instructions,
)

MOST = 200  # images of a modality that a router is fitted to
ROUNDS = 3  # in which a router is fitted
AT_ONCE = 8  # images
MARGIN = 0.1  # of logits, by which the tokens of every prompt's beginning choose their experts
ENOUGH = 0.9 * MARGIN  # of which so much may be left
LITTLE = 0.15  # of its norm, by which a router may be changed for that
SETTLINGS = 3  # a changed router changes what later layers see, by a little
Bound = tuple[int, int, int]  # a token, an expert of its choice, and one that must be below it
_PENALTY = 1e-3  # of a weight's square: features can be separable


@dataclass(frozen=True)
class Features:
    """What a router sees: `pooled` `[N, D]`, and the modality index of each row `[N]`.

    `of_image` `[N]` is True for means over an image's tokens, False for those over its turns.
    """

    pooled: Tensor
    modality: Tensor
    of_image: Tensor

    def only(self, rows: Tensor) -> "Features":
        """Those of the rows that are True."""
        return Features(self.pooled[rows], self.modality[rows], self.of_image[rows])


@torch.no_grad()
def pooled_features(
    model: MedMoE,
    layers: Sequence[int],
    batches: Batches,
    conversations: Sequence[Conversation],
    progress: Progress = no_progress,
) -> Features:
    """The mean feed-forward input of `layers`, over an image's tokens and over those of its turns.

    Each conversation gives two rows, one for each mean.
    """
    device = next(model.parameters()).device
    model.eval()
    pooled: list[Tensor] = []
    modality: list[Tensor] = []
    of_image: list[Tensor] = []
    done = 0
    for batch in batches.plain(conversations, size=AT_ONCE):
        moved = batch.to(device)
        ids = moved.text.ids
        images = model.encode_image(moved.pixels)
        embeds = model.embed(ids.clamp_min(0)).to(images.dtype)
        embeds = embeds.masked_scatter((ids == IMAGE_ID)[..., None], images)
        output = model(embeds, positions=moved.text.positions, mask=moved.text.mask())
        mean = torch.stack([output.ffn_inputs[layer].float() for layer in layers]).mean(0)
        for image, where in ((True, ids == IMAGE_ID), (False, moved.text.segments > SHARED)):
            weights = where.float() / where.sum(-1, keepdim=True).clamp_min(1)
            pooled.append(torch.einsum("bs,bsd->bd", weights, mean).cpu())
            modality.append(batch.modality)
            of_image.append(torch.full_like(batch.modality, image, dtype=torch.bool))
        done += len(batch.modality)
        progress("Reading images", done, len(conversations))
    return Features(torch.cat(pooled), torch.cat(modality), torch.cat(of_image))


def fit_router(features: Features, experts: int, *, bias: bool) -> nn.Linear:
    """The linear classifier `[experts, D]` of least cross-entropy; deterministic.

    Raises `DataError` where a modality has no image.
    """
    known = features.only(features.modality != UNKNOWN)
    counts = known.modality.bincount(minlength=experts)
    if missing := int((counts == 0).sum()):
        raise DataError(
            f"{missing} of {experts} modalities have no labelled image.",
            "Label images of each, or leave these modalities out.",
        )
    x = known.pooled.double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    if not bias:
        mean = torch.zeros_like(mean)
    x = (x - mean) / scale
    weight = torch.zeros(experts, x.shape[1], dtype=torch.double, requires_grad=True)
    offset = torch.zeros(experts, dtype=torch.double, requires_grad=bias)
    balance = counts.sum() / (experts * counts.double())  # a rare modality counts as a common one
    optimiser = torch.optim.LBFGS(
        [weight, offset] if bias else [weight], max_iter=300, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(x @ weight.T + offset, known.modality, weight=balance)
        value = value + _PENALTY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    router = nn.Linear(x.shape[1], experts, bias=bias)
    with torch.no_grad():
        router.weight.copy_(weight / scale)
        if bias:
            router.bias.copy_(offset - (weight / scale) @ mean)
    return router


def fit_in_place(
    model: MedMoE,
    batches: Batches,
    conversations: Sequence[Conversation],
    progress: Progress = no_progress,
) -> nn.Linear:
    """Fit the router of a model with experts and install it.

    What a layer sees depends on the routers before it, so it is fitted in rounds, each to what the
    layers saw under all routers so far.
    """
    moe = model.config.moe
    assert moe is not None
    seen: list[Features] = []
    for _ in range(ROUNDS):
        seen.append(pooled_features(model, moe.layers, batches, conversations, progress))
        parts = (
            torch.cat([getattr(each, name) for each in seen])
            for name in ("pooled", "modality", "of_image")
        )
        router = fit_router(Features(*parts), moe.num_experts, bias=moe.router_bias)
        install(model, router)
    return router


def few_of_each(conversations: Sequence[Conversation]) -> list[Conversation]:
    """At most `MOST` of each modality, in order; those without a modality are left out."""
    counts: dict[str, int] = {}
    chosen = []
    for conversation in conversations:
        if (name := conversation.modality) and counts.get(name, 0) < MOST:
            counts[name] = counts.get(name, 0) + 1
            chosen.append(conversation)
    return chosen


def kept_router(file: Path, made: nn.Linear | None) -> nn.Linear:
    """The router that `file` holds; one that was `made` is written there first."""
    if made is not None:
        tensors = {name: value.contiguous() for name, value in made.state_dict().items()}
        partial = file.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, file)
    tensors = load_file(file)
    experts, size = tensors["weight"].shape
    router = nn.Linear(size, experts, bias="bias" in tensors)
    router.load_state_dict(tensors)
    return router


@dataclass(frozen=True)
class RouterResult:
    """A router that was put into a checkpoint.

    Attributes:
        checkpoint: The folder.
        modalities: Which modality each expert serves; empty where nobody said.
        images: How many it was fitted to; 0 for one from a file.
        accuracy: Share of held-out images (else of those fitted to) whose modality it finds by
            their own tokens.
        held_out: How many images that share is of; 0 where it is of those that it was fitted to.
    """

    checkpoint: Path
    modalities: tuple[str, ...]
    images: int = 0
    accuracy: float | None = None
    held_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"checkpoint": str(self.checkpoint)}


def import_into(
    file: Path,
    checkpoint: Path,
    *,
    modalities: Sequence[str] = (),
    out: Path | None = None,
    vision_tower: Path | None = None,
    force: bool = False,
) -> RouterResult:
    """Put an official router file into a checkpoint, which is replaced whole unless `out` is given.

    `modalities` is the file's order, which it does not say itself: whose expert is which. Raises
    `CheckpointError` where file and checkpoint do not fit, `InputError` for a wrong order or a
    checkpoint that is part of an installation.
    """
    target = _target(checkpoint, out, file, vision_tower, force=force)
    read = read_checkpoint(checkpoint, vision_tower=vision_tower)
    moe = _moe(read)
    router = import_router(file)
    expected = (moe.num_experts, read.config.decoder.hidden_size)
    if tuple(router["weight"].shape) != expected:
        raise CheckpointError(
            f"{file} is a router for {router['weight'].shape[0]} experts of "
            f"{router['weight'].shape[1]} channels, {checkpoint} has {expected[0]} of "
            f"{expected[1]}.",
            "Use the router that was trained for this decoder: phi_router.pth or "
            "stablelm_router.pth.",
        )
    names = _order(modalities, moe) if modalities else moe.expert_names
    _write(read, router, names, target, force=force or out is None)
    return RouterResult(target, names)


def train_router(
    checkpoint: Path,
    data: Path,
    *,
    out: Path | None = None,
    vision_tower: Path | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> RouterResult:
    """Fit the router of a checkpoint to labelled images alone, and put it into the checkpoint.

    `data` is a file of labels or a dataset folder. Of the checkpoint's expert names the order is
    kept; where it has none, each modality gets the expert that the present router sends it to.
    Raises `DataError` where the modalities are not as many as the experts.
    """
    target = _target(checkpoint, out, data, vision_tower, force=force)
    labelled = read_labels(data / LABELS_FILE if data.is_dir() else data, check_images=True)
    apart = [[item for item in labelled if (item.split == "train") is own] for own in (True, False)]
    learned, held = (few_of_each(instructions(items)) for items in apart)
    drawn = {each.image for each in (*learned, *held)}
    check_pictures(*([item for item in items if item.image in drawn] for items in apart))
    read = read_checkpoint(checkpoint, vision_tower=vision_tower)
    moe = _moe(read)
    found = sorted({item.modality for item in labelled})
    if missing := set(found) - {item.modality for item in apart[0]}:
        raise DataError(
            f"{data} labels no image of {', '.join(sorted(missing))} to train on.",
            "Give some of them the split train.",
        )
    names = moe.expert_names
    if len(found) != moe.num_experts or (names and set(found) != set(names)):
        raise DataError(
            f"The labels name {len(found)} modalities ({', '.join(found)}), the checkpoint has "
            f"{moe.num_experts} experts{f' ({chr(44).join(names)})' if names else ''}.",
            "Give images of each, or make experts for yours with: medmoe-edge train --from "
            "CHECKPOINT",
        )
    model = loaded(read)
    tokenizer = read.tokenizer.tokenizer
    if not names:
        votes = Batches(read.config, tokenizer, found, 0)
        features = pooled_features(model, moe.layers, votes, learned, progress)
        names = _by_vote(model, features, found, moe)
    batches = Batches(read.config, tokenizer, names, 0)
    router = fit_in_place(model, batches, learned, progress)
    judged = pooled_features(model, moe.layers, batches, held or learned, progress)
    judged = judged.only(judged.of_image)
    with torch.no_grad():
        right = (router(judged.pooled).argmax(-1) == judged.modality).double().mean()
    _write(read, dict(router.state_dict()), names, target, force=force or out is None)
    return RouterResult(target, tuple(names), len(learned), round(float(right), 4), len(held))


def install(model: MedMoE, router: nn.Linear) -> None:
    """Copy the router into every layer that holds experts."""
    for layer in model.config.moe_layers:
        model.moe_layer(layer).router.load_state_dict(router.state_dict())


def settle(model: MedMoE, prefix: Sequence[int]) -> tuple[int, int]:
    """Change the routers, in place and by little, so that no token of `prefix` is undecided.

    Every prompt begins with these tokens, of which no label tells a modality: where two experts are
    all but even for one, rounding decides it otherwise in a quantised model, in each question. The
    same change is made in all layers. A choice that would cost more than `LITTLE` stays close.

    Returns:
        How many choices were closer than `ENOUGH`, and how many still are.
    """
    layers = [model.moe_layer(layer) for layer in model.config.moe_layers]
    model.eval()
    with torch.no_grad():
        room = LITTLE * min(float(layer.router.weight.norm()) for layer in layers)
        states, logits = _seen(model, prefix)
        chosen = logits.topk(layers[0].top_k).indices
        close = _close(logits, chosen)
        for _ in range(SETTLINGS):
            change = _least_change(states, logits, chosen, room)
            room -= float(change.norm())
            for layer in layers:
                layer.router.weight.add_(change[:, : states.shape[1] - 1])
                if layer.router.bias is not None:
                    layer.router.bias.add_(change[:, -1])
            states, logits = _seen(model, prefix)
        return close, _close(logits, logits.topk(layers[0].top_k).indices)


def _seen(model: MedMoE, prefix: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the routers see of each token in each layer, and make of it: `[N, D + 1]`, `[N, E]`.

    A state ends in 1, which is what a bias is for, or in 0 where there is none.
    """
    output = model(model.embed(torch.tensor([prefix], device=model.decoder.embed.weight.device)))
    layers = model.config.moe_layers
    inputs = torch.stack([output.ffn_inputs[layer][0] for layer in layers], 1)  # [S, M, D]
    states = inputs.flatten(0, 1).float()
    has_bias = model.moe_layer(layers[0]).router.bias is not None
    ends = states.new_full((len(states), 1), float(has_bias))
    return torch.cat((states, ends), 1), model.router_logits(output)[0].flatten(0, 1)


def _gaps(logits: Tensor, chosen: Tensor) -> Tensor:
    """How far each choice is above each expert that was not chosen, `[N, K, E]`; else infinite."""
    gaps = logits.gather(1, chosen)[:, :, None] - logits[:, None, :]
    is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    return gaps.masked_fill(is_chosen[:, None, :], torch.inf)


def _close(logits: Tensor, chosen: Tensor) -> int:
    return int((_gaps(logits, chosen).amin((1, 2)) < ENOUGH).sum())


def _least_change(states: Tensor, logits: Tensor, chosen: Tensor, room: float) -> Tensor:
    """The least change `[E, D + 1]` of the routers that leaves no gap below `ENOUGH`.

    While its norm is above `room`, the token that costs most is left out.
    """
    bounds: list[Bound] = []
    left_out: set[int] = set()
    while True:
        change, costs = _solved(states, logits, bounds)
        if change.norm() > room:
            dearest = bounds[int(costs.argmax())][0]
            left_out.add(dearest)
            bounds = [bound for bound in bounds if bound[0] != dearest]
            continue
        near = (_gaps(logits + states @ change.T, chosen) < ENOUGH).nonzero().tolist()
        found = {(token, int(chosen[token, slot]), other) for token, slot, other in near}
        new = {bound for bound in found - {*bounds} if bound[0] not in left_out}
        if not new:
            return change
        bounds += sorted(new)


def _solved(
    states: Tensor, logits: Tensor, bounds: Sequence[Bound]
) -> tuple[Tensor, npt.NDArray[np.float64]]:
    """The least change that makes the gaps of `bounds` `MARGIN`, and what each of them costs.

    Least distance programming by non-negative least squares: Lawson and Hanson, Solving Least
    Squares Problems, chapter 23. Where no change does, it is a very large one.
    """
    from scipy.optimize import nnls

    if not bounds:
        return states.new_zeros(logits.shape[1], states.shape[1]), np.empty(0)
    tokens, own, other = torch.tensor(bounds, dtype=torch.long).reshape(-1, 3).T
    rows, size = torch.arange(len(bounds)), (logits.shape[1], states.shape[1])
    slopes = torch.zeros(len(bounds), *size, dtype=torch.float64)
    seen = states[tokens].double().cpu()
    slopes[rows, own], slopes[rows, other] = seen, -seen
    lacking = MARGIN - (logits[tokens, own] - logits[tokens, other]).double().cpu()
    problem = torch.cat((slopes.flatten(1), lacking[:, None]), 1).T.numpy()  # [E (D + 1) + 1, N]
    goal = np.zeros(len(problem))
    goal[-1] = 1
    costs, _ = nnls(problem, goal, maxiter=100 * len(goal))
    rest = goal - problem @ costs
    change = rest[:-1] / -max(float(rest @ rest), 1e-12)
    return torch.from_numpy(change).to(states).reshape(size), costs


def loaded(read: Checkpoint) -> MedMoE:
    """The checkpoint's model with its weights in fp32, each of them its own."""
    with torch.device("meta"):
        model = MedMoE(read.config)
    tensors = {name: tensor.float().clone() for name, tensor in read}
    model.load_state_dict(tensors, assign=True)
    return model


def best_experts(model: MedMoE, features: Features, modalities: int) -> list[int]:
    """The expert that the model's own router sends most images of each modality to."""
    layer = model.moe_layer(model.config.moe_layers[0])
    with torch.no_grad():
        shares = layer.router_logits(features.pooled).softmax(-1)
    return [int(shares[features.modality == index].mean(0).argmax()) for index in range(modalities)]


def _by_vote(
    model: MedMoE, features: Features, found: Sequence[str], moe: MoEConfig
) -> tuple[str, ...]:
    """Names in the order of the experts; where two modalities want one expert, the surer has it."""
    from scipy.optimize import linear_sum_assignment

    layer = model.moe_layer(moe.layers[0])
    with torch.no_grad():
        shares = layer.router_logits(features.pooled).softmax(-1)
    rows = [shares[features.modality == index].mean(0) for index in range(len(found))]
    modality, expert = linear_sum_assignment(torch.stack(rows).numpy(), maximize=True)
    by_expert = dict(zip(expert.tolist(), modality.tolist(), strict=True))
    return tuple(found[by_expert[index]] for index in range(moe.num_experts))


def _moe(read: Checkpoint) -> MoEConfig:
    if read.config.moe is None:
        raise CheckpointError(
            f"{read.folder} has no experts, and so no router.",
            "Make experts with: medmoe-edge train --from CHECKPOINT",
        )
    return read.config.moe


def _order(modalities: Sequence[str], moe: MoEConfig) -> tuple[str, ...]:
    names = tuple(map(modality_name, modalities))
    if len(names) != moe.num_experts or len(set(names)) < len(names):
        raise InputError(
            f"{len(names)} modalities were named ({', '.join(names)}), the checkpoint has "
            f"{moe.num_experts} experts.",
            "Name one for each, in the order of the router's rows.",
        )
    return names


def _target(checkpoint: Path, out: Path | None, *inputs: Path | None, force: bool) -> Path:
    if out is None and is_installed(checkpoint):
        raise InputError(
            f"{checkpoint} is part of an installation, whose files are not changed.",
            "Add -o OUT to write a copy with the new router.",
        )
    if out is None:
        return checkpoint
    check_apart(out, checkpoint, around=inputs)
    check_target(out, force=force, marker="config.json")  # refused here, not after the work
    return out


def _write(
    read: Checkpoint,
    router: Mapping[str, Tensor],
    names: Sequence[str],
    target: Path,
    *,
    force: bool,
) -> None:
    """The checkpoint's folder with another router; shards that hold none of it are linked."""
    moe = _moe(read)
    if ("bias" in router) != moe.router_bias:
        raise CheckpointError(
            f"{read.folder} has routers with{'' if moe.router_bias else 'out'} a bias, the new one "
            "is otherwise.",
            "Use the router that was trained for this checkpoint.",
        )
    config = read_json(read.folder / "config.json")
    if names:
        config["medmoe_edge"] = {**config.get("medmoe_edge", {}), "expert_names": list(names)}
    stored = read.stored
    changed = {stored[name].key: name for name in stored if is_router(name)}
    shards = {stored[name].file for name in changed.values()}
    with atomic_folder(target, force=force, marker="config.json") as folder:
        for file in _files(read.folder):
            copy = folder / file.relative_to(read.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file in shards:
                tensors = load_file(file)
                for key in tensors.keys() & changed.keys():
                    part = changed[key].rsplit(".", 1)[1]
                    tensors[key] = router[part].float().clone().contiguous()
                save_shard(tensors, copy)
            elif file.name == "config.json" and file.parent == read.folder:
                copy.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            else:
                link(file.resolve(), copy)  # the Hub's cache holds links relative to their folder


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())
