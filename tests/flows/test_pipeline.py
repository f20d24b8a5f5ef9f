"""Calibrate, export and verify as one: what is proven, what is refused, and what is left behind."""

import dataclasses
import gc
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import raising
from graphs import changed
from PIL import Image

from medmoe_edge import (
    CalibrateOptions,
    ExportOptions,
    VerifyOptions,
    calibrate,
    export_model,
    verify,
)
from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.calibration.data import CalibrationData, Sample, ask_about
from medmoe_edge.calibration.routing import RoutingProfile
from medmoe_edge.calibration.statistics import Source, Statistics
from medmoe_edge.checkpoint import reader
from medmoe_edge.checkpoint.reader import read_checkpoint, write_checkpoint
from medmoe_edge.config import Precision
from medmoe_edge.errors import (
    CheckpointError,
    DataError,
    InputError,
    MedMoEError,
    MissingDependencyError,
    ModelError,
    ResourceError,
    VerificationError,
)
from medmoe_edge.export.decoder import meta_name
from medmoe_edge.image.loading import load_image
from medmoe_edge.pipeline import med_moe
from medmoe_edge.pipeline.med_moe import as_examples
from medmoe_edge.training.initialise import random_tensors

Make = Callable[..., Path]
NAMES = ("mri", "ct", "pathology", "xray")
SECRET = "Doe_John"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four images, one of each modality, whose names are those of patients."""
    folder = tmp_path_factory.mktemp("questions")
    generator = np.random.default_rng(0)
    lines = []
    for index, modality in enumerate(NAMES):
        name = f"{SECRET}_{index}.png"
        pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        record = {"image": name, "question": "Where?", "answer": "Yes", "modality": modality}
        lines.append(json.dumps({"id": f"{SECRET}-{index}", **record}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return str(folder / "questions.jsonl")


@pytest.fixture(scope="module")
def stats(tiny_checkpoint: Make, questions: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "stats"
    calibrate(tiny_checkpoint(), out, CalibrateOptions(questions, samples=4))
    return out


def idle(step: str, done: int, total: int) -> None:
    """The progress of what is to be refused before any work."""
    raise AssertionError(f"the work has begun: {step}")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- export -----------------------------------------------------------------------------------


def test_an_export_with_data_carries_its_proof(
    tiny_checkpoint: Make, questions: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, steps = tmp_path / "new" / "bundle", []
    made = export_model(
        tiny_checkpoint(),
        out,
        ExportOptions("fp32", calibrate_on=questions, samples=4),
        progress=lambda step, done, total: steps.append(step),
    )
    assert left_in(out.parent) == ["bundle"]
    assert made.bundle == out
    assert made.verification is not None
    assert made.verification.bundle == Bundle.open(out)
    assert made.verification.bundle.proof == "not decided"
    assert {"layers", "decoder", "the checkpoint", "the bundle"} <= set(steps)
    manifest = (out / MANIFEST).read_text()
    record = json.loads(manifest)["verification"]
    assert record["data"]["name"] == "questions.jsonl, on which it was calibrated"
    assert record["figures"]["questions"] == 4
    assert json.loads(manifest)["calibration"]["samples"] == dict.fromkeys(sorted(NAMES), 1)
    assert SECRET not in manifest + caplog.text


def test_an_export_opens_and_hashes_the_checkpoint_once(
    tiny_checkpoint: Make, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("read_headers", "files_sha256"):
        real = getattr(reader, name)

        def counted(files: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            calls.append(name)
            return real(files)

        monkeypatch.setattr(reader, name, counted)
    options = ExportOptions("fp32", calibrate_on=questions, samples=4)
    export_model(tiny_checkpoint(), tmp_path / "out", options)
    assert sorted(calls) == ["files_sha256", "read_headers"]


def test_inputs_of_the_same_data_are_those_that_are_asked(tmp_path: Path) -> None:
    samples = list(ask_about("1", tmp_path / "a.png", "ct"))
    asked = list(as_examples(samples, tmp_path))
    inputs = [dataclasses.replace(one, image=tmp_path / "cut.png") for one in asked]
    new = dataclasses.replace(inputs[0], id="another")
    assert med_moe.as_asked([*inputs, new], asked) == [*asked, new]


def test_the_collector_rests_while_a_bundle_is_written_and_no_longer(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = []

    def write(*_: Any, **__: Any) -> None:
        running.append(gc.isenabled())
        raise ResourceError("The disk is full.", "Free some space.")

    monkeypatch.setattr(med_moe, "write_bundle", write)
    with pytest.raises(ResourceError):
        export_model(tiny_checkpoint(), tmp_path / "out", ExportOptions())
    assert running == [False]
    assert gc.isenabled()


def test_deltas_of_an_fp32_export_are_rounded_by_what_calibration_saw(
    tiny_checkpoint: Make, questions: str, tmp_path: Path
) -> None:
    before = tiny_checkpoint()
    tensors = dict(read_checkpoint(before))

    def near(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".experts." not in name:
            return tensor
        return tensors[meta_name(name)] + 3e-3 * tensor

    source = changed(before, tmp_path / "near", near)
    options = ExportOptions("fp32", experts="delta:bits=2", calibrate_on=questions, samples=4)
    made = export_model(source, tmp_path / "out", options)
    matrices = Bundle.open(made.bundle).manifest["quantisation"]["matrices"]
    methods = {matrix["method"] for matrix in matrices if ".delta" in matrix["name"]}
    assert "gptq" in methods  # where an expert saw enough tokens


def test_a_cut_export_is_calibrated_and_proven_on_its_own_modalities(
    tiny_checkpoint: Make, questions: str, tmp_path: Path
) -> None:
    options = ExportOptions("fp32", calibrate_on=questions, samples=4, modalities=("xray", "ct"))
    made = export_model(tiny_checkpoint(), tmp_path / "cut", options)
    assert made.verification is not None
    assert made.verification.passed is not False
    manifest = json.loads((tmp_path / "cut" / MANIFEST).read_text())
    record = manifest["verification"]
    assert record["data"]["name"].startswith("questions.jsonl, ct and xray alone, on which")
    assert record["figures"]["questions"] == 2
    assert manifest["calibration"]["samples"] == {"ct": 1, "xray": 1}
    again = verify(tmp_path / "cut", VerifyOptions(tiny_checkpoint(), questions, record=False))
    assert again.passed is not False


@pytest.mark.parametrize("sure", [True, False])
def test_merging_is_gated_by_the_answers_of_experts_apart(
    tiny_checkpoint: Make, questions: str, tmp_path: Path, sure: bool
) -> None:
    source = read_checkpoint(tiny_checkpoint())
    bias = torch.tensor([-100.0, -100.0, -100.0, 0.0] if sure else [0.0, 0.0, 0.0, 0.0])
    folder, tokenizer = tmp_path / "model", source.folder / "tokenizer.json"
    tensors = ((name, bias if name.endswith("router.bias") else t) for name, t in source)
    write_checkpoint(folder, source.config, tensors, tokenizer_file=tokenizer)

    options = ExportOptions(
        "fp32", calibrate_on=questions, samples=4, modalities=("xray",), merge=True
    )
    if sure:
        assert export_model(folder, tmp_path / "merged", options).bundle.exists()
        return
    with pytest.raises(VerificationError):
        export_model(folder, tmp_path / "merged", options)
    assert not (tmp_path / "merged").exists()


def test_a_failed_proof_leaves_no_bundle(
    tiny_checkpoint: Make, questions: str, tmp_path: Path
) -> None:
    options = ExportOptions("int4", "rtn", name="tiny-model", calibrate_on=questions, samples=4)
    with pytest.raises(VerificationError, match="tiny-model failed its verification: "):
        export_model(tiny_checkpoint(), tmp_path / "out", options)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("step", ["layers", "decoder", "the bundle"])
def test_an_interrupted_export_leaves_nothing(
    tiny_checkpoint: Make, questions: str, tmp_path: Path, step: str
) -> None:
    def interrupt(at: str, done: int, total: int) -> None:
        if at == step and done:
            raise KeyboardInterrupt

    options = ExportOptions("fp32", calibrate_on=questions, samples=4)
    with pytest.raises(KeyboardInterrupt):
        export_model(tiny_checkpoint(), tmp_path / "out", options, progress=interrupt)
    assert left_in(tmp_path) == []


def test_statistics_calibrate_without_proof(
    tiny_checkpoint: Make, stats: Path, tmp_path: Path
) -> None:
    made = export_model(tiny_checkpoint(), tmp_path / "out", ExportOptions("int4", stats=stats))
    assert made == med_moe.Export(tmp_path / "out", None)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.proof == "not measured"
    assert bundle.manifest["calibration"]["samples"] == dict.fromkeys(sorted(NAMES), 1)
    assert SECRET.encode() not in stats.read_bytes()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"calibrate_on": "builtin", "stats": Path("s")}, InputError, "Both data and statistics"),
        ({"precision": "mixed", "budget_bits": 4.5}, InputError, "what calibration measured"),
        ({"precision": "mixed", "calibrate_on": "builtin"}, InputError, "what calibration"),
        (
            {"precision": "mixed", "calibrate_on": "builtin", "budget_bits": 1.0},
            InputError,
            r"1 bits per weight are too few. The least is 2\.5",
        ),
        (
            {"precision": "mixed", "calibrate_on": "builtin", "budget_bits": float("nan")},
            InputError,
            "nan bits per weight are too few",
        ),
        ({"calibrate_on": "nowhere"}, InputError, "no calibration data 'nowhere'"),
        ({"stats": Path("nowhere")}, DataError, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(
    tiny_checkpoint: Make,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[MedMoEError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        export_model(tiny_checkpoint(), tmp_path / "out", ExportOptions(**options), progress=idle)
    assert left_in(tmp_path) == []


def test_an_output_is_refused_at_once(
    tiny_checkpoint: Make, tiny_bundle: Make, questions: str, tmp_path: Path
) -> None:
    options = ExportOptions(calibrate_on=questions)
    with pytest.raises(InputError, match="exists already"):
        export_model(tiny_checkpoint(), tiny_bundle(), options, progress=idle)
    forced = dataclasses.replace(options, force=True)
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        export_model(tiny_checkpoint(), tmp_path, forced, progress=idle)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResourceError, match="file"):
        export_model(tiny_checkpoint(), tmp_path / "file" / "out", options, progress=idle)


def test_matrices_that_groups_do_not_divide_are_refused_at_once(
    tiny_checkpoint: Make, questions: str, tmp_path: Path
) -> None:
    source = read_checkpoint(tiny_checkpoint())
    decoder = dataclasses.replace(
        source.config.decoder, hidden_size=48, heads=3, rotary_fraction=1.0
    )
    config = dataclasses.replace(source.config, decoder=decoder)
    folder = tmp_path / "odd"
    write_checkpoint(
        folder, config, random_tensors(config, 0), tokenizer_file=source.tokenizer_file
    )
    precisions: tuple[Precision, ...] = ("int4", "mixed")
    for precision in precisions:
        bits = 4.5 if precision == "mixed" else None
        options = ExportOptions(precision, calibrate_on=questions, budget_bits=bits)
        with pytest.raises(CheckpointError, match="of 48 weights, do not divide") as caught:
            export_model(folder, tmp_path / "out", options, progress=idle)
        assert caught.value.remedy == "Export it with --int8."
    assert left_in(tmp_path) == ["odd"]


def test_foreign_statistics_are_refused(tiny_checkpoint: Make, stats: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint("tiny", top_k=2)
    with pytest.raises(DataError, match="made for another checkpoint"):
        export_model(other, tmp_path / "out", ExportOptions(stats=stats))
    assert left_in(tmp_path) == []


def test_strict_refuses_statistics_that_made_do(
    tiny_checkpoint: Make, stats: Path, tmp_path: Path
) -> None:
    options = ExportOptions(stats=stats, strict=True)
    with pytest.raises(VerificationError, match=r"layer \d \w+ \(expert \d: \d+ of 256 tokens"):
        export_model(tiny_checkpoint(), tmp_path / "out", options, progress=idle)


@pytest.mark.parametrize(
    "damaged",
    [
        "vision.pre_norm.weight",
        "projector.0.weight",
        "decoder.embed.weight",
        "decoder.layers.0.post_norm.weight",
        "decoder.layers.0.ffn.router.weight",
        "decoder.layers.2.ffn.experts.1.up.weight",
        "decoder.layers.1.attention.q.weight",
        "decoder.norm.weight",
        "decoder.head.weight",
    ],
)
def test_weights_that_are_no_numbers_are_named(
    tiny_checkpoint: Make, questions: str, tmp_path: Path, damaged: str
) -> None:
    source = read_checkpoint(tiny_checkpoint())
    tensors = dict(source)
    tensors[damaged] = torch.full_like(tensors[damaged], torch.nan)
    folder = tmp_path / "broken"
    write_checkpoint(folder, source.config, tensors.items(), tokenizer_file=source.tokenizer_file)
    ways: list[dict[str, Any]] = [{"calibrate_on": questions, "samples": 2}]
    if damaged.startswith("decoder"):  # the tower is not traced here
        ways.append({})
    for options in ways:
        with pytest.raises(CheckpointError, match=damaged):
            export_model(folder, tmp_path / "out", ExportOptions(**options))
    assert left_in(tmp_path) == ["broken"]


# --- what a bundle is proven on ---------------------------------------------------------------


def calibration_data(image: Path, count: int) -> CalibrationData:
    samples = tuple(
        Sample(f"{SECRET}-{index}", image, "Where?", "", "ct", "OPEN") for index in range(count)
    )
    return CalibrationData("scans", samples, "ab" * 32)


@pytest.mark.parametrize(
    ("total", "used", "proven", "name"),
    [
        (1000, 128, 300, "scans"),
        (228, 128, 100, "scans"),
        (227, 128, 227, "scans, on which it was calibrated"),
        (50, 50, 50, "scans, on which it was calibrated"),
    ],
)
def test_the_proof_is_on_questions_held_out_if_there_are_enough(
    tmp_path: Path,
    total: int,
    used: int,
    proven: int,
    name: str,
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "scan.png")
    data = calibration_data(tmp_path / "scan.png", total)
    drawn = {sample.sha256 for sample in data.draw(used)}
    assert not any(SECRET in text for text in drawn)
    source = Source("scans", data.sha256, tuple(drawn))
    statistics = Statistics("cd" * 32, source, RoutingProfile.empty(["ct"], [], 0), (), {})
    proof = med_moe.proof_data(data, statistics, tmp_path)
    assert (proof.name, len(proof.examples)) == (name, proven)
    proven_on = {example.id for example in proof.examples}
    seen = {sample.id for sample in data.samples if sample.sha256 in drawn}
    assert proven_on.isdisjoint(seen) == (name == "scans")


def test_parts_of_files_become_pictures_of_their_own(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    whole = [*ask_about("a", tmp_path / "slide.png", "ct")][:2]
    part = [*ask_about("b", tmp_path / "slide.png", "ct", field=(10, 0, 50, 20))][:2]
    folder = tmp_path / "cut"
    folder.mkdir()
    examples = list(as_examples([*whole, *part], folder))
    assert [example.image for example in examples[:2]] == [tmp_path / "slide.png"] * 2
    assert examples[2].image == examples[3].image
    assert left_in(folder) == ["0.png"]
    np.testing.assert_array_equal(load_image(examples[2].image).pixels, pixels[:20, 10:])


# --- verify -----------------------------------------------------------------------------------


@pytest.fixture
def bundle(tiny_bundle: Make, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("int8"), folder)
    return folder


def test_bundles_and_baselines_stand_beside(
    tiny_checkpoint: Make, tiny_bundle: Make, bundle: Path, questions: str
) -> None:
    pytest.importorskip("bitsandbytes")
    beside = ["bitsandbytes-nf4", str(tiny_bundle())]
    found = verify(bundle, VerifyOptions(tiny_checkpoint(), questions, beside))
    assert list(found.beside) == ["bitsandbytes-nf4", tiny_bundle().name]
    exact = found.beside[tiny_bundle().name].overall.kl.mean
    assert exact < 1e-5 < found.beside["bitsandbytes-nf4"].overall.kl.mean
    assert found.record is not None
    assert found.record.data.name == "questions.jsonl"
    assert SECRET not in (bundle / MANIFEST).read_text()


def test_what_cannot_be_verified_is_refused_at_once(
    tiny_checkpoint: Make,
    tiny_bundle: Make,
    bundle: Path,
    questions: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = (bundle / MANIFEST).read_bytes()

    def refused(error: type[MedMoEError], message: str, **options: Any) -> str:
        with pytest.raises(error, match=message) as caught:
            verify(bundle, VerifyOptions(tiny_checkpoint(), questions, **options), progress=idle)
        return caught.value.remedy

    names = "nano, bitsandbytes-nf4, bitsandbytes-int8"
    assert names in refused(InputError, "no 'nothing' to measure", beside=["nothing"])
    other = str(tiny_bundle("fp32", "tiny-phi"))
    refused(ModelError, "bundle of another model", beside=[other])
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "bitsandbytes", None)
        refused(MissingDependencyError, "'bitsandbytes'", beside=["bitsandbytes-nf4"])
    read_only = raising(PermissionError(13, "Permission denied"))
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert "verify a copy" in refused(
        ResourceError, r"cannot be written \(Permission denied\)", record=True
    )
    assert (bundle / MANIFEST).read_bytes() == before


def test_another_checkpoint_is_refused(tiny_checkpoint: Make, bundle: Path, questions: str) -> None:
    steps: list[str] = []
    before = (bundle / MANIFEST).read_bytes()
    options = VerifyOptions(tiny_checkpoint("tiny", top_k=2), questions)
    with pytest.raises(ModelError, match="was not made from the checkpoint"):
        verify(bundle, options, progress=lambda step, *_: steps.append(step))
    assert steps == ["hashes"]
    assert (bundle / MANIFEST).read_bytes() == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in a folder of which nobody says the modality."""
    found = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(3)
    for index in range(12):
        pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(found / f"{index}.png")
    return found


def test_the_router_says_what_nobody_else_does(
    tiny_checkpoint: Make, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the engine reads the same images; every expert gets images of its own modality."""
    from medmoe_edge.engine.engine import load

    checkpoint, steps = tiny_checkpoint(), []
    found = calibrate(
        checkpoint,
        tmp_path / "stats",
        CalibrateOptions(str(folder), samples=12, hessians=False),
        progress=lambda step, *_: steps.append(step),
    )
    engine = load(checkpoint, runtime="torch")
    expected = Counter(engine.modality(file) for file in folder.iterdir())
    asked = found.statistics.samples  # some twice, for experts that were short
    assert set(asked) == set(expected)
    for source in (found.statistics.source, Statistics.open(tmp_path / "stats").source):
        assert source.labelled_by == {"router": sum(asked.values())}
    assert "images" in steps
    assert "Of 12 images nobody says the modality: the model's own router reads" in caplog.text
    assert all(f"{name} {count / 12:.0%}" in caplog.text for name, count in expected.items())
    read = {record.expert for record in found.statistics.coverage if record.own_modality_tokens}
    assert {NAMES[expert] for expert in read} == set(expected)


def test_an_export_decodes_each_image_once(
    tiny_checkpoint: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where Pillow opens files: to route, to calibrate, and to verify, one time in all."""
    opened: Counter[str] = Counter()
    real = Image.open

    def counted(file: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(file, Path) and file.parent == folder:
            opened[file.name] += 1
        return real(file, *rest, **options)

    monkeypatch.setattr(Image, "open", counted)
    options = ExportOptions("fp32", calibrate_on=str(folder), samples=12)
    made = export_model(tiny_checkpoint(), tmp_path / "out", options)
    assert made.verification is not None
    assert set(opened) == {f"{index}.png" for index in range(12)}
    assert set(opened.values()) == {1}
