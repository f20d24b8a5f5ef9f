"""Int8 is exact on every processor: all weights of all exported graphs keep the bound on pairs.

The graphs are read with onnx, as they lie in the bundles: no processor is asked.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import observed

from medmoe_edge.bundle.bundle import MANIFEST, Bundle, write_manifest
from medmoe_edge.bundle.machine import cpu_features
from medmoe_edge.bundle.recorded import int8_products
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.embedded import EMBEDDED, bundle_path
from medmoe_edge.export import build
from medmoe_edge.export.plan import HEAD
from medmoe_edge.runtimes.base import Warns
from medmoe_edge.runtimes.ort import runtime as arithmetic
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

Make = Callable[..., Path]
Integers = npt.NDArray[np.int8]
LARGEST = 255  # activation

# What exports a model: precision, preset, calibrated on random inputs or not, method
EXPORTS: list[tuple[str, str, bool, dict[str, Any]]] = [
    ("int8", "tiny", False, {}),
    ("int8", "tiny", False, {"method": "rtn"}),
    ("int8", "tiny", True, {}),
    ("int8", "tiny-phi", False, {}),
    ("int8", "tiny-phi", True, {}),
    ("int4", "tiny", False, {}),
    ("int4", "tiny-phi", True, {}),
    ("mixed", "tiny", True, {"budget_bits": 5.0}),
]


def products(graph: onnx.GraphProto) -> Iterator[str]:
    """The weights that `DynamicQuantizeMatMul` reads, in branches too."""
    for node in graph.node:
        if node.op_type == "DynamicQuantizeMatMul":
            yield node.input[1]
        for attribute in node.attribute:
            yield from products(attribute.g)


def int8_weights(folder: Path) -> Iterator[tuple[str, Integers]]:
    """Every such weight `[K, N]` of every graph of a bundle, those of paged experts included."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for file in sorted(folder.glob("*.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        read = set(products(graph))
        for tensor in graph.initializer:
            if tensor.name not in read:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            name, at = f"{file.name}: {tensor.name}", int(place["offset"])
            starts = {name: at}
            if place["location"] == "expert.data":  # which every expert is, by its place
                experts = manifest["paging"]["experts"].items()
                mine = [expert for expert, entry in experts if entry["graph"] == file.name]
                starts = {f"{name} of {e}": manifest["experts"][e][0] + at for e in mine}
            else:
                assert place["location"] == "decoder.data"
            content = np.memmap(folder / "decoder.data", np.int8, "r")
            for name, start in starts.items():
                yield name, content[start : start + int(np.prod(tensor.dims))].reshape(*tensor.dims)


def worst_sum(weight: Integers) -> int:
    """The largest sum of two neighbouring products along K that activations can make."""
    paired = weight[: len(weight) // 2 * 2].astype(np.int64).reshape(-1, 2, weight.shape[1])
    positive, negative = np.maximum(paired, 0).sum(1), np.minimum(paired, 0).sum(1)
    return LARGEST * int(max(positive.max(initial=0), -negative.min(initial=0)))


def check(folder: Path) -> list[str]:
    found = dict(int8_weights(folder))
    for name, weight in found.items():
        assert weight.dtype == np.int8, name
        assert worst_sum(weight) < 2**15, name
        assert weight.min(initial=0) >= -127, name
    return list(found)


@pytest.mark.parametrize(("precision", "preset", "calibrated", "options"), EXPORTS)
def test_every_export_adds_exactly(
    tiny_checkpoint: Make,
    tmp_path: Path,
    precision: Any,
    preset: str,
    calibrated: bool,
    options: dict[str, Any],
) -> None:
    checkpoint = tiny_checkpoint(preset)
    statistics = observed(read_checkpoint(checkpoint)) if calibrated else None
    folder = build.export_bundle(
        checkpoint,
        tmp_path / "out",
        build.BuildOptions(precision=precision, **options),
        statistics=statistics,
    )
    names = check(folder)
    if precision == "int8":  # whole, in segments, and the experts of two layers, alone
        assert {name.partition(":")[0] for name in names} >= {
            *("decoder.onnx", "segment.0.onnx", "segment.1.onnx", "segment.2.onnx"),
            "expert.0.onnx",
        }
        assert sum(name.startswith("expert.") for name in names) == 2 * 4 * (
            3 if preset == "tiny" else 2
        )
    else:  # the rest is in groups
        assert {name.partition(": ")[2] for name in names} == {HEAD}
    assert Bundle.open(folder).manifest["quantisation"]["pair_bound"] == 128
    ours = {name for name, _ in int8_products(folder / "decoder.onnx")}
    assert ours == {n.partition(": ")[2] for n in names if n.startswith("decoder.onnx")}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_bundles_add_exactly(name: str) -> None:
    names = check(bundle_path(name))
    assert len(names) > 100 if name == "nano" else not names  # modality-nano is all in groups


# --- bundles from before --------------------------------------------------------------------------


@pytest.fixture
def before(tiny_bundle: Make, tmp_path: Path) -> Path:
    """A bundle as earlier versions wrote them: two large neighbours, and no word of a bound."""
    folder = tmp_path / "before"
    shutil.copytree(tiny_bundle("int8"), folder)
    weight = onnx.load(folder / "decoder.onnx", load_external_data=False).graph.initializer
    head = next(tensor for tensor in weight if tensor.name == HEAD)
    place = {entry.key: entry.value for entry in head.external_data}
    content = bytearray((folder / "decoder.data").read_bytes())
    start, channels = int(place["offset"]), head.dims[1]
    content[start] = content[start + channels] = 127  # inputs 0 and 1 of the first channel
    (folder / "decoder.data").write_bytes(content)
    say_no_bound(folder)
    return folder


def say_no_bound(folder: Path) -> None:
    manifest = dict(Bundle.open(folder, verify=False).manifest)
    manifest["quantisation"] = dict(manifest["quantisation"])
    del manifest["quantisation"]["pair_bound"]
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest)


def test_a_bundle_from_before_warns_where_sums_saturate(
    before: Path, tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(arithmetic, "int8_arithmetic", lambda: "saturating")
    runtime = OrtRuntime(Bundle.open(before))
    assert isinstance(runtime, Warns)
    (notice,) = runtime.warnings
    assert notice.code == "int8_saturates"
    assert "Export it again" in notice.message
    assert notice.message in caplog.text
    assert OrtRuntime(Bundle.open(tiny_bundle("int8"))).warnings == ()
    assert OrtRuntime(Bundle.open(tiny_bundle("fp32"))).warnings == ()


def test_nothing_is_read_or_said_where_sums_are_exact(
    before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "int8_arithmetic", lambda: "exact")
    monkeypatch.setattr(arithmetic, "int8_products", lambda graph: pytest.fail("was read"))
    assert OrtRuntime(Bundle.open(before)).warnings == ()


def test_a_processor_without_avx2_is_called_exact_but_slow() -> None:
    nehalem = cpu_features("flags\t\t: fpu sse2 ssse3 sse4_1 sse4_2 popcnt")
    assert "no AVX2: answers are exact, but slow" in str(arithmetic.slow_processor(nehalem))
    others = ("flags\t: sse2 avx2", "Features\t: fp asimd", "Hardware\t: a Mac tells nothing")
    assert [arithmetic.slow_processor(cpu_features(text)) for text in others] == [None] * 3


def test_weights_decide_where_the_manifest_does_not_say(before: Path, tiny_bundle: Make) -> None:
    assert not arithmetic.keeps_pair_bound(Bundle.open(before))
    silent = before.with_name("silent")
    shutil.copytree(tiny_bundle("int8"), silent)
    say_no_bound(silent)
    assert arithmetic.keeps_pair_bound(Bundle.open(silent))


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (7, 5), (8, 1_500_000)])
def test_pairs_are_found_wherever_they_are(shape: tuple[int, int]) -> None:
    """Also in what is looked at in several pieces."""
    rows = shape[0]
    for row in range(0, rows - 1, 2):
        weight = np.zeros(shape, np.int8)
        weight[row : row + 2, -1] = -64
        assert arithmetic.pairs_within(weight)
        weight[row, -1] = -65
        assert not arithmetic.pairs_within(weight)
    weight = np.zeros(shape, np.int8)
    weight[1:3] = 127 if rows > 2 else 0  # neighbours, but of two pairs
    assert arithmetic.pairs_within(weight)
