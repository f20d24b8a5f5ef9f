"""Experts paged on ONNX Runtime: the same bits, less memory, and clean failures."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import psutil
import pytest
from command_line import start
from graphs import normal, observed
from test_engine import random_image

from medmoe_edge.bundle.bundle import MANIFEST, Bundle, write_manifest
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.config import RuntimeName
from medmoe_edge.device.measure import toy_runtime
from medmoe_edge.engine import loading as engine_loading
from medmoe_edge.engine.answer import Answer
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import BundleError, InputError
from medmoe_edge.export import build
from medmoe_edge.export.builder import OWNER, Extents
from medmoe_edge.export.passes.ort_paged import write_paged_graphs
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.ort import paged as ort_paged
from medmoe_edge.runtimes.ort.paged import MAPPED, OrtExpertStore, PagedOrtRuntime, _Segment
from medmoe_edge.runtimes.ort.runtime import OrtCache, OrtRuntime, session_options
from medmoe_edge.runtimes.paging.pager import ExpertFile, ExpertPager
from medmoe_edge.runtimes.paging.prediction import RoutingPrediction

ROOT = Path(__file__).parents[2]
Make = Callable[..., Path]
STEPS = (17, 5, 1, 1, 1)


@pytest.fixture
def copy(tiny_bundle: Make, tmp_path: Path) -> Path:
    """A bundle that may be changed, with an expert's bytes in its manifest."""
    shutil.copytree(tiny_bundle("int8"), tmp_path / "bundle")
    return tmp_path / "bundle"


def steps(runtime: Runtime, seed: int = 3) -> list[bytes]:
    """What a prefill, a question and three tokens give, to the bit."""
    cache = runtime.new_cache(sum(STEPS))
    told = []
    for number, length in enumerate(STEPS):
        embeds = normal(length, runtime.config.decoder.hidden_size, seed=seed + number)
        step = runtime.step(embeds, cache)
        told += [step.logits.tobytes(), step.router_logits.tobytes()]
    assert cache.length == sum(STEPS)
    return told


# --- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "preset", "options"),
    [
        ("int8", "tiny", {}),
        ("int4", "tiny", {"top_k": 2, "use_residual": True}),
        ("int8", "tiny", {"top_k": 2, "use_residual": True}),
        ("fp32", "tiny", {"meta_expert": False, "router_bias": False}),
        ("fp32", "tiny-phi", {"top_k": 2}),
        ("int8", "tiny-phi", {}),
        ("int4", "tiny-phi", {}),
    ],
)
def test_paged_experts_give_the_same_bits(
    tiny_bundle: Make, precision: str, preset: str, options: dict[str, Any]
) -> None:
    bundle = Bundle.open(tiny_bundle(precision, preset, **options))
    paged = PagedOrtRuntime(bundle, "40%")
    told, expected = steps(paged), steps(OrtRuntime(bundle))
    if precision == "int4":  # its kernel for AVX2 adds up in an order that the batch decides
        for one, other in zip(told, expected, strict=True):
            found, wanted = (np.frombuffer(each, np.float32) for each in (one, other))
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    else:
        assert told == expected
    report = paged.paging()
    assert report["misses"] > 8  # of eight experts: some came twice
    assert report["loads"] == report["misses"]
    assert {layer: len(experts) for layer, experts in report["experts"].items()} == {
        "0": 4,
        "2": 4,
    }
    assert paged.paging()["misses"] == 0


def test_experts_of_several_formats_in_one_model_too(tiny_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    folder = build.export_bundle(
        checkpoint,
        tmp_path / "bundle",
        build.BuildOptions(precision="mixed", budget_bits=5.0),
        statistics=observed(read_checkpoint(checkpoint)),
    )
    bundle = Bundle.open(folder)
    graphs = {name for name in bundle.manifest["files"] if name.startswith("expert.")}
    assert len(graphs) > 1
    assert steps(PagedOrtRuntime(bundle, "40%")) == steps(OrtRuntime(bundle))


def test_answers_are_the_same_and_say_what_was_paged(tiny_bundle: Make) -> None:
    folder = tiny_bundle("int8")
    resident, paged = load(folder), load(folder, memory_budget="40%")
    for seed in range(3):
        ours, theirs = (
            engine.ask_all(random_image(seed), ["Where?", "Is it?"], max_new_tokens=4)
            for engine in (paged, resident)
        )
        for answer, same in zip(ours, theirs, strict=True):
            assert told(answer) == told(same)
            assert same.paging is None
            assert answer.paging is not None
            json.dumps(answer.to_json())
        assert ours[0].paging != ours[1].paging  # each its own part
        first, second = (answer.paging or {} for answer in ours)
        assert first["hits"] + first["misses"] + first["late"] >= 8
        assert second["hits"] + second["misses"] + second["late"] < 30


def told(answer: Answer) -> dict[str, Any]:
    values = answer.to_json()
    return {name: values[name] for name in values if name not in ("timings", "paging")}


def test_two_engines_share_one_budget(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    size = sum(OrtExpertStore(bundle).sizes.values())
    pager = ExpertPager(size // 2)
    first, second = PagedOrtRuntime(bundle, pager), PagedOrtRuntime(bundle, pager)
    wanted = steps(OrtRuntime(bundle))
    for _ in range(2):
        assert steps(first) == steps(second) == wanted
        assert 0 < pager.used <= pager.capacity
    del first
    gc.collect()
    pager.ahead.submit(lambda: None).result(10)  # it is closed in the background
    assert {slot.owner for slot in pager.slots.values()} == {second.experts}


def test_the_graphs_cost_little_and_share_the_weights(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    names = set(bundle.manifest["files"])
    assert {"segment.0.onnx", "segment.1.onnx", "segment.2.onnx", "expert.0.onnx"} <= names
    for name in names:
        if name.startswith(("segment.", "expert.")):
            for value in ir.load(bundle.path(name)).graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    assert tensor.location in ("decoder.data", "expert.data")
            assert bundle.path(name).stat().st_size < 40_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux")
def test_what_lasts_keeps_nothing_else_in_memory() -> None:
    """An output of ONNX Runtime holds on to all inputs and outputs of its run."""
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]>
        two (float[n] x) => (float[n] large, float[1] small) {
            large = Add(x, x)
            small = ReduceMax(x)
        }"""
    )
    segment = _Segment(ort.InferenceSession(graph.SerializeToString(), session_options()))
    segment.lasting = frozenset({"small"})
    cache = OrtCache(PRESETS["tiny"].decoder, 1, np.float32, "cpu")
    x = np.ones(2**24, np.float32)
    found = segment.run({"x": ort.OrtValue.ortvalue_from_numpy(x)}, cache)
    before = psutil.Process().memory_info().rss
    del found["large"]
    assert before - psutil.Process().memory_info().rss > 0.9 * x.nbytes
    assert found["small"].numpy() == 1


# --- prediction -------------------------------------------------------------------------------


def test_the_embedded_profile_tells_what_an_image_will_need(
    data_dir: Path, embedded_paged: Bundle
) -> None:
    """One predicted expert a layer gets far more than a sixth of the tokens."""
    prediction = RoutingPrediction.of(embedded_paged)
    assert prediction is not None
    assert prediction.unseen.sum(-1) == pytest.approx(1)
    runtime = PagedOrtRuntime(embedded_paged, "50%")
    tokens = runtime.encode_image(np.zeros((1, 3, 256, 256), np.float32))
    shares = prediction.of_image(tokens)
    assert shares.shape == (3, 6)
    assert any(np.array_equal(shares, own) for own in prediction.shares)
    engine = load(embedded_paged.folder, memory_budget="50%")
    gains = []
    for name in ("covid_ct", "brain_tumor", "lc25000_lung"):
        image = sorted((data_dir / "images" / name).iterdir())[0]
        paging = engine.ask(image, "What modality is used to take this image?").paging
        assert paging is not None
        gains.append(paging["prediction"]["gain"])
    assert min(gains) > 1.3  # of one by chance


@pytest.fixture(scope="module")
def embedded_paged(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded bundle with graphs to page it, whichever version made it."""
    folder = tmp_path_factory.mktemp("embedded") / "nano"
    shutil.copytree(ROOT / "medmoe_edge" / "embedded" / "nano-bundle", folder)
    return add_paging(folder)


def add_paging(folder: Path) -> Bundle:
    bundle = Bundle.open(folder)
    paging = write_paged_graphs(folder, bundle.config, bundle.manifest["experts"])
    return rewrite(bundle, paging=paging)


def rewrite(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle's manifest with changes, under new hashes."""
    (bundle.folder / MANIFEST).unlink()
    kept = {k: v for k, v in bundle.manifest.items() if k not in ("files", "seal")}
    write_manifest(bundle.folder, {**kept, **changes})
    return Bundle.open(bundle.folder)


# --- what cannot be paged ---------------------------------------------------------------------


def test_a_bundle_without_the_graphs_answers_but_refuses_a_budget(copy: Path) -> None:
    bundle = rewrite(Bundle.open(copy), paging=None)
    assert load(copy).ask(random_image(), "Where?", max_new_tokens=1)
    with pytest.raises(BundleError, match="export the checkpoint again"):
        PagedOrtRuntime(bundle, "50%")


def test_a_bundle_that_does_not_say_where_weights_lie_answers_but_cannot_be_paged(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loading, "LARGE", 1)
    bundle = Bundle.open(copy)
    assert type(load(copy).runtime) is PagedOrtRuntime
    paging = {name: value for name, value in bundle.manifest["paging"].items() if name != "graphs"}
    bundle = rewrite(bundle, paging=paging)
    assert type(load(copy).runtime) is OrtRuntime
    with pytest.raises(BundleError, match="where its experts' weights lie"):
        PagedOrtRuntime(bundle, "50%")


def test_pages_are_dropped_of_paged_experts_alone(tiny_bundle: Make) -> None:
    with pytest.raises(InputError, match="no memory budget"):
        load(tiny_bundle("int8"), drop_pages=True)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no page cache to advise")
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_every_load_can_drop_its_pages(
    tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch, runtime: RuntimeName
) -> None:
    dropped: list[int] = []

    def advised(_: int, offset: int, __: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append(offset)

    monkeypatch.setattr(os, "posix_fadvise", advised)
    for drop in (False, True):
        engine = load(tiny_bundle("int8"), runtime=runtime, memory_budget="100%", drop_pages=drop)
        answer = engine.ask(random_image(), "Where?", max_new_tokens=1)
        assert answer.paging is not None
        assert len(dropped) == (answer.paging["loads"] if drop else 0)
    assert dropped


def test_a_dense_model_has_nothing_to_page(tiny_bundle: Make) -> None:
    with pytest.raises(BundleError, match="it has no experts"):
        load(tiny_bundle("fp32", dense=True), memory_budget="50%")


def test_a_budget_too_small_names_the_least(tiny_bundle: Make) -> None:
    folder = tiny_bundle("int8", top_k=2)
    with pytest.raises(InputError, match="too small"):
        load(folder, memory_budget=1000)  # before anything is read
    one = max(size for _, size in Bundle.open(folder).manifest["experts"].values())
    with pytest.raises(InputError) as caught:
        load(folder, memory_budget=one)
    least = int(caught.value.remedy.split(" take ")[1].split()[0].replace(",", ""))
    assert load(folder, memory_budget=least).ask(random_image(), "Where?").paging
    with pytest.raises(InputError):
        load(folder, memory_budget=least - 1)


def test_onnx_runtime_pages_on_the_cpu_alone(tiny_bundle: Make) -> None:
    with pytest.raises(InputError, match="ONNX Runtime on the CPU"):
        load(tiny_bundle("int8"), memory_budget="50%", device="cuda")


def test_torch_pages_too_but_shares_no_budget(tiny_bundle: Make) -> None:
    folder, image = tiny_bundle("int8"), random_image()
    paged = load(folder, runtime="torch", memory_budget="60%").ask(image, "Where?")
    assert paged.text == load(folder, runtime="torch").ask(image, "Where?").text
    assert paged.paging is not None
    with pytest.raises(InputError, match="cannot share"):
        load(folder, runtime="torch", memory_budget=ExpertPager(10**9))


def test_a_checkpoint_is_not_paged(tiny_checkpoint: Make) -> None:
    with pytest.raises(InputError, match="is a checkpoint"):
        load(tiny_checkpoint(), memory_budget="50%")


def test_the_command_line_takes_a_budget(tiny_bundle: Make, scan: Path) -> None:
    ask = ["ask", str(scan), "Where?", "--model", str(tiny_bundle("int8")), "--memory-budget"]
    done = start(*ask, "50%", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"][0]["paging"]["misses"] > 0
    refused = start(*ask, "10 potatoes")
    assert refused.returncode == 2
    assert "'10 potatoes' is no memory budget" in refused.stderr


# --- damage while it is open ------------------------------------------------------------------


def change_expert(folder: Path, bundle: Bundle, *, told: bool = False) -> None:
    """One byte of layer 2's expert 1: as storage fails, of which no time tells, or by writing."""
    offset, _ = bundle.manifest["experts"]["decoder.layers.2.ffn.experts.1"]
    before = (folder / "decoder.data").stat()
    with (folder / "decoder.data").open("r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)[0]
        file.seek(offset + 100)
        file.write(bytes([byte ^ 1]))
    later = before.st_mtime_ns + 10**9 * told
    os.utime(folder / "decoder.data", ns=(before.st_atime_ns, later))


def test_a_corrupted_expert_fails_its_request_and_no_other(copy: Path) -> None:
    bundle = Bundle.open(copy)
    runtime = PagedOrtRuntime(bundle, "100%")
    wanted = steps(OrtRuntime(bundle))
    change_expert(copy, bundle)
    for _ in range(2):
        with pytest.raises(BundleError, match=r"Expert 1 of layer 2 in .* was changed"):
            steps(runtime)
    change_expert(copy, bundle)  # back again
    assert steps(runtime) == wanted


def test_when_hashes_are_compared_can_be_chosen(copy: Path) -> None:
    bundle = Bundle.open(copy)
    runtimes = {
        check: PagedOrtRuntime(bundle, "40%", check=check) for check in ("first", "always", "never")
    }
    for check in ("first", "always"):
        steps(runtimes[check])
    change_expert(copy, bundle)
    for check in ("first", "never"):
        steps(runtimes[check])  # not looked at again; nor at all
    with pytest.raises(BundleError):
        steps(runtimes["always"])


def test_what_is_written_into_a_file_in_use_is_told(copy: Path) -> None:
    bundle = Bundle.open(copy)
    store = OrtExpertStore(bundle)
    store.load((1, 1))
    runtimes = OrtRuntime(bundle), PagedOrtRuntime(bundle, "100%")
    for runtime in runtimes:
        steps(runtime)
        runtime.embed([0])
    change_expert(copy, bundle, told=True)
    with pytest.raises(BundleError, match=r"Expert 1 of layer 2 in .* was changed"):
        store.load((1, 1))
    for runtime in runtimes:
        with pytest.raises(BundleError, match=r"decoder\.data was changed while it was in use"):
            runtime.embed([0])


def test_a_file_truncated_while_open_is_an_error_and_no_crash(copy: Path) -> None:
    bundle = Bundle.open(copy)
    runtime = PagedOrtRuntime(bundle, "100%")
    steps(runtime)  # everything is open: ONNX Runtime maps the file while it opens a session
    offset, _ = bundle.manifest["experts"]["decoder.layers.2.ffn.experts.1"]
    store = OrtExpertStore(bundle)
    os.truncate(copy / "decoder.data", offset + 1000)
    with pytest.raises(BundleError, match="is incomplete"):
        store.load((1, 1))


def test_a_bundle_replaced_while_open_goes_on_as_it_was(copy: Path) -> None:
    bundle = Bundle.open(copy)
    runtime = PagedOrtRuntime(bundle, "40%", drop_pages=True)
    wanted = steps(runtime)
    data = copy / "decoder.data"
    data.with_name("new").write_bytes(bytes(data.stat().st_size))
    data.with_name("new").replace(data)
    assert steps(runtime) == wanted


def test_an_interrupt_in_the_middle_of_a_load_leaves_a_usable_engine(
    tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    runtime = PagedOrtRuntime(bundle, "40%", prefetch=False)
    wanted = steps(runtime)
    read = ExpertFile.read

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        read(*arguments)

    # a process that was started in the background may have been told to ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ExpertFile, "read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                steps(runtime)
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps(runtime) == wanted
    assert runtime.experts.pager.used <= runtime.experts.pager.capacity


def test_a_system_that_cannot_read_at_a_place_pages_too(
    tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no `os.preadv`."""
    bundle = Bundle.open(tiny_bundle("int8"))
    wanted = steps(PagedOrtRuntime(bundle, "40%"))
    monkeypatch.delattr(os, "preadv")
    assert steps(PagedOrtRuntime(bundle, "40%")) == wanted


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_closed_engine_holds_no_memory(tiny_bundle: Make, runtime: RuntimeName) -> None:
    """Nor does it wait for Python's collector, which may come much later."""
    engine = load(tiny_bundle("int8"), runtime=runtime, memory_budget="60%")
    engine.ask(random_image(), "Is it?", max_new_tokens=2)
    held = weakref.ref(engine.runtime)
    gc.disable()
    try:
        engine.close()
        assert held() is None
    finally:
        gc.enable()


def test_a_soak_changes_no_answer_and_keeps_the_budget(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    runtime = PagedOrtRuntime(bundle, "40%")
    wanted = [steps(OrtRuntime(bundle), seed) for seed in range(3)]
    for turn in range(40):  # two hundred steps
        assert steps(runtime, turn % 3) == wanted[turn % 3]
        assert runtime.experts.pager.used <= runtime.experts.pager.capacity


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux")
def test_half_the_budget_is_half_the_memory(tmp_path: Path) -> None:
    """A hundred megabytes of experts, in processes of their own."""
    total = write_large(tmp_path / "large")
    resident, paged = (measured(tmp_path / "large", budget) for budget in ("resident", "50%"))
    assert paged["answer"] == resident["answer"]
    assert resident["peak"] - paged["peak"] > 0.4 * total
    assert paged["paging"]["misses"] > 0


def write_large(folder: Path) -> int:
    """An int8 bundle of random weights, without a vision tower; the bytes of its experts."""
    folder.mkdir()
    base = PRESETS["tiny"]
    assert base.moe is not None
    config = dataclasses.replace(
        base,
        decoder=dataclasses.replace(
            base.decoder, hidden_size=1024, heads=8, intermediate_size=2048, layers=4
        ),
        moe=dataclasses.replace(base.moe, layers=(0, 1, 2, 3)),
    )
    toy_runtime(config, "int8", folder)
    extents = find_extents(folder)
    paging = write_paged_graphs(folder, config, extents)
    about = {"name": "large", "quantisation": {}, "source": {}, "licence": ""}
    contents = {**about, "config": config.to_json(), "experts": extents, "paging": paging}
    write_manifest(folder, contents)
    return sum(int(expert["bytes"]) for expert in paging["experts"].values())


def find_extents(folder: Path) -> Extents:
    places: dict[str, list[tuple[int, int]]] = {}
    for name, value in ir.load(folder / "decoder.onnx").graph.initializers.items():
        owner, tensor = OWNER.match(name), value.const_value
        if owner and isinstance(tensor, ir.ExternalTensor):
            start = tensor.offset or 0
            places.setdefault(owner[1], []).append((start, start + (tensor.length or 0)))
    extents = {}
    for name, own in places.items():
        start = min(first for first, _ in own)
        extents[name] = [start, max(end for _, end in own) - start]
    return extents


def measured(folder: Path, budget: str) -> dict[str, Any]:
    script = ROOT / "tests" / "helpers" / "paged_process.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), budget],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


@pytest.mark.parametrize(
    ("large", "budget", "mapped"), [(1, "100%", True), (1, None, False), (MAPPED, "100%", False)]
)
def test_matrices_of_large_experts_that_may_go_are_mapped_by_themselves(
    tiny_bundle: Make,
    monkeypatch: pytest.MonkeyPatch,
    large: int,
    budget: str | None,
    mapped: bool,
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(ort_paged, "map_large_blocks", lambda: called.append(True))
    monkeypatch.setattr(ort_paged, "MAPPED", large)
    PagedOrtRuntime(Bundle.open(tiny_bundle()), budget)
    assert bool(called) is mapped


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_freed_block_that_was_mapped_is_gone() -> None:
    """Also after the heap has grown, when glibc by itself would keep it."""
    program = """
import ctypes, re
from pathlib import Path
from medmoe_edge.runtimes.ort.paged import MAPPED, map_large_blocks
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
map_large_blocks()
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def block():
    place = libc.malloc(2 * MAPPED)
    ctypes.memset(place, 1, 2 * MAPPED)
    return place
libc.free(block())
first, second = block(), block()
held = resident()
libc.free(first)
assert held - resident() > 1.9 * MAPPED, (held, resident())
libc.free(second)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
