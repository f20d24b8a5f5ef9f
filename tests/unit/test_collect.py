"""The streamed pass against a plain forward of the whole model, and how it resumes."""

import dataclasses
import errno
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from medmoe_edge.calibration.collect import Collected, Observer, collect, read_modalities
from medmoe_edge.calibration.coverage import Neighbours
from medmoe_edge.calibration.data import Sample
from medmoe_edge.calibration.statistics import StatisticsFiles, input_of
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint, write_checkpoint
from medmoe_edge.errors import CheckpointError, InputError, ResourceError
from medmoe_edge.image.loading import preprocess
from medmoe_edge.models.decoder import route
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.torch.eager import EagerRuntime

Make = Callable[..., Path]
Inputs = dict[str, list[Tensor]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("images")
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 256, (40, 30, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    asked = [("Is there effusion?", "Yes", "ct"), ("Where?", "", None), ("What?", "Lung", "mri")]
    asked.append(("Is this the lung?", "No", "ct"))
    return [
        Sample(str(index), folder / f"{index}.png", question, answer, modality, "OPEN")
        for index, (question, answer, modality) in enumerate(asked)
    ]


@torch.inference_mode()
def naive(checkpoint: Checkpoint, samples: list[Sample]) -> tuple[Inputs, list[Tensor]]:
    """What enters each matrix in whole forwards, by its name; and router logits `[S, M, E]`."""
    model = EagerRuntime(checkpoint).model
    assert checkpoint.tokenizer_file is not None
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file)
    inputs: Inputs = defaultdict(list)

    def keep(given: str, x: Tensor) -> None:
        inputs[given].append(x.flatten(0, -2).double())

    for name, module in model.named_modules():
        given = input_of(f"{name}.weight")
        if given and not name.endswith((".k", ".v", ".up")):
            module.register_forward_pre_hook(lambda _, x, given=given: keep(given, x[0]))
    logits = []
    for sample in samples:
        pixels = torch.from_numpy(preprocess(sample.load(), checkpoint.config.vision))
        question = tokenizer.question_ids(sample.question)
        answer = tokenizer.answer_ids(sample.answer) if sample.answer else []
        before = model.embed(torch.tensor(tokenizer.prefix_ids()))
        after = model.embed(torch.tensor(question + answer))
        x = torch.cat((before, model.encode_image(pixels)[0], after))
        output = model(x[None])
        model.head(output.hidden[0, -len(after) :])
        if checkpoint.config.moe:
            logits.append(model.router_logits(output)[0])
    return inputs, logits


def run(checkpoint: Checkpoint, samples: list[Sample], work: Path, **options: Any) -> Collected:
    return collect(checkpoint, samples, work, **{"hessians": True, **options})


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("tiny", {}),
        ("tiny", {"top_k": 2, "use_residual": True}),
        ("tiny-phi", {"top_k": 2}),
        ("tiny-phi", {"dense": True}),
        ("tiny-qwen", {}),
    ],
)
def test_it_sees_what_a_plain_forward_sees(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path, preset: str, options: Any
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint(preset, **options))
    inputs, logits = naive(checkpoint, samples)
    collected = run(checkpoint, samples, tmp_path / "work")
    statistics = StatisticsFiles(collected.files)
    assert set(statistics) == set(inputs)
    for name, parts in inputs.items():
        x, found = torch.cat(parts).numpy(), statistics[name]
        assert (found.tokens, found.borrowed) == (len(x), 0)
        np.testing.assert_allclose(found.minimum, x.min(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.maximum, x.max(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.mean_square, (x**2).mean(0), rtol=1e-3, atol=1e-5)
        exact = x.T @ x / len(x)
        assert found.hessian is not None
        np.testing.assert_allclose(found.hessian, exact, rtol=1e-3, atol=1e-4 * exact.max())
    profile = collected.routing
    assert profile.modalities == ("ct", "mri", "unknown")
    assert profile.requests.tolist() == [2, 1, 1]
    assert profile.layers == checkpoint.config.moe_layers
    counts = np.zeros_like(profile.tokens)
    union = np.zeros(len(profile.layers))
    for sample, scores in zip(samples, logits, strict=bool(logits)):
        assert checkpoint.config.moe is not None
        for row in range(len(profile.layers)):
            chosen = route(scores[:, row], checkpoint.config.moe.top_k)[1].tolist()
            for expert in (expert for token in chosen for expert in token):
                counts[row, expert, profile.modalities.index(sample.modality or "unknown")] += 1
            union[row] += len({expert for token in chosen for expert in token}) / len(samples)
    np.testing.assert_array_equal(profile.tokens, counts)
    np.testing.assert_allclose(profile.union, union)


def test_hessians_may_be_left_out(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint())
    statistics = StatisticsFiles(
        run(checkpoint, samples[:1], tmp_path / "work", hessians=False).files
    )
    assert {name.split("/")[0] for name in statistics.specs} == set(statistics)
    assert not any(key.endswith("/hessian") for key in statistics.specs)


def test_two_passes_make_one(tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint())
    whole = run(checkpoint, samples, tmp_path / "whole")
    parts = [run(checkpoint, samples[i : i + 2], tmp_path / str(i)) for i in (0, 2)]
    once, twice = StatisticsFiles(whole.files), StatisticsFiles([*parts[0].files, *parts[1].files])
    assert set(once) == set(twice)
    for name, found in once.items():
        again = twice[name]
        assert again.tokens == found.tokens
        np.testing.assert_array_equal(again.minimum, found.minimum)
        np.testing.assert_array_equal(again.maximum, found.maximum)
        assert again.hessian is not None
        assert found.hessian is not None
        np.testing.assert_allclose(again.hessian, found.hessian, rtol=1e-3, atol=1e-4)
    merged = parts[0].routing.merge(parts[1].routing)
    assert merged.to_json() == whole.routing.to_json()


def content(collected: Collected) -> list[bytes]:
    return [file.read_bytes() for file in collected.files]


@pytest.mark.parametrize("calls", [1, 6, 9, 12, 15])
def test_it_goes_on_where_it_was_killed(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path, calls: int
) -> None:
    """Killed in the images, in the middle of each layer, or just before its last sample."""
    checkpoint = read_checkpoint(tiny_checkpoint())
    steps: list[tuple[str, int, int]] = []

    def kill(*step: Any) -> None:
        steps.append(step)
        if len(steps) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, samples, tmp_path / "work", progress=kill)
    done = [file.name for file in (tmp_path / "work").glob("layer*")]
    again: list[tuple[str, int, int]] = []
    resumed = run(checkpoint, samples, tmp_path / "work", progress=lambda *step: again.append(step))
    assert content(resumed) == content(run(checkpoint, samples, tmp_path / "whole"))
    assert again[0] == (("images", 0, 4) if calls <= 4 else ("layers", 4 * len(done), 12))
    assert run(checkpoint, samples, tmp_path / "work").routing.to_json()  # nothing left to do


def test_work_of_another_pass_is_made_anew(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    first, other = (read_checkpoint(tiny_checkpoint(p)) for p in ("tiny", "tiny-phi"))
    run(first, samples, work)
    for checkpoint, given in ((other, samples), (other, samples[:2])):
        fresh = run(checkpoint, given, tmp_path / str(len(given)))
        assert content(run(checkpoint, given, work)) == content(fresh)


def test_a_folder_of_other_things_is_left_alone(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds other things"):
        run(read_checkpoint(tiny_checkpoint()), samples, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_disk_that_refuses_is_told(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match="cannot be written"):
        run(read_checkpoint(tiny_checkpoint()), samples, tmp_path / "file" / "work")


def test_what_the_router_read_is_kept_whole_or_not_at_all(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full in the last moment left a file that no later run could read."""
    checkpoint, asked = read_checkpoint(tiny_checkpoint()), (samples, tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(ResourceError, match="No space left"):
            read_modalities(checkpoint, *asked)
    assert not (tmp_path / "work" / "modalities.json").exists()
    assert read_modalities(checkpoint, *asked).keys() == {one.picture for one in samples}


@pytest.mark.parametrize(
    "name",
    [
        "vision.layers.0.fc1.weight",
        "projector.2.bias",
        "decoder.embed.weight",
        "decoder.layers.2.ffn.experts.3.down.weight",
        "decoder.layers.0.ffn.router.bias",
        "decoder.norm.weight",
        "decoder.head.weight",
    ],
)
def test_a_tensor_with_nan_is_named(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path, name: str
) -> None:
    source = read_checkpoint(tiny_checkpoint())
    tensors = {key: tensor.clone() for key, tensor in source}
    tensors[name].view(-1)[-1] = torch.nan
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, source.config, tensors.items(), tokenizer_file=source.tokenizer_file)
    with pytest.raises(CheckpointError, match=f"The tensor {name} holds"):
        run(read_checkpoint(folder), samples[:1], tmp_path / "work")


def test_activations_that_overflow_are_told(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path
) -> None:
    source = read_checkpoint(tiny_checkpoint())
    tensors = dict(source)
    tensors["decoder.layers.1.ffn.up.weight"] = torch.full((64, 64), 3e38, dtype=torch.bfloat16)
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, source.config, tensors.items(), tokenizer_file=source.tokenizer_file)
    with pytest.raises(CheckpointError, match=r"activations of decoder\.layers\.1\.ffn\.hidden"):
        run(read_checkpoint(folder), samples[:1], tmp_path / "work")


def test_a_checkpoint_without_tokenizer_is_told(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        run(read_checkpoint(folder), samples, tmp_path / "work")


def test_a_sample_too_long_for_the_model_is_cut_off(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    long = dataclasses.replace(samples[0], question="Is there effusion? " * 100)
    collected = run(read_checkpoint(folder), [long], tmp_path / "work", hessians=False)
    assert StatisticsFiles(collected.files)["decoder.layers.0.attention.in"].tokens == 200


@pytest.mark.parametrize("top_k", [1, 2])
def test_borrowed_tokens_are_those_of_highest_probability(
    tiny_checkpoint: Make, samples: list[Sample], tmp_path: Path, top_k: int
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint(top_k=top_k))
    inputs, logits = naive(checkpoint, samples)
    wanted = {(0, 1): 5, (2, 3): 40, (2, 0): 10_000}
    passed = run(checkpoint, samples, tmp_path / "work", borrow=wanted)
    statistics = StatisticsFiles(passed.files)
    assert set(statistics) == {
        f"decoder.layers.{layer}.ffn.experts.{expert}.{part}"
        for layer, expert in wanted
        for part in ("in", "hidden")
    }
    for (layer, expert), count in wanted.items():
        scores = torch.cat([part[:, layer // 2] for part in logits]).double().softmax(-1)
        chosen = route(scores.log(), top_k)[1]
        x = torch.cat(inputs[f"decoder.layers.{layer}.ffn.meta.in"])
        others = [t for t in range(len(x)) if expert not in chosen[t].tolist()]
        nearest = sorted(others, key=lambda t: -float(scores[t, expert]))[:count]
        weights = scores[nearest, expert] / scores[nearest].amax(-1)
        found = statistics[f"decoder.layers.{layer}.ffn.experts.{expert}.in"]
        assert (found.tokens, found.borrowed) == (0, len(nearest))
        assert found.weight == pytest.approx(float(weights.sum()), rel=1e-3)
        np.testing.assert_allclose(found.maximum, x[nearest].amax(0), rtol=1e-4, atol=1e-4)
        exact = (x[nearest].T * weights) @ x[nearest] / weights.sum()
        assert found.hessian is not None
        np.testing.assert_allclose(found.hessian, exact, rtol=1e-3, atol=1e-3)


def test_neighbours_are_the_same_however_tokens_stream_by() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randint(0, 6, (60, 4), generator=generator).float()  # ties, and zeros
    probabilities /= probabilities.sum(-1, keepdim=True).clamp_min(1)
    chosen = probabilities.argmax(-1, keepdim=True)
    tokens = torch.arange(60.0)[:, None]
    for step in (1, 7, 60):
        nearest = Neighbours(expert=2, count=9)
        for at in range(0, 60, step):
            part = slice(at, at + step)
            nearest.offer(tokens[part], probabilities[part], chosen[part])
        free = [t for t in range(60) if chosen[t, 0] != 2 and probabilities[t, 2] > 0]
        expected = sorted(free, key=lambda t: (-float(probabilities[t, 2]), t))[:9]
        assert nearest.tokens[:, 0].tolist() == expected
        assert ((nearest.weights > 0) & (nearest.weights <= 1)).all()


def test_an_observer_watches_any_module() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 2))
    x = torch.randn(3, 5, 4)
    names = {"0.weight": "first", "2.weight": "second"}
    with Observer(module, names.get, hessians=True) as observer:
        module(x)
        module(x[:1])
    module(x)  # no longer watched
    assert set(observer.statistics) == {"first", "second"}
    rows = torch.cat((x.view(-1, 4), x[0])).double().numpy()
    found = observer.statistics["first"]
    assert found.tokens == 20
    assert found.hessian is not None
    np.testing.assert_allclose(found.hessian, rows.T @ rows / 20, rtol=1e-5, atol=1e-6)
    assert observer.statistics["second"].minimum.min() == 0  # after the ReLU


def test_matrices_that_share_an_input_are_observed_once() -> None:
    moe = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    with Observer(moe, lambda _: "in", hessians=False) as observer:
        for linear in moe.values():
            linear(torch.ones(7, 4))
    assert observer.statistics["in"].tokens == 7
