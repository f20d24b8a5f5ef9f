"""Gates, the sweep over every expert, and the record that a bundle keeps of its proof."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medmoe_edge.bundle.bundle import DEFAULT_GATES, MANIFEST, Bundle, Gates, write_manifest
from medmoe_edge.bundle.recorded import float_weights, recorded_file, sweep_weights
from medmoe_edge.data.datasets import Example
from medmoe_edge.engine.loading import this_machine
from medmoe_edge.errors import BundleError, DataError, ModelError, VerificationError
from medmoe_edge.evaluation.gates import Z, wilson
from medmoe_edge.evaluation.metrics import (
    Accuracy,
    Answers,
    Divergence,
    Fidelity,
    Routing,
    Share,
    Vision,
)
from medmoe_edge.evaluation.record import AnswersRecord, Source, read_record
from medmoe_edge.evaluation.verify import Data, GateResult, judge, sweep_experts, verify
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

Make = Callable[..., Path]
GATES = DEFAULT_GATES["int8"]


# --- gates ------------------------------------------------------------------------------------


def test_wilson_at_the_ends() -> None:
    assert wilson(Share.of(0, 10)) == pytest.approx((0, 0.2129), abs=1e-4)
    assert wilson(Share.of(10, 10)) == pytest.approx((0.7871, 1), abs=1e-4)
    assert wilson(Share.of(0, 0)) == (0, 1)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(pair: tuple[int, int]) -> None:
    count, total = pair
    share = count / total
    for bound in wilson(Share.of(count, total)):
        assert 0 <= bound <= 1
        gap = (share - bound) ** 2 - Z**2 * bound * (1 - bound) / total
        assert gap == pytest.approx(0, abs=1e-9)


def figures(
    agreement: tuple[int, int] = (1000, 1000),
    drop: tuple[float, float, float] = (0, 0, 0),
    flips: tuple[int, int] = (0, 10_000),
    cosine: tuple[float, float, float] = (1, 1, 1),
    finite: bool = True,
) -> Fidelity:
    accuracy = Accuracy(agreement[1], 0.8, 0.8 - drop[0], -drop[0], (-drop[2], -drop[1]))
    share = Share.of(*agreement)
    answers = Answers(agreement[1], share, share, Divergence(0, 0, 0), accuracy)
    routed = Share.of(*flips)
    return Fidelity(
        questions=agreement[1],
        images=10,
        overall=answers,
        by_modality={"ct": answers},
        by_answer_type={"OPEN": answers},
        routing=Routing(routed, {0: routed}, {"ct": routed}, {0: 0.0}),
        vision=Vision(cosine[0], cosine[1:], cosine[1], 0.0),
        finite=finite,
    )


def verdicts(fidelity: Fidelity, faults: tuple[str, ...] = ()) -> dict[str, str]:
    return {result.name: result.verdict for result in judge(fidelity, GATES, faults)}


def test_perfect_figures_pass_every_gate() -> None:
    assert set(verdicts(figures()).values()) == {"met"}


@pytest.mark.parametrize(
    ("name", "figure", "verdict"),
    [
        ("answer_agreement", {"agreement": (996, 1000)}, "met"),
        ("answer_agreement", {"agreement": (990, 1000)}, "not decided"),
        ("answer_agreement", {"agreement": (987, 1000)}, "not decided"),
        ("answer_agreement", {"agreement": (980, 1000)}, "failed"),
        ("answer_agreement", {"agreement": (60, 60)}, "not decided"),
        ("answer_agreement", {"agreement": (59, 60)}, "not decided"),
        ("answer_agreement", {"agreement": (55, 60)}, "failed"),
        ("accuracy_drop", {"drop": (0.002, 0.001, 0.003)}, "met"),
        ("accuracy_drop", {"drop": (0.002, 0.001, 0.005)}, "not decided"),
        ("accuracy_drop", {"drop": (0.01, 0.002, 0.02)}, "not decided"),
        ("accuracy_drop", {"drop": (0.01, 0.004, 0.02)}, "failed"),
        ("accuracy_drop", {"drop": (-0.01, -0.02, -0.001)}, "met"),
        ("routing_flips", {"flips": (38, 10_000)}, "met"),
        ("routing_flips", {"flips": (50, 10_000)}, "not decided"),
        ("routing_flips", {"flips": (55, 10_000)}, "not decided"),
        ("routing_flips", {"flips": (80, 10_000)}, "failed"),
        ("vision_cosine", {"cosine": (0.985, 0.98, 0.992)}, "not decided"),
        ("vision_cosine", {"cosine": (0.995, 0.98, 0.999)}, "not decided"),
        ("vision_cosine", {"cosine": (0.985, 0.98, 0.989)}, "failed"),
        ("finite", {"finite": False}, "failed"),
    ],
)
def test_the_interval_decides_a_gate(name: str, figure: dict[str, Any], verdict: str) -> None:
    found = verdicts(figures(**figure))
    assert found.pop(name) == verdict
    assert set(found.values()) == {"met"}


def test_faults_fail_the_finite_gate() -> None:
    assert verdicts(figures(), ("decoder",))["finite"] == "failed"


@pytest.mark.parametrize(("questions", "enough"), [(267, False), (268, True), (1400, True)])
def test_too_few_questions_are_told(questions: int, enough: bool) -> None:
    result = judge(figures(agreement=(questions, questions)), GATES)[1]
    assert result.passed
    assert (result.interval[0] >= 0.99) is enough
    assert bool(result.note) is not enough
    assert (result.verdict == "met") is enough
    if not enough:
        assert result.note == "267 questions are too few to prove 99%: that takes 268"


def test_the_number_that_is_told_decides() -> None:
    """995 of 1,000 leave it open; the number that the note gives, with the same share, does not."""
    result = judge(figures(agreement=(995, 1000)), GATES)[1]
    assert (result.verdict, result.note[-11:]) == ("not decided", "takes 1,072")


def test_a_dense_model_without_answers_has_fewer_gates() -> None:
    fidelity = figures()
    overall = dataclasses.replace(fidelity.overall, accuracy=None)
    fidelity = dataclasses.replace(fidelity, overall=overall, routing=None)
    names = [result.name for result in judge(fidelity, GATES)]
    assert names == ["finite", "answer_agreement", "vision_cosine"]


def test_results_survive_json() -> None:
    for result in judge(figures(agreement=(55, 60)), GATES):
        assert GateResult.from_json(json.loads(json.dumps(result.to_json()))) == result


# --- the sweep --------------------------------------------------------------------------------


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "bundle"))


def spoil(folder: Path, name: str, graph: str = "decoder", value: float = np.nan) -> None:
    """Put a NaN into an initializer of a bundle's graph and seal the bundle again."""
    path = folder / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    bad = np.float32(value).tobytes()
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        place = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / place["location"]).open("r+b") as file:
            file.seek(int(place["offset"]))
            file.write(bad)
    else:
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[0] = value
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        path.write_bytes(model.SerializeToString())
    reseal(folder)


def reseal(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    for key in ("files", "seal", "format_version"):
        del manifest[key]
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest | changes)


@pytest.mark.parametrize(
    ("options", "layer", "expert"),
    [
        ({}, 0, 3),
        ({"preset": "tiny-phi", "top_k": 2}, 2, 0),
        ({"router_bias": False}, 2, 1),
        ({"preset": "tiny-phi", "router_bias": False, "top_k": 2}, 0, 2),
        ({"use_residual": True, "expert_names": ()}, 0, 0),
    ],
)
def test_a_broken_expert_is_named(
    tiny_bundle: Make, tmp_path: Path, options: dict[str, Any], layer: int, expert: int
) -> None:
    folder = copied(tiny_bundle(**options), tmp_path)
    assert sweep_experts(OrtRuntime(Bundle.open(folder))) == []
    matrix = "fc2" if options.get("preset") == "tiny-phi" else "down"
    own = f"decoder.layers.{layer}.ffn.experts.{expert}"
    spoil(folder, f"{own}.{matrix}.weight")
    names = [] if "expert_names" in options else ["mri", "ct", "pathology", "xray"]
    shown = f"{own} ({names[expert]})" if names else own
    assert sweep_experts(OrtRuntime(Bundle.open(folder))) == [shown]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_are_read_as_onnx_reads_them(tiny_bundle: Make, precision: str) -> None:
    folder = tiny_bundle(precision)
    for graph in (folder / "vision.onnx", folder / "decoder.onnx"):
        read = dict(float_weights(graph))
        proto = onnx.load(graph).graph
        expected = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in proto.initializer
            if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        }
        assert read.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(read[name], array.ravel())


@pytest.mark.parametrize("value", [np.nan, 0, -np.inf])
def test_a_bad_scale_is_found_and_never_loaded(
    tiny_bundle: Make, tmp_path: Path, value: float
) -> None:
    folder = copied(tiny_bundle("int8"), tmp_path)
    assert sweep_weights(Bundle.open(folder)) == []
    name = "decoder.layers.0.ffn.experts.1.up.weight.scale"
    spoil(folder, name, value=value)
    assert sweep_weights(Bundle.open(folder)) == [name]
    with pytest.raises(BundleError, match=r"experts\.1\.up\.weight\.scale"):
        OrtRuntime(Bundle.open(folder))


def test_every_expert_is_looked_at(tiny_bundle: Make, tmp_path: Path) -> None:
    folder = copied(tiny_bundle(), tmp_path)
    for expert, layer in enumerate((2, 0, 2, 0)):
        spoil(folder, f"decoder.layers.{layer}.ffn.experts.{expert}.down.weight", value=np.inf)
    faults = sweep_experts(OrtRuntime(Bundle.open(folder)))
    assert [fault.split(" ")[0][-1] for fault in faults] == list("0123")
    assert [fault.split(".")[2] for fault in faults] == list("2020")


@pytest.mark.parametrize(
    "name", ["decoder.norm.weight", "decoder.layers.2.ffn.meta.up.weight", "decoder.head.weight"]
)
def test_what_all_experts_share_is_not_their_fault(
    tiny_bundle: Make, tmp_path: Path, name: str
) -> None:
    folder = copied(tiny_bundle(), tmp_path)
    spoil(folder, name)
    assert sweep_experts(OrtRuntime(Bundle.open(folder))) == ["decoder"]


def test_the_tower_and_a_dense_decoder_are_swept(tiny_bundle: Make, tmp_path: Path) -> None:
    folder = copied(tiny_bundle(dense=True), tmp_path)
    assert sweep_experts(OrtRuntime(Bundle.open(folder))) == []
    graph = onnx.load(folder / "vision.onnx", load_external_data=False).graph
    sizes = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    spoil(folder, next(name for name, rank in sizes.items() if rank == 2), "vision")
    spoil(folder, "decoder.layers.1.ffn.down.weight")
    assert sweep_experts(OrtRuntime(Bundle.open(folder))) == ["vision", "decoder"]


# --- the record -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    image = tmp_path_factory.mktemp("images") / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(image)
    ask = ("Is there effusion?", "Where?")
    rest: tuple[Any, ...] = ("no", "CLOSED", "ct", None, None, "test")
    return Data("questions", [Example(str(n), image, text, *rest) for n, text in enumerate(ask)])


def test_a_faithful_bundle_carries_its_proof(
    tiny_bundle: Make, tiny_checkpoint: Make, tmp_path: Path, data: Data
) -> None:
    folder, checkpoint = copied(tiny_bundle(), tmp_path), tiny_checkpoint()
    before = verify(folder)
    assert (before.passed, before.record, before.error()) == (None, None, None)
    assert before.bundle.proof == "not measured"

    steps: list[str] = []
    other = OrtRuntime(Bundle.open(tiny_bundle("int8")))
    found = verify(
        folder,
        checkpoint,
        data,
        beside={"int8": lambda: other},
        progress=lambda step, done, total: steps.append(step),
    )
    assert list(dict.fromkeys(steps)) == [
        *("hashes", "the checkpoint", "weights", "experts", "the bundle", "damaged models"),
        "int8",
    ]
    assert (found.passed, found.outcome) == (None, "not decided")  # on two questions
    assert found.error() is None
    assert set(found.beside) == {"int8"}
    assert found.beside["int8"].overall.kl.mean > 1e-5
    assert found.bundle.proof == "not decided"
    json.dumps(found.to_json(), allow_nan=False)

    record = read_record(Bundle.open(folder))
    assert record == found.record
    assert isinstance(record, AnswersRecord)
    assert found.recorded
    assert record.checkpoint_sha256 == found.bundle.manifest["source"]["checkpoint_sha256"]
    assert record.data == Source("questions", data.sha256())
    assert record.figures.overall.answer_agreement.total == 2
    assert record.machine == this_machine()
    written = json.dumps(Bundle.open(folder).verification)
    assert json.loads(written)["figures"]["routing"]["by_layer"].keys() == {"0", "2"}
    assert str(data.examples[0].image.parent) not in written

    alone = verify(folder)
    assert (alone.outcome, alone.record) == ("not decided", record)
    again = verify(folder, checkpoint, data)
    assert again.record is not None
    assert dataclasses.replace(again.record, when=record.when) == record


def test_inputs_that_are_asked_anyway_are_not_asked_twice(
    tiny_bundle: Make, tiny_checkpoint: Make, tmp_path: Path, data: Data
) -> None:
    """Under ids of their own they are; the bundle carries the same either way, to the byte."""
    others = [dataclasses.replace(one, id=f"again {one.id}") for one in data.examples]
    carried, asked = [], []
    for number, inputs in enumerate((data.examples, others)):
        folder, steps = copied(tiny_bundle(), tmp_path / str(number)), list[str]()
        progress = lambda step, *_, steps=steps: steps.append(step)  # noqa: E731
        found = verify(folder, tiny_checkpoint(), data, inputs=inputs, progress=progress)
        carried.append(recorded_file(found.bundle))
        asked.append(steps.count("the checkpoint"))
    assert asked == [1, 2]  # of one image
    assert carried[0] is not None
    assert carried[0] == carried[1]  # the name is by the content


def test_a_failed_gate_marks_the_bundle(
    tiny_bundle: Make, tiny_checkpoint: Make, tmp_path: Path, data: Data
) -> None:
    folder = copied(tiny_bundle("int8"), tmp_path)
    reseal(folder, gates=dataclasses.replace(GATES, vision_cosine=1.0).to_json())
    found = verify(folder, tiny_checkpoint(), data)
    assert found.passed is False
    assert found.bundle.proof == Bundle.open(folder).proof == "failed"
    for verification in (found, verify(folder)):
        error = verification.error()
        assert isinstance(error, VerificationError)
        assert error.exit_code == 4
        assert "cosine of image tokens" in error.what
        assert "should be at least 1.0000" in error.what
        assert "finite" not in error.what


def test_a_broken_expert_fails_the_verification(
    tiny_bundle: Make, tiny_checkpoint: Make, tmp_path: Path, data: Data
) -> None:
    folder = copied(tiny_bundle(), tmp_path)
    assert verify(folder, tiny_checkpoint(), data).error() is None
    spoil(folder, "decoder.layers.2.ffn.experts.1.up.weight")  # the old record is sealed in again
    alone = verify(folder)
    assert alone.passed is False
    assert "decoder.layers.2.ffn.experts.1 (ct)" in str(alone.error())
    found = verify(folder, tiny_checkpoint(), data)
    assert found.bundle.proof == "failed"
    assert found.record is not None
    expert = "decoder.layers.2.ffn.experts.1"
    assert found.record.faults == (f"{expert}.up.weight", f"{expert} (ct)")
    assert str(found.error()).count("finite") == 1


def test_what_cannot_be_verified_is_refused(
    tiny_bundle: Make, tiny_checkpoint: Make, tmp_path: Path, data: Data
) -> None:
    folder = copied(tiny_bundle(), tmp_path)
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ModelError, match="not made from the checkpoint"):
        verify(folder, tiny_checkpoint("tiny-phi"), data)
    absent = dataclasses.replace(data.examples[0], image=tmp_path / "absent.png")
    with pytest.raises(DataError, match=r"absent\.png cannot be read"):
        verify(folder, tiny_checkpoint(), Data("absent", [absent]))
    with pytest.raises(DataError, match="no questions"):
        verify(folder, tiny_checkpoint(), Data("empty", []))
    assert (folder / MANIFEST).read_bytes() == before
    reseal(folder, gates=None)
    with pytest.raises(BundleError, match="records no gates"):
        verify(folder, tiny_checkpoint(), data)
    (folder / "decoder.data").write_bytes(b"")
    with pytest.raises(BundleError, match=r"decoder\.data was changed"):
        verify(folder)


def test_a_bundle_records_the_gates_of_its_precision(tiny_bundle: Make) -> None:
    assert Bundle.open(tiny_bundle("int8")).gates == Gates(0.99, 0.003, 0.005, 0.99)
    assert Bundle.open(tiny_bundle()).gates == DEFAULT_GATES["fp32"]


def test_the_data_hash_is_of_the_contents(data: Data, tmp_path: Path) -> None:
    moved = tmp_path / "moved.png"
    shutil.copyfile(data.examples[0].image, moved)
    same = Data("other", [dataclasses.replace(one, image=moved) for one in data.examples])
    assert same.sha256() == data.sha256()
    reworded = [dataclasses.replace(same.examples[0], question="Why?"), same.examples[1]]
    assert Data("", reworded).sha256() != data.sha256()
    moved.write_bytes(moved.read_bytes() + b"0")
    assert same.sha256() != data.sha256()
