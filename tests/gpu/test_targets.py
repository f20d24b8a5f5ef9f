"""A portable bundle made into those of other targets; TensorRT's engines are really built."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import op_types

from medmoe_edge.bundle.bundle import MANIFEST, Bundle, Target
from medmoe_edge.embedded import bundle_path, checkpoint_path
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import BundleError, ConfigError, InputError, ModelError, ResourceError
from medmoe_edge.evaluation.targets import GraphRuntime, as_written
from medmoe_edge.evaluation.verify import verify
from medmoe_edge.export import targets
from medmoe_edge.export.build import BuildOptions, export_bundle
from medmoe_edge.export.gpus import build_memory
from medmoe_edge.export.stored import specification
from medmoe_edge.export.targets import (
    TargetOptions,
    export_for,
    export_target,
    lower,
    plan_target,
    write_graphs,
)
from medmoe_edge.runtimes.ort.runtime import OrtRuntime, open_session

Make = Callable[..., Path]
ROOT = Path(__file__).parents[2]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="needs the extra rtx"
)
KERNELS = 25e6  # bytes, of two profiles; weights that became fp16 would take 2 to 4 times ours
CUDA = Target("onnxruntime-cuda", "fp16")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that engines are built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- what a target is ----------------------------------------------------------------------------


def test_a_bundle_that_names_no_target_is_portable(tiny_bundle: Make) -> None:
    target = Bundle.open(tiny_bundle("fp32")).target
    assert (target, target.is_engine, str(target)) == (Target(), False, "onnxruntime")


def test_an_engine_is_for_a_gpu_and_some_positions() -> None:
    engine = Target("tensorrt-rtx", "bf16", "sm89", "1.7.1", 128, 64)
    assert (engine.is_engine, str(engine)) == (True, "tensorrt-rtx sm89 bf16")
    for wrong in ({"gpu": ""}, {"prefill": 0}, {"prefill": 129}):
        with pytest.raises(ConfigError, match="names no GPU, or a prefill"):
            Target.from_json(engine.to_json() | wrong)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("onnxruntime-cuda", {"gpu": "sm89"}, "are for engines"),
        ("onnxruntime-cuda", {"capacity": 128}, "are for engines"),
        ("onnxruntime-cuda", {"dtype": "bf16"}, "computes in fp16, not bf16"),
        ("tensorrt-rtx", {}, "builds for one GPU"),
        ("tensorrt-rtx", {"gpu": "rtx-4091"}, "There is no GPU 'rtx-4091'"),
        ("tensorrt-rtx", {"gpu": "orin"}, "does not serve orin"),
        ("tensorrt", {"gpu": "rtx-4090"}, "does not serve rtx-4090"),
        ("tensorrt-rtx", {"gpu": "sm89", "capacity": 1}, "A cache of 1 positions"),
        ("tensorrt-rtx", {"gpu": "sm89", "capacity": 10**6}, "A cache of 1000000 positions"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_bundle: Make, name: Any, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=what):
        plan_target(Bundle.open(tiny_bundle("fp32")), name, **options)


# --- ONNX Runtime on CUDA ------------------------------------------------------------------------


@pytest.fixture
def cuda_bundle(tiny_bundle: Make, tmp_path: Path) -> Bundle:
    out = tmp_path / "cuda"
    assert export_target(Bundle.open(tiny_bundle("int8", "tiny")), out, CUDA) == {}
    return Bundle.open(out)


def test_it_carries_what_the_portable_bundle_knows(tiny_bundle: Make, cuda_bundle: Bundle) -> None:
    portable = Bundle.open(tiny_bundle("int8", "tiny"))
    assert cuda_bundle.target == CUDA
    assert cuda_bundle.config == portable.config
    assert cuda_bundle.proof == "not measured"
    source = cuda_bundle.manifest["source"]
    assert source["bundle_sha256"] == portable.sha256
    assert source["checkpoint_sha256"] == portable.manifest["source"]["checkpoint_sha256"]
    stored = cuda_bundle.manifest["quantisation"]
    assert stored["matrices"] == portable.manifest["quantisation"]["matrices"]
    assert stored["decoder"] == "int8 weights of the portable bundle, fp16 activations"
    for name in ("tokenizer.json", "embedding.npy"):
        assert cuda_bundle.path(name).read_bytes() == portable.path(name).read_bytes()
    with pytest.raises(BundleError, match="is made for onnxruntime-cuda"):
        plan_target(cuda_bundle, "onnxruntime-cuda")


def test_its_graph_computes_the_same(tiny_bundle: Make, cuda_bundle: Bundle) -> None:
    exact = OrtRuntime(Bundle.open(tiny_bundle("fp32", "tiny")))
    ours = OrtRuntime(cuda_bundle, device="cpu")
    pixels = np.random.default_rng(0).random(
        (1, 3, *[exact.config.vision.image_size] * 2), np.float32
    )
    assert difference(ours.encode_image(pixels), exact.encode_image(pixels)) < 1e-2


def test_a_gpu_that_is_not_there_is_an_error_and_the_cpu_only_on_request(
    cuda_bundle: Bundle,
) -> None:
    with pytest.raises(ResourceError, match="CUDA"):
        load(cuda_bundle.folder)
    engine = load(cuda_bundle.folder, device="cpu")
    assert engine.runtime.name == "onnxruntime"
    with pytest.raises(ModelError, match="is made for onnxruntime-cuda fp16, not for tensorrt"):
        load(cuda_bundle.folder, runtime="tensorrt")


def difference(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- graphs for engines --------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_engines_graph_computes_the_same_in_half(
    tiny_bundle: Make, tmp_path: Path, preset: str, precision: str
) -> None:
    from medmoe_edge.export.builder import save_model

    bundle = Bundle.open(tiny_bundle(precision, preset))
    runtimes = []
    for name, model in (
        ("exact", specification(bundle)),
        ("half", decoder_graph(bundle, Target("tensorrt-rtx", "fp16", "sm89", "1", 40, 40))),
    ):
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name, "decoder")
        decoder = tmp_path / name / "decoder.onnx"
        runtimes.append(GraphRuntime(bundle, bundle.path("vision.onnx"), decoder))
    exact, half = runtimes
    caches = exact.new_cache(40), half.new_cache(12)
    assert caches[1].capacity == 40  # as it was made
    generator = np.random.default_rng(0)
    for length in (9, 1, 5):
        embeds = generator.normal(0, 0.2, (length, 64)).astype(np.float32)
        steps = exact.step(embeds, caches[0]), half.step(embeds, caches[1])
        assert 0 < difference(steps[1].logits, steps[0].logits) < 1e-2
        assert np.array_equal(*(step.router_logits.argmax(-1) for step in steps))


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0"])
def test_a_decoder_in_two_graphs_computes_the_same(
    tiny_bundle: Make, tmp_path: Path, version: str
) -> None:
    bundle = Bundle.open(tiny_bundle("int8", "tiny"))
    one = Target("tensorrt-rtx", "fp16", "sm89", version, 16, 16)
    two = replace(one, engines=2)
    assert (one.decoders, two.decoders) == (("decoder",), ("decoder.0", "decoder.1"))
    assert [list(layers) for layers in replace(one, engines=2).layers(5)] == [[0, 1], [2, 3, 4]]
    sessions = {}
    for target in (one, two):
        folder = tmp_path / str(target.engines)
        folder.mkdir()
        write_graphs(bundle, target, folder)
        for name in target.decoders:
            sessions[name] = open_session(folder / f"{name}.onnx", as_written())
    embeds = np.random.default_rng(5).normal(0, 0.2, (1, 6, 64)).astype(np.float32)

    def run(name: str, embeds: Any) -> dict[str, Any]:
        session, feeds = sessions[name], {"embeds": embeds, "start": np.array([0])}
        for value in session.get_inputs():
            if value.name.startswith("past_"):
                feeds[value.name] = np.zeros(value.shape, np.float16)
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    whole, first = run("decoder", embeds), run("decoder.0", embeds)
    assert set(first) & {"logits", "hidden"} == {"hidden"}
    second = run("decoder.1", first["hidden"])
    assert difference(second["logits"], whole["logits"]) < 1e-3
    routing = [part["router_logits"] for part in (first, second) if "router_logits" in part]
    assert np.allclose(np.concatenate(routing, 2), whole["router_logits"], atol=1e-2)  # half
    written = {name for part in (first, second) for name in part if name.startswith("present_")}
    assert written == {name for name in whole if name.startswith("present_")}


@needs_rtx
def test_too_little_memory_for_one_engine_makes_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(bundle_path("nano"))
    weights = bundle.path("decoder.data").stat().st_size
    monkeypatch.setattr(targets, "available_memory", lambda: build_memory(weights) - 1)
    target = plan_target(bundle, "tensorrt-rtx", gpu="sm89")
    assert target.engines == 2
    built = export_target(bundle, tmp_path / "out", target)
    assert set(built) == {"vision", "decoder.0", "decoder.1"}
    found = Bundle.open(tmp_path / "out")
    assert found.target == target
    sizes = [built[name].bytes for name in target.decoders]
    assert weights < sum(sizes) < weights + 2 * KERNELS
    assert max(sizes) < 0.7 * sum(sizes)
    for available in (10**12, None):
        monkeypatch.setattr(targets, "available_memory", lambda available=available: available)
        assert plan_target(bundle, "tensorrt-rtx", gpu="sm89").engines == 1


def decoder_graph(bundle: Bundle, target: Target) -> ir.Model:
    model = specification(bundle)
    lower(model, bundle.config, target)
    return model


def test_an_engines_graph_is_standard_onnx_with_its_integers(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("int4", "tiny"))
    model = decoder_graph(bundle, Target("tensorrt-rtx", "bf16", "sm89", "1", 40, 40))
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions
    counts = op_types(model)
    assert counts["TensorScatter"] == 2 * bundle.config.decoder.layers
    kinds = {value.dtype for value in model.graph.initializers.values()}
    assert {ir.DataType.INT4, ir.DataType.BFLOAT16} <= kinds
    caches = [value for value in model.graph.inputs if str(value.name).startswith("past_")]
    assert {(value.dtype, value.shape[2]) for value in caches if value.shape} == {
        (ir.DataType.BFLOAT16, 40)
    }


# --- TensorRT for RTX ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "int4"
    return export_bundle(checkpoint_path("nano"), out, BuildOptions(precision="int4", method="rtn"))


@needs_rtx
@pytest.mark.parametrize(  # a build takes seconds; the command below builds for sm89
    ("precision", "gpu"), [("int8", "sm86"), ("int4", "sm120")]
)
def test_nanos_engines_are_built_and_keep_its_bits(
    nano_int4: Path, tmp_path: Path, gpu: str, precision: str
) -> None:
    bundle = Bundle.open(bundle_path("nano") if precision == "int8" else nano_int4)
    target = plan_target(bundle, "tensorrt-rtx", gpu=gpu)
    built = export_target(bundle, tmp_path / "out", target)
    found = Bundle.open(tmp_path / "out")
    assert found.target == target
    assert found.target.capacity == found.target.prefill == bundle.config.decoder.max_positions
    assert set(built) == {"vision", "decoder"}
    weights = bundle.path("decoder.data").stat().st_size
    assert weights < built["decoder"].bytes < weights + KERNELS
    assert not any(engine.cached for engine in built.values())
    with pytest.raises(BundleError, match="is whole, and no more can be told"):
        verify(found.folder)
    with pytest.raises(ModelError, match="holds engines for a GPU"):
        load(found.folder, device="cpu")
    with pytest.raises(ResourceError):  # no GPU here; on one, the runtime's own tests run it
        load(found.folder).runtime.new_cache(8)


@needs_rtx
def test_the_command_builds_within_memory_and_then_from_its_cache(tmp_path: Path) -> None:
    command = ["export", "nano", "--target", "tensorrt-rtx", "--gpu", "rtx-4090", "--json"]
    told = [
        json.loads(
            subprocess.run(
                [sys.executable, "cli.py", *command, "-o", str(tmp_path / out)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for out in ("first", "again")
    ]
    assert told[0]["target"]["gpu"] == "sm89"
    weights = (bundle_path("nano") / "decoder.data").stat().st_size
    peak = told[0]["engines"]["decoder"]["peak_memory"]  # of a process without torch
    assert peak is None or peak < 1.5 * weights + 1e9
    assert [run["engines"]["decoder"]["cached"] for run in told] == [False, True]
    engines = [(tmp_path / out / "decoder.engine").read_bytes() for out in ("first", "again")]
    assert engines[0] == engines[1]


@needs_rtx
@pytest.mark.parametrize(("precision", "gpu"), [("int4", "sm89"), ("int8", "sm120")])
def test_a_full_width_layer_is_built_within_memory(
    tmp_path: Path, precision: str, gpu: str
) -> None:
    script = [sys.executable, "tests/stress/full_width_layer.py", precision, gpu, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = json.loads(subprocess.check_output(script, cwd=ROOT, env=environment))
    assert told["weights"] < told["engine"] < told["weights"] + KERNELS
    assert told["peak_memory"] is None or told["peak_memory"] < 1.5 * told["weights"] + 1e9
    assert told["left"] < 0.5 * told["weights"]  # glibc would keep three quarters of them


@needs_rtx
def test_a_build_that_fails_leaves_the_good_bundle(
    tiny_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    portable, out = Bundle.open(tiny_bundle("int8", "tiny")), tmp_path / "out"
    shutil.copytree(portable.folder, out)
    before = (out / MANIFEST).read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(targets, "build_engine", stop)
    target = plan_target(portable, "tensorrt-rtx", gpu="sm89")
    with pytest.raises(KeyboardInterrupt):
        export_target(portable, out, target, force=True)
    assert (out / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unknown_target_in_a_manifest_is_said(cuda_bundle: Bundle) -> None:
    manifest = json.loads(json.dumps(dict(cuda_bundle.manifest)))
    manifest["target"]["name"] = "abacus"
    with pytest.raises(ConfigError, match="abacus"):
        replace(cuda_bundle, manifest=manifest).target  # noqa: B018


def test_what_cannot_be_built_is_refused_before_the_checkpoint_is_exported(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    def portable(folder: Path) -> None:
        raise AssertionError("hours of work")

    with pytest.raises(InputError, match="does not serve orin"):
        export_for(
            tiny_checkpoint(), tmp_path / "out", TargetOptions("tensorrt-rtx", "orin"), portable
        )
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_becomes_a_portable_bundle_first(tiny_bundle: Make, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()

    def portable(folder: Path) -> None:
        shutil.copytree(tiny_bundle("int4", "tiny"), folder)

    options = TargetOptions("onnxruntime-cuda")
    made = export_for(checkpoint, tmp_path / "out", options, portable)
    assert Bundle.open(made.bundle).target == CUDA
    assert made.to_json() == {
        "bundle": str(tmp_path / "out"),
        "target": CUDA.to_json(),
        "engines": {},
    }
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out"}
