"""`verify --quick`: what travels with a bundle proves it, and tells one that was changed."""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Run, two_lines
from mutants import PRECISIONS, questions_about_noise, reseal, verified_bundles

from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.bundle.machine import Machine
from medmoe_edge.bundle.recorded import (
    AT_MOST,
    OF_ONE,
    Marks,
    Recorded,
    Signature,
    SignatureMaker,
    read_recorded,
    recorded_file,
    stored_matrices,
)
from medmoe_edge.data.datasets import Example
from medmoe_edge.embedded import bundle_path, is_installed
from medmoe_edge.engine import loading
from medmoe_edge.engine.loading import proven, this_machine
from medmoe_edge.errors import BundleError
from medmoe_edge.evaluation.gates import compare_signature
from medmoe_edge.evaluation.quick import verify_quick
from medmoe_edge.evaluation.verify import Data, verify

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Eight questions about two pictures."""
    texts = ("Is there effusion?", "Where?", "What is it?", "Which organ is this?")
    return questions_about_noise(tmp_path_factory.mktemp("images"), [(30, 40, 3), (48, 20)], texts)


@pytest.fixture(scope="module")
def recorded(
    tiny_bundle: Make,
    tiny_checkpoint: Make,
    examples: list[Example],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A bundle of each precision with its record and inputs; not to be changed."""
    root = tmp_path_factory.mktemp("recorded")
    return verified_bundles(tiny_bundle, tiny_checkpoint(), examples, root)


@pytest.fixture
def copy(recorded: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda precision: Path(shutil.copytree(recorded[precision], tmp_path / "bundle"))


def places(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Where the tensors of a decoder lie in its data: offset, bytes, type."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    found = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {part.key: part.value for part in tensor.external_data}
            kind = "<f2" if tensor.data_type == onnx.TensorProto.FLOAT16 else "<f4"
            found[tensor.name] = int(entry["offset"]), int(entry["length"]), kind
    return found


def scales(folder: Path) -> Iterator[tuple[int, str]]:
    """Offset and type of every scale."""
    for name, (start, length, kind) in places(folder).items():
        if name.endswith(".scale"):
            width = np.dtype(kind).itemsize
            for at in range(start, start + length, width):
                yield at, kind


def double(data: Path, at: int, kind: str) -> None:
    with data.open("r+b") as file:
        file.seek(at)
        (value,) = np.frombuffer(file.read(np.dtype(kind).itemsize), kind)
        file.seek(at)
        file.write((value * 2).astype(kind).tobytes())


def exchange(folder: Path, layer: int, one: int, other: int) -> None:
    extents = json.loads((folder / MANIFEST).read_text())["experts"]
    (first, size), (second, same) = (
        extents[f"decoder.layers.{layer}.ffn.experts.{index}"] for index in (one, other)
    )
    assert size == same
    with (folder / "decoder.data").open("r+b") as file:
        parts = []
        for place in (first, second):
            file.seek(place)
            parts.append(file.read(size))
        for place, part in zip((second, first), parts, strict=True):
            file.seek(place)
            file.write(part)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_faithful_bundle_is_proven(recorded: dict[str, Path], precision: str) -> None:
    before = (recorded[precision] / MANIFEST).read_bytes()
    found = verify_quick(recorded[precision])
    assert found.passed
    assert found.error() is None
    names = [gate.name for gate in found.gates]
    assert names == [
        *("weights", "finite", "answer_agreement", "routing_flips", "vision_cosine", "kl")
    ]
    assert found.weights is not None
    assert found.machine == this_machine()
    json.dumps(found.to_json(), allow_nan=False)
    assert (recorded[precision] / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(("proof", "verdict"), [("failed", False), ("not measured", None)])
def test_what_was_refused_or_never_measured_is_not_made_good(
    copy: Callable[[str], Path], proof: str, verdict: bool | None
) -> None:
    folder = copy("int8")
    record = json.loads((folder / MANIFEST).read_text())["verification"]
    reseal(folder, verification={**record, "passed": False} if proof == "failed" else None)
    assert Bundle.open(folder).proof == proof
    quick = verify_quick(folder)
    assert all(gate.passed for gate in quick.gates)
    assert quick.passed is verdict
    assert (quick.error() is not None) == (proof == "failed")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_that_changed_places_are_found(copy: Callable[[str], Path], precision: str) -> None:
    folder = copy(precision)
    exchange(folder, 2, 1, 3)
    reseal(folder)
    found = verify_quick(folder)
    failed = {gate.name for gate in found.gates if not gate.passed}
    if precision != "int4":  # of which random models lose too much
        assert "kl" in failed  # what it computes tells, too
    assert found.weights is not None
    experts = [f"decoder.layers.2.ffn.experts.{index}." for index in (1, 3)]
    if precision != "fp32":
        assert len(found.weights.wrong) == 6
        assert all(name.startswith(tuple(experts)) for name in found.weights.wrong)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_tell_any_two_experts_apart(copy: Callable[[str], Path], precision: str) -> None:
    folder = copy(precision)
    bundle = Bundle.open(folder)
    signature = read_recorded(bundle).signature
    assert signature is not None
    for layer in (0, 2):
        for one, other in itertools.combinations(range(4), 2):
            exchange(folder, layer, one, other)
            assert len(compare_signature(dict(stored_matrices(bundle)), signature).wrong) == 6
            exchange(folder, layer, one, other)
    assert compare_signature(dict(stored_matrices(bundle)), signature).wrong == ()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_any_scale_that_was_doubled_is_found(recorded: dict[str, Path], precision: str) -> None:
    bundle = Bundle.open(recorded[precision])
    signature = read_recorded(bundle).signature
    assert signature is not None
    stored = dict(stored_matrices(bundle))
    assert {matrix.name for matrix in signature.matrices} == stored.keys()
    quantised = [(name, scale) for name, (_, scale) in stored.items() if scale is not None]
    places = [(name, at) for name, scale in quantised for at in range(scale.size)]
    assert len(places) > 1000
    for name, at in places[:: len(places) // 150]:
        integers, scale = stored[name]
        assert scale is not None
        doubled = scale.copy()
        doubled.flat[at] *= 2
        changed = {**stored, name: (integers, doubled)}
        assert compare_signature(changed, signature).wrong == (name,)


def test_a_bundle_with_a_doubled_scale_fails(copy: Callable[[str], Path]) -> None:
    folder = copy("int8")
    double(folder / "decoder.data", *list(scales(folder))[-1])
    reseal(folder)
    found = verify_quick(folder)
    assert found.weights is not None
    assert found.weights.wrong == ("decoder.head.weight",)
    assert not found.passed


def test_marks_are_of_the_checkpoint(tiny_bundle: Make, tiny_checkpoint: Make) -> None:
    from medmoe_edge.checkpoint.reader import read_checkpoint

    checkpoint = read_checkpoint(tiny_checkpoint())
    signature = read_recorded(Bundle.open(tiny_bundle("int8"))).signature
    assert signature is not None
    for matrix, norms, _ in signature.each():
        weight = checkpoint.tensor(matrix.name).float().numpy()
        expected = np.log2(np.linalg.norm(weight, axis=1))
        np.testing.assert_allclose(norms, expected, atol=1 / 256)


def test_neighbours_stand_together_where_there_are_too_many() -> None:
    rows = np.random.default_rng(0).standard_normal((20_000, 6), np.float32)
    maker, marks = SignatureMaker(), Marks.of(rows, 3)
    names = [str(index) for index in range(30)]
    for name in names:
        maker.keep(name, 8, 6, marks, marks)
    made: Signature = maker.signature()
    assert len(names) * OF_ONE > AT_MOST >= len(made.norms) > AT_MOST / 2
    assert AT_MOST >= len(made.sums) > AT_MOST / 2
    squares = (rows.reshape(60_000, 2) ** 2).sum(-1)
    for matrix, norms, _ in made.each():
        assert matrix.norms == len(norms) == -(-60_000 // matrix.norm_block)
        whole = np.add.reduceat(squares, np.arange(0, 60_000, matrix.norm_block))
        np.testing.assert_allclose(4.0**norms, whole, rtol=0.01)


# --- what cannot be proven --------------------------------------------------------------------


def test_a_bundle_from_before_says_what_to_do(
    run: Run, copy: Callable[[str], Path], tiny_bundle: Make
) -> None:
    folder = copy("int8")
    (folder / str(recorded_file(Bundle.open(folder)))).unlink()
    reseal(folder)
    for path in (folder, tiny_bundle("int8")):  # the latter was exported without data
        result = run("verify", "--quick", str(path))
        assert result.exit_code == 3
        what, remedy = two_lines(result)
        assert "carries no recorded inputs" in what
        assert "--record" in remedy


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: Recorded(None, {"pictures": [3], "questions": []}, {}).pack()[1],
        lambda content: Recorded(None, {"pictures": 7}, {"pictures": np.zeros(3)}).pack()[1],
    ],
)
def test_damaged_inputs_are_refused(
    run: Run, copy: Callable[[str], Path], spoil: Callable[[bytes], bytes]
) -> None:
    folder = copy("int8")
    path = folder / str(recorded_file(Bundle.open(folder)))
    path.write_bytes(spoil(path.read_bytes()))
    reseal(folder)
    result = run("verify", "--quick", str(folder))
    assert result.exit_code == 3
    assert "damaged" in two_lines(result)[0]


def test_a_bomb_is_not_unpacked(copy: Callable[[str], Path]) -> None:
    folder = copy("int8")
    bundle = Bundle.open(folder)
    path = folder / str(recorded_file(bundle))
    path.write_bytes(Recorded(None, {"a": 1}, {"b": np.zeros(2**27, np.uint8)}).pack()[1])
    with pytest.raises(BundleError, match="holds more than"):
        read_recorded(bundle)


def test_inputs_are_renewed_whole(
    copy: Callable[[str], Path], tiny_checkpoint: Make, examples: list[Example]
) -> None:
    folder = copy("int8")
    before = recorded_file(Bundle.open(folder))
    data = Data("questions", examples)
    found = verify(folder, tiny_checkpoint(), data, inputs=examples[:2])
    after = recorded_file(Bundle.open(folder))
    assert before != after
    assert not (folder / str(before)).exists()
    kept = read_recorded(found.bundle)
    assert len(kept.about["questions"]) == 2
    assert kept.signature is not None
    assert (folder / str(after)).stat().st_size < 3e6
    assert str(examples[0].image) not in json.dumps(kept.about)
    again = verify(folder, tiny_checkpoint(), data)  # without inputs the old ones stay
    assert recorded_file(again.bundle) == after


# --- where a proof holds ----------------------------------------------------------------------


def other_machine(**changes: Any) -> dict[str, Any]:
    return this_machine().to_json() | changes


def test_a_proof_made_elsewhere_is_called_so(
    run: Run, copy: Callable[[str], Path], scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(scan.parent / "cache"))
    folder = copy("int8")
    asked = ["ask", str(scan), "Where?", "--model", str(folder), "--max-new-tokens", "1"]

    def told() -> Any:
        (answer,) = json.loads(run(*asked, "--json").stdout)["answers"]
        return answer["model"]

    assert told()["verified"] == {"here": True, "machine": this_machine().to_json()}
    assert "elsewhere" not in run(*asked).stderr

    record = json.loads((folder / MANIFEST).read_text())["verification"]
    there = other_machine(cpu="Another CPU", arithmetic="saturating")
    if this_machine().arithmetic == "saturating":
        there["arithmetic"] = "exact"
    reseal(folder, verification=record | {"machine": there})
    assert told()["verification"] == "passed"
    assert told()["verified"] == {"here": False, "machine": there}
    lines = [line for line in run(*asked).stderr.splitlines() if "elsewhere" in line]
    assert len(lines) == 1
    assert "Another CPU" in lines[0]
    assert lines[0].endswith("medmoe-edge verify --quick")
    assert "elsewhere" not in run("-q", *asked).stderr
    shown = json.loads(run("inspect", str(folder), "--json").stdout)
    assert shown["verified"] == {"here": False, "machine": there}
    assert re.search(r"which holds here +no", run("inspect", str(folder)).stdout)

    before = (folder / MANIFEST).read_bytes()
    assert run("verify", "--quick", str(folder)).exit_code == 0
    assert (folder / MANIFEST).read_bytes() == before
    assert told()["verified"]["here"] is True  # remembered for this machine, in the user's cache


def test_a_bundle_that_fails_here_is_said_to(
    run: Run, copy: Callable[[str], Path], scan: Path
) -> None:
    folder = copy("int8")
    double(folder / "decoder.data", *list(scales(folder))[7])
    reseal(folder)
    result = run("verify", "--quick", str(folder), "--json")
    assert result.exit_code == 4
    values = json.loads(result.stdout)
    assert values["passed"] is False
    assert len(values["weights"]["wrong"]) == 1
    assert len(result.stderr.splitlines()) == 2
    answered = run("ask", str(scan), "Where?", "--model", str(folder), "--json")
    assert "failed its verification" in answered.stderr
    (answer,) = json.loads(answered.stdout)["answers"]
    assert answer["model"]["verification"] == "failed"


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, True),
        ({"cpu": "Another of its kind"}, True),
        ({"onnxruntime": "1.24.9"}, True),
        ({"onnxruntime": "1.25.0"}, False),
        ({"arithmetic": "saturating"}, False),
        ({"flags": ("AVX2", "SSE2")}, False),
        ({"flags": ("AVX-512 VNNI", "AVX2", "SSE2")}, True),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_machines_that_compute_alike(changes: dict[str, Any], alike: bool) -> None:
    flags = ("AVX-512 VNNI", "AVX-512", "AVX2", "SSE2")
    one = Machine("CPU", "x86_64", flags, "1.24.1", "exact")
    other = Machine(**{**one.to_json(), "flags": flags, **changes})
    assert one.computes_like(other) is alike
    assert other.computes_like(one) is alike


def test_processors_that_do_not_tell_are_alike_by_name() -> None:
    one = Machine("M1", "arm64", (), "1.24.1", "exact")
    assert one.computes_like(one)
    assert not one.computes_like(Machine("M2", "arm64", (), "1.24.1", "exact"))


def test_a_damaged_memory_is_forgotten(recorded: dict[str, Path]) -> None:
    bundle = Bundle.open(recorded["int8"])
    loading.remember(bundle, {"passed": True, "machine": this_machine().to_json()})
    assert loading.remembered(bundle) is not None
    for content in (b"", b"[]", b'{"passed": 1}', b'{"passed": true, "machine": {"cpu": 1}}'):
        loading._path(bundle).write_bytes(content)
        assert loading.remembered(bundle) is None
        assert proven(bundle).here


@pytest.mark.parametrize("passed", [True, False])
def test_what_cannot_be_kept_is_told(
    recorded: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    passed: bool,
) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = Bundle.open(recorded["int8"])
    loading.remember(bundle, {"passed": passed, "machine": this_machine().to_json()})
    (told,) = caplog.messages
    assert f"cannot be kept in {loading._path(bundle).parent} (Not a directory)" in told


# --- what verify leaves alone -----------------------------------------------------------------


def test_an_installed_bundle_is_never_written(
    run: Run,
    copy: Callable[[str], Path],
    tiny_checkpoint: Make,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import medmoe_edge.embedded as embedded

    assert is_installed(bundle_path("nano"))
    folder = copy("int8")
    assert not is_installed(folder)
    monkeypatch.setattr(embedded, "_site_packages", lambda: [str(folder.parent)])
    assert is_installed(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = verify(folder, tiny_checkpoint(), Data("questions", examples), inputs=examples)
    assert (found.passed, found.recorded) == (True, False)
    assert found.record is not None
    assert proven(found.bundle).here
    lines = [
        json.dumps({"image": str(each.image), "question": each.question, "answer": each.answer})
        for each in examples[:2]
    ]
    (folder.parent / "questions.jsonl").write_text("\n".join(lines))
    line = ["verify", str(folder), "--against", str(tiny_checkpoint()), "--data"]
    told = json.loads(run(*line, str(folder.parent / "questions.jsonl"), "--json").stdout)
    assert (told["passed"], told["recorded"]) == (True, False)
    refused = run(*line, str(folder.parent / "questions.jsonl"), "--record")
    assert refused.exit_code == 2
    assert "part of an installation" in two_lines(refused)[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["--quick", "--against", "nano"], "--quick proves a bundle by what travels with it."),
        (["--quick", "--record"], "--quick proves a bundle by what travels with it."),
        (["--record"], "There is nothing to record."),
    ],
)
def test_options_that_do_not_go_together(run: Run, line: list[str], what: str) -> None:
    result = run("verify", *line)
    assert result.exit_code == 2
    assert two_lines(result)[0] == what
