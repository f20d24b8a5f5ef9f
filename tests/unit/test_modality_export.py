"""MedMoE as graphs: the numbers of torch, one expert run, a bundle that is proven or not made."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from command_line import Run, two_lines
from modality_models import TINY, tiny_model, write_tiny
from mutants import write_weights
from PIL import Image as Pillow
from torch import nn

import medmoe_edge
from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import (
    MANIFEST,
    MODALITY_GATES,
    Bundle,
    ModalityBundle,
    model_kind,
    write_manifest,
)
from medmoe_edge.bundle.recorded import recorded_file, stored_weights
from medmoe_edge.config_contrastive import Scores
from medmoe_edge.contrastive.engine import ModalityEngine, load_modality, open_bundle
from medmoe_edge.engine.engine import load as load_engine
from medmoe_edge.errors import (
    BundleError,
    MissingDependencyError,
    ModelError,
    VerificationError,
)
from medmoe_edge.evaluation import contrastive as verification_modality
from medmoe_edge.evaluation.contrastive import Pictures, sweep_modality, verify_modality
from medmoe_edge.evaluation.gates import compare_weights
from medmoe_edge.evaluation.inspection import inspect_modality, parameters
from medmoe_edge.evaluation.mutations import Mutation, mutated_weights
from medmoe_edge.export import contrastive as modality
from medmoe_edge.export import contrastive as modality_build
from medmoe_edge.export import vision as vision_quantise
from medmoe_edge.export.contrastive import export_image
from medmoe_edge.export.gpus import find_gpu, load_library
from medmoe_edge.export.tensorrt_builder import build_engine
from medmoe_edge.image.pixels import Image
from medmoe_edge.models.contrastive import ModalityMoE
from medmoe_edge.pipeline import ExportOptions
from medmoe_edge.pipeline.contrastive import export_modality
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.runtimes.contrastive import ImageFeatures, run_expert

TEXTS = ["a mass", "effusion", "no finding in the left lung"]
# wide enough that 8 bits are used
WIDE = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, depths=(2, 1)),
    text=dataclasses.replace(TINY.text, hidden_size=128, intermediate_size=256),
)


class Exported(NamedTuple):
    """A checkpoint, its model, and its bundles in fp32 and int8."""

    checkpoint: Path
    model: ModalityMoE
    fp32: ModalityBundle
    int8: ModalityBundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """Traced once; whatever is exported in this module is this model."""
    folder = tmp_path_factory.mktemp("modality")
    model = tiny_model(config=WIDE)
    checkpoint = write_tiny(folder / "tiny", model, {"temperature": 20.0, "entropy_limit": 0.7})
    graphs = {"export_image": export_image(model), "export_text": modality.export_text(model)}
    with pytest.MonkeyPatch.context() as patch:
        for name, graph in graphs.items():
            patch.setattr(modality_build, name, lambda _, graph=graph: graph.clone())
        for precision in ("fp32", "int8"):
            export_modality(checkpoint, folder / precision, ExportOptions(precision, name="tiny"))
        bundles = (ModalityBundle.open(folder / precision) for precision in ("fp32", "int8"))
        yield Exported(checkpoint, model, *bundles)


def images(count: int, seed: int = 2) -> Floats:
    side = TINY.vision.image_size
    return np.random.default_rng(seed).standard_normal((count, 3, side, side), np.float32)


def all_experts(model: ModalityMoE, pixels: Floats) -> ImageFeatures:
    """As the authors compute it: every expert on every image, masked with the router's choice."""
    with torch.inference_mode():
        pyramid = model.vision(torch.from_numpy(pixels))
        logits = model.router(pyramid.last.mean((1, 2)))
        mask = nn.functional.one_hot(logits.argmax(-1), len(model.experts)).float()
        every = torch.stack([expert(pyramid.scales) for expert in model.experts], 1)
        regions = (every * mask[:, :, None, None, None]).sum(1)
        return ImageFeatures(regions.numpy(), regions.mean((1, 2)).numpy(), logits.numpy())


def close(found: ImageFeatures, expected: ImageFeatures, tolerance: float = 2e-5) -> None:
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, other, atol=tolerance * np.abs(other).max())


# --- the graphs -------------------------------------------------------------------------------


def test_the_image_graph_is_the_masked_sum_over_all_experts(exported: Exported) -> None:
    pixels = images(3)
    close(open_bundle(exported.fp32).encode_images(pixels), all_experts(exported.model, pixels))


@pytest.mark.parametrize("expert", range(6))
def test_each_expert_is_reached_and_is_itself(exported: Exported, expert: int) -> None:
    pixels = images(1)
    with torch.inference_mode():
        scales = exported.model.vision(torch.from_numpy(pixels)).scales
        expected = exported.model.experts[expert](scales).numpy()
    found = run_expert(exported.fp32, expert, pixels)
    np.testing.assert_allclose(found.regions, expected, atol=2e-5 * np.abs(expected).max())


def test_only_the_chosen_expert_runs(exported: Exported, tmp_path: Path) -> None:
    """What the others hold does not matter, were it NaN: masked, it would still spread."""
    bundle = respelt(exported.fp32, tmp_path / "bundle", "experts.3.projections.0.bias", np.nan)
    for chosen in (0, 3, 5):
        found = run_expert(bundle, chosen, images(1))
        assert np.isfinite(found.pooled).all() == (chosen != 3)


def respelt(
    bundle: ModalityBundle, folder: Path, name: str, value: float, **contents: Any
) -> ModalityBundle:
    """A copy with a parameter of the image tower overwritten, and entries of the manifest."""
    shutil.copytree(bundle.folder, folder)
    model = ir.load(folder / "image.onnx")
    weight = model.graph.initializers[name]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(np.full(weight.const_value.shape.numpy(), value, np.float32))
    ir.save(model, folder / "image.onnx")
    kept = {key: value for key, value in bundle.manifest.items() if key not in ("files", "seal")}
    (folder / MANIFEST).unlink()
    write_manifest(folder, kept | contents)
    return ModalityBundle.open(folder)


def test_the_text_graph_equals_torch(exported: Exported) -> None:
    runtime = open_bundle(exported.fp32)
    reference = load_modality(exported.checkpoint).runtime
    for texts in (TEXTS[:1], TEXTS, [*TEXTS, "lung " * 30]):
        found, expected = runtime.encode_texts(texts), reference.encode_texts(texts)
        assert np.array_equal(found.mask, expected.mask)
        np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-4)
        np.testing.assert_allclose(found.words, expected.words, atol=1e-4)


def test_a_shared_expert_needs_no_question(tmp_path: Path) -> None:
    small = dataclasses.replace(TINY.vision, depths=(1, 1))
    model = tiny_model(config=dataclasses.replace(TINY, vision=small), shared_expert=True)
    graph = export_image(model)
    assert "If" not in {node.op_type for node in graph.graph}
    assert not [name for name in graph.graph.initializers if name.startswith("experts.1.")]
    assert [value.name for value in graph.graph.outputs] == list(ImageFeatures._fields)
    session = session_of(graph, tmp_path)
    pixels = images(2)
    for row in range(2):
        found = session.run(list(ImageFeatures._fields), {"pixels": pixels[row : row + 1]})
        with torch.inference_mode():
            expected = model.encode_image(torch.from_numpy(pixels[row : row + 1]))
        close(ImageFeatures(*found), ImageFeatures(*(part.numpy() for part in expected)))


def session_of(graph: ir.Model, folder: Path) -> Any:
    from medmoe_edge.export.builder import save_model
    from medmoe_edge.runtimes.ort.runtime import open_session, session_options

    save_model(graph, folder, "image")
    return open_session(folder / "image.onnx", session_options())


# --- int8 -------------------------------------------------------------------------------------


def test_wide_matrices_are_stored_in_8_bits(exported: Exported) -> None:
    graph = ir.load(exported.int8.path("image.onnx"))
    nodes = list(ir.traversal.RecursiveGraphIterator(graph.graph))
    stored = {node.inputs[1].name for node in nodes if node.op_type == "MatMulNBits"}  # type: ignore[union-attr]
    assert stored == {f"experts.{index}.attention_in.weight.packed" for index in range(6)}
    assert WIDE.size == vision_quantise.LEAST_WIDTH
    assert exported.int8.manifest["quantisation"]["precision"] == "int8"
    sizes = [
        sum(entry["bytes"] for entry in bundle.manifest["files"].values())
        for bundle in (exported.fp32, exported.int8)
    ]
    assert sizes[1] < 0.5 * sizes[0]


def test_int8_stays_close(exported: Exported) -> None:
    expected = all_experts(exported.model, images(4))
    found = open_bundle(exported.int8).encode_images(images(4))
    assert np.array_equal(found.router_logits.argmax(-1), expected.router_logits.argmax(-1))
    difference = np.abs(found.regions - expected.regions).max() / np.abs(expected.regions).max()
    assert 1e-4 < difference < 0.03


# --- the bundle -------------------------------------------------------------------------------


def test_the_bundle_says_what_it_is(exported: Exported) -> None:
    manifest = exported.int8.manifest
    assert manifest["kind"] == "modality-moe" == model_kind(exported.int8.folder)
    assert exported.int8.config == WIDE
    assert exported.int8.scores == Scores(20.0, 0.7)
    assert exported.int8.gates == MODALITY_GATES["int8"]
    assert set(manifest["files"]) == {
        *("image.onnx", "image.data", "text.onnx", "text.data", "tokenizer.json"),
        recorded_file(exported.int8),
    }
    assert model_kind(exported.checkpoint) == "modality-moe"


def test_each_kind_of_bundle_refuses_the_others_verbs(
    exported: Exported, tiny_bundle: Any, run: Run, scan: Path
) -> None:
    with pytest.raises(BundleError, match=r"modality-moe model.*classify, locate"):
        load_engine(exported.fp32.folder)
    assert isinstance(medmoe_edge.load(exported.fp32.folder), ModalityEngine)
    with pytest.raises(BundleError, match="med-moe model, and this needs one of modality-moe"):
        load_modality(tiny_bundle())
    result = run("ask", str(scan), "Is there effusion?", "--model", str(exported.fp32.folder))
    assert result.exit_code == 3
    assert "classify" in two_lines(result)[1]


def test_a_bundle_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    contents = {"config": {}, "quantisation": {}, "source": {}, "licence": "none", "name": "new"}
    write_manifest(tmp_path, {**contents, "kind": "telepathy"})
    for kind in (Bundle, ModalityBundle):
        with pytest.raises(BundleError, match="damaged"):
            kind.open(tmp_path)


def test_a_bundle_is_classified_with_as_its_checkpoint(exported: Exported, scan: Path) -> None:
    ours, reference = load_modality(exported.fp32.folder), load_modality(exported.checkpoint)
    assert ours.verification == "not measured"
    found, expected = (engine.classify(scan, TEXTS) for engine in (ours, reference))
    assert found.scores == pytest.approx(expected.scores, abs=1e-3)
    assert found.model["runtime"] == "onnxruntime"
    with pytest.raises(ModelError, match="torch runs checkpoints"):
        load_modality(exported.fp32.folder, runtime="torch")


def test_weights_that_are_no_numbers_leave_no_bundle(exported: Exported, tmp_path: Path) -> None:
    bias = exported.model.get_parameter("experts.2.projections.0.bias").data
    kept = bias.clone()
    bias.fill_(torch.inf)
    try:
        with pytest.raises(ModelError, match=r"experts\.2\.projections\.0\.bias .*infinite"):
            export_modality(exported.checkpoint, tmp_path / "out", ExportOptions("fp32"))
    finally:
        bias.copy_(kept)
    assert list(tmp_path.iterdir()) == []


# --- the proof --------------------------------------------------------------------------------


def pictures(count: int = 6) -> Pictures:
    generator = np.random.default_rng(0)
    drawn = [Image.from_array(generator.integers(0, 256, (30, 40), np.uint8)) for _ in range(count)]
    return Pictures("noise", "0" * 64, [partial(_the, image) for image in drawn])


def _the(image: Image) -> Image:
    return image


def test_a_verification_is_recorded(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.fp32.folder, tmp_path / "bundle")
    found = verify_modality(tmp_path / "bundle", exported.checkpoint, pictures())
    assert found.outcome == "not decided"  # on so few pictures
    assert found.faults == []
    bundle = ModalityBundle.open(tmp_path / "bundle")
    assert bundle.proof == "not decided"
    record = bundle.verification
    assert record is not None
    assert record["figures"]["images"] == 6
    assert record["figures"]["modality_agreement"] == 1
    assert record["figures"]["region_cosine_min"] > 0.9999
    names = [gate["name"] for gate in record["gates"]]
    assert names[:2] == ["weights", "finite"]
    assert set(names[2:]) == set(MODALITY_GATES["int8"].to_json())
    assert found.record is not None
    assert found.record.mutations is not None
    kinds = [effect.mutation.kind for effect in found.record.mutations.effects]
    assert kinds == ["exchange", "router"]  # there is no meta expert, and fp32 has no scales
    for effect in found.record.mutations.effects:
        assert (effect.kl, effect.answers.total) == (None, 6)
    exchange, router = found.record.mutations.effects
    assert exchange.cosine is not None
    assert exchange.cosine < 0.99
    assert exchange.seen
    assert router.routing.count


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_damage_to_any_expert_fails_every_verification(
    exported: Exported, tmp_path: Path, precision: str
) -> None:
    bundle = exported.int8 if precision == "int8" else exported.fp32
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    weights = {name: np.array(array) for name, array in stored_weights(folder / "image.onnx")}
    experts, damaged = bundle.config.experts, None
    for index in range(experts):
        owner = f"experts.{index}"
        for mutation in (
            Mutation("exchange", owner, f"experts.{(index + 1) % experts}"),
            Mutation("scale", owner),
            Mutation("router", owner),
        ):
            damaged = mutated_weights(weights, mutation)
            if damaged is None:
                assert mutation.kind == "scale"
                continue
            write_weights(folder, damaged)
            found = compare_weights(ModalityBundle.open(folder))
            assert found is not None
            place = "router." if mutation.kind == "router" else f"{owner}."
            assert any(name.startswith(place) for name in found.wrong), mutation
            write_weights(folder, {name: weights[name] for name in damaged})
    assert damaged is not None
    write_weights(folder, damaged)
    alone = verify_modality(folder)
    measured = verify_modality(folder, exported.checkpoint, pictures())
    for outcome in (alone, measured):
        assert outcome.passed is False
        assert "matrices unlike the checkpoint's" in str(outcome.error())
    assert measured.record is not None
    assert measured.record.gate("weights").verdict == "failed"


def test_a_model_unlike_its_checkpoint_fails_each_gate(exported: Exported, tmp_path: Path) -> None:
    checkpoint = write_tiny(tmp_path / "other", tiny_model(config=WIDE, seed=4))
    with pytest.raises(ModelError, match="was not made from"):
        verify_modality(exported.fp32.folder, checkpoint, pictures())
    source = {"checkpoint_sha256": load_modality(checkpoint).sha256}
    name, same = "router.2.bias", 0.0
    respelt(exported.fp32, tmp_path / "bundle", name, same, source=source)
    found = verify_modality(tmp_path / "bundle", checkpoint, pictures(8))
    assert found.record is not None
    verdicts = {gate.name: gate.verdict for gate in found.record.gates}
    assert verdicts.pop("finite") == "met"
    assert verdicts.pop("weights") == "met"  # they are those of the checkpoint it was made from
    assert set(verdicts.values()) == {"failed"}
    assert isinstance(found.error(), VerificationError)
    assert "Cosine of regions".lower() in str(found.error())
    assert ModalityBundle.open(tmp_path / "bundle").proof == "failed"


def test_an_expert_that_overflows_is_named(exported: Exported, tmp_path: Path) -> None:
    assert sweep_modality(exported.int8) == []
    name = "experts.4.attention_out.weight"
    bundle = respelt(exported.fp32, tmp_path / "bundle", name, np.inf)
    assert sweep_modality(bundle) == ["the expert of pathology"]


# --- the command line -------------------------------------------------------------------------


def noise(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (30, 40), np.uint8)
        Pillow.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_export_verify_and_inspect_do_with_it_what_they_do(
    exported: Exported, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification_modality, "sweep_modality", lambda _: [])
    data = str(noise(tmp_path / "images"))
    made = run(
        "export", str(exported.checkpoint), "--fp32", "--calibrate", data, "-o", "out", "--json"
    )
    assert made.exit_code == 0, made.stderr
    told = json.loads(made.stdout)
    assert told["precision"] == "fp32"
    assert told["verification"]["outcome"] == "not decided"
    checked = run("verify", "out", "--against", str(exported.checkpoint), "--data", data)
    assert checked.exit_code == 0, checked.stderr
    assert "Modality agreement" in checked.stdout
    assert "Not decided: 4 images of images" in checked.stdout
    assert run("verify", "out").exit_code == 0
    shown = run("inspect", "out")
    assert shown.exit_code == 0
    assert "of the experts" in shown.stdout
    told = json.loads(run("inspect", str(exported.checkpoint), "--json").stdout)
    assert told["parameters_total"] == sum(p.numel() for p in exported.model.parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--int4"], ["--mixed", "5"], ["--strict"], ["--stats", "file"]),
        *(["--vision-tower", "dir"], ["--int8", "--target", "onnxruntime-cuda"]),
    ],
)
def test_what_only_med_moe_can_is_refused(
    exported: Exported, run: Run, arguments: list[str]
) -> None:
    result = run("export", str(exported.checkpoint), *arguments, "-o", "out")
    assert result.exit_code == 2
    assert "modality-moe" in two_lines(result)[0]


@pytest.mark.parametrize("preset", MODALITY_PRESETS)
@pytest.mark.parametrize("shared", [False, True])
def test_parameters_are_counted_as_torch_has_them(preset: str, shared: bool) -> None:
    config = dataclasses.replace(MODALITY_PRESETS[preset], shared_expert=shared)
    found = parameters(config)
    with torch.device("meta"):
        model = ModalityMoE(config)
    parts = {"image tower": "vision", "router": "router", "text tower": "text"}
    counts = {
        name: sum(p.numel() for p in model.get_submodule(parts.get(name, name)).parameters())
        for name in found
    }
    assert found == counts


def test_one_expert_is_activated(exported: Exported) -> None:
    found = inspect_modality(exported.checkpoint)
    one = found.parameters["experts"] // found.config.experts
    assert found.parameters_activated == found.parameters_total - found.parameters["experts"] + one


# --- engines ----------------------------------------------------------------------------------


def test_tensorrt_for_rtx_builds_the_image_graph(exported: Exported, tmp_path: Path) -> None:
    """In fp32 (TF32 on the GPU), the branches included; nothing runs here."""
    try:
        load_library("tensorrt-rtx")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    built = build_engine(
        exported.fp32.path("image.onnx"),
        tmp_path / "image.engine",
        library="tensorrt-rtx",
        gpu=find_gpu("sm89", "tensorrt-rtx"),
        profiles=[],
        cache=tmp_path / "cache",
    )
    assert built.path.read_bytes()[:4] == b"vtrt"
    experts = sum(p.numel() for p in exported.model.experts.parameters())
    assert built.bytes > 4 * experts  # all are in it, whichever is chosen
