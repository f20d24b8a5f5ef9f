"""The coverage contract on the embedded model: what calibrating on one modality does to others.

The X-rays among the built-in pictures are the adversary's calibration set. Their tokens do reach
the experts of the other modalities, a few hundred times, and GPTQ believes them: such experts come
out closer to fp32 where nobody will use them and further away where everybody will.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from medmoe_edge._types import Floats
from medmoe_edge.calibration.data import CalibrationData, read_calibration
from medmoe_edge.calibration.run import calibrate
from medmoe_edge.calibration.statistics import Statistics, expert_of
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint
from medmoe_edge.data.datasets import read_examples
from medmoe_edge.embedded import checkpoint_path
from medmoe_edge.errors import VerificationError
from medmoe_edge.export.plan import Plan
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import log_softmax
from medmoe_edge.runtimes.torch.eager import EagerRuntime

UNSEEN = ("mri", "ct", "pathology", "ultrasound", "fundus")


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return read_checkpoint(checkpoint_path("nano"))


@pytest.fixture(scope="module")
def pictures() -> CalibrationData:
    return read_calibration("builtin")


def only(data: CalibrationData, modality: str) -> CalibrationData:
    samples = tuple(sample for sample in data.samples if sample.modality == modality)
    return dataclasses.replace(data, samples=samples)


@pytest.fixture(scope="module")
def statistics(
    nano: Checkpoint, pictures: CalibrationData, tmp_path_factory: pytest.TempPathFactory
) -> Statistics:
    """Calibrated on X-rays alone."""
    out = tmp_path_factory.mktemp("statistics") / "xray"
    return calibrate(nano.folder, only(pictures, "xray"), out)


def test_one_modality_triggers_the_contract(
    nano: Checkpoint, pictures: CalibrationData, statistics: Statistics, tmp_path: Path
) -> None:
    assert nano.config.moe is not None
    names = nano.config.moe.expert_names
    assert statistics.samples == {"xray": 18}
    assert {(names[record.expert], record.status) for record in statistics.coverage} == {
        ("xray", "covered"),
        *((name, "data-free") for name in UNSEEN),
    }
    for record in statistics.coverage:
        for part in ("in", "hidden"):  # it was measured, and is not to be trusted
            name = f"decoder.layers.{record.layer}.ffn.experts.{record.expert}.{part}"
            assert (name in statistics.inputs) == (record.tokens > 0)
            assert (statistics.get(name) is None) == (record.status == "data-free")
    with pytest.raises(VerificationError, match=r"layer 0 mri .* none of its own modality"):
        calibrate(nano.folder, only(pictures, "xray"), tmp_path / "strict", samples=2, strict=True)
    assert list(tmp_path.iterdir()) == []


def test_without_the_contract_the_other_modalities_suffer(
    nano: Checkpoint, statistics: Statistics, data_dir: Path
) -> None:
    """Of the experts in int4, all else in fp32: the contract governs nothing else.

    On all questions of the validation file, measured once: mri 2.6 and ct 2.3 times. On the few
    built-in pictures, some unlike all that nano learned from, the difference is lost in chance.
    """
    rows = [row for row in read_examples(data_dir / "vqa_val.jsonl") if row.source == "slake"]
    asked = [
        (name, load_image(row.image), row.question, row.answer)
        for name in ("mri", "ct", "xray")
        for row in [row for row in rows if row.modality == name][::10]
    ]
    diverged = divergence_of(nano, asked)
    kept = diverged(Plan("int4", statistics=statistics))
    broken = diverged(Plan("int4", statistics=dataclasses.replace(statistics, coverage=())))
    for name in ("mri", "ct"):
        assert broken[name] > 1.5 * kept[name]
    assert broken["xray"] == pytest.approx(kept["xray"], rel=0.5)


def divergence_of(
    nano: Checkpoint, asked: Sequence[tuple[str, Image, str, str]]
) -> Callable[[Plan], dict[str, float]]:
    """Mean KL of the next token under a plan for the experts, along an answer, by modality.

    `asked` are a modality, an image of it, a question and what of its answer is given.
    """
    runtime, source = EagerRuntime(nano), WeightSource(nano)
    assert nano.tokenizer_file is not None
    tokenizer = Tokenizer.from_file(nano.tokenizer_file)
    prefix = runtime.embed(tokenizer.prefix_ids())
    prompts = []
    for modality, image, question, answer in asked:
        tokens = runtime.encode_image(preprocess(image, nano.config.vision))
        given = tokenizer.answer_ids(answer)
        ids = runtime.embed([*tokenizer.question_ids(question), *given])
        prompts.append((modality, 1 + len(given), np.concatenate((prefix, tokens, ids))))

    @torch.inference_mode()
    def answers(embeds: Floats, last: int) -> Floats:
        output = runtime.model(torch.from_numpy(embeds)[None], None)
        logits: Floats = runtime.model.head(output.hidden[0, -last:]).numpy()
        found: Floats = log_softmax(logits).astype(np.float32)
        return found

    expected = [answers(embeds, last) for _, last, embeds in prompts]

    def diverged(plan: Plan) -> dict[str, float]:
        for name in filter(expert_of, nano.names):
            chosen = plan(name)
            assert chosen is not None
            weight = chosen[1](source.array(name)).dequantise()
            runtime.model.get_parameter(name).data = torch.from_numpy(weight)
        found: dict[str, list[float]] = {}
        for (modality, last, embeds), reference in zip(prompts, expected, strict=True):
            gaps = np.exp(reference) * (reference - answers(embeds, last))
            found.setdefault(modality, []).append(float(gaps.sum(-1).mean()))
        return {modality: float(np.mean(gaps)) for modality, gaps in found.items()}

    return diverged
