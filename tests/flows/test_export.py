"""From a checkpoint to a bundle: the same bytes each time, with all that belongs to it, or none."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import changed, observed, structure
from torch import Tensor

from medmoe_edge._version import __version__
from medmoe_edge.bundle.bundle import MANIFEST, NOTICE, Bundle
from medmoe_edge.bundle.recorded import stored_matrices
from medmoe_edge.calibration.quantisers import Format, round_to_nearest
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import (
    CheckpointError,
    DataError,
    InputError,
    ModelError,
)
from medmoe_edge.export import build, weights
from medmoe_edge.export.build import BuildOptions, export_bundle
from medmoe_edge.export.quantise import unpack_rows

Make = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_checkpoint_gives_the_same_bytes(tiny_checkpoint: Make, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint(), moved)
    steps: list[tuple[str, int, int]] = []
    first = export_bundle(tiny_checkpoint(), tmp_path / "first", BuildOptions(name="tiny"))
    out = export_bundle(
        moved, tmp_path / "out", BuildOptions(name="tiny"), progress=lambda *a: steps.append(a)
    )
    assert contents(out) == contents(first)
    assert list(dict.fromkeys(step for step, _, _ in steps)) == [*build.STEPS, "done"]
    written = [(done, total) for step, done, total in steps if step == "decoder"]
    assert written == sorted(written)
    assert written[-1][0] == written[-1][1] > 100_000  # bytes
    for name, content in contents(out).items():  # nothing tells where it was made
        for place in (str(tmp_path), str(Path(build.__file__).parents[1]), "site-packages"):
            assert place.encode() not in content, (name, place)


STRUCTURES = {  # of the tiny decoder: changes with what is exported, never with weights
    "fp32": "a1234f17f732a2f5",
    "int8": "b50c4d0d9db1cf00",
    "int4": "0448bdf5c4e6814f",
}


@pytest.mark.parametrize("precision", STRUCTURES)
def test_bundles_stay_as_they_were(tiny_checkpoint: Make, tmp_path: Path, precision: Any) -> None:
    """What is exported without new options is what was exported before.

    Held by structure and by weights: whole files hash otherwise where ONNX's or PyTorch's version
    differs, and what is added up on another processor may differ in its last digit. Where a change
    of structure is meant, the digest is to be renewed.
    """
    options = BuildOptions(precision=precision, name="tiny")
    out = export_bundle(tiny_checkpoint(), tmp_path / "out", options)
    lines = "\n".join(structure(out / "decoder.onnx"))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == STRUCTURES[precision], lines
    source = read_checkpoint(tiny_checkpoint())
    bundle, compared = Bundle.open(out), 0
    for name, (array, scale) in stored_matrices(bundle):
        rows = source.tensor(name).float().numpy()
        compared += 1
        if scale is None:
            np.testing.assert_array_equal(array.T, rows)
            continue
        group = None if array.dtype == np.int8 else 32
        expected = round_to_nearest(rows, Format(8 if group is None else 4, group))
        integers = array.T if group is None else unpack_rows(array.reshape(len(rows), -1), 4)
        np.testing.assert_array_equal(integers, expected.integers)
        np.testing.assert_array_equal(scale.reshape(expected.scale.shape), expected.scale)
    assert compared > 20


def test_the_manifest_vouches_for_all(tiny_checkpoint: Make, tiny_bundle: Make) -> None:
    folder = tiny_bundle("int8")
    checkpoint = read_checkpoint(tiny_checkpoint())
    manifest = Bundle.open(folder).manifest
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert {re.split(r"[.-]", name)[0] for name in manifest["files"]} == {
        *("decoder", "vision", "embedding", "tokenizer", "segment", "expert", "recorded")
    }
    assert manifest["config"] == checkpoint.config.to_json()
    assert manifest["source"] == {
        "checkpoint_sha256": checkpoint.sha256(),
        "exporter": f"medmoe-edge {__version__}",
    }
    assert manifest["quantisation"]["precision"] == "int8"
    assert manifest["intended_use"] == NOTICE
    assert manifest["licence"] == "not stated by the checkpoint"
    owners = [
        f"decoder.layers.{layer}.ffn.{owner}"
        for layer in (0, 2)
        for owner in ("experts.0", "experts.1", "experts.2", "experts.3", "meta")
    ]
    assert list(manifest["experts"]) == owners
    assert {length for _, length in manifest["experts"].values()} == {3 * 64 * 64}  # one byte each
    assert not json.loads((tiny_bundle("fp32", dense=True) / MANIFEST).read_text())["experts"]


def test_the_model_card_goes_with_the_bundle(tiny_checkpoint: Make, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint")
    card = b"---\nlicense: cc-by-4.0\n---\n# Tiny \xff\n"  # not quite UTF-8
    (tmp_path / "checkpoint" / "README.md").write_bytes(card)
    bundle = Bundle.open(export_bundle(tmp_path / "checkpoint", tmp_path / "out"))
    assert bundle.path("README.md").read_bytes() == card
    assert bundle.manifest["licence"] == "cc-by-4.0"
    assert bundle.name == "checkpoint"


# --- what cannot be exported ------------------------------------------------------------------


FAULTS = {
    "no tokenizer": "no tokenizer.json",
    "damaged tokenizer": "tokenizer.json cannot be read",
    "large tokenizer": "300 tokens, the model 256",
    "heads": "Heads of 16 channels, 8 of them rotating",
    "no folder": "not a folder",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_exported_is_told_and_leaves_nothing(
    tiny_checkpoint: Make, tmp_path: Path, fault: str
) -> None:
    source = tmp_path / "source"
    if fault in ("no tokenizer", "damaged tokenizer"):
        shutil.copytree(tiny_checkpoint(), source)
        (source / "tokenizer.json").unlink()
        if fault == "damaged tokenizer":
            (source / "tokenizer.json").write_text("{}")
    elif fault == "large tokenizer":
        ends = ("embed.weight", "head.weight")
        changed(
            tiny_checkpoint(),
            source,
            lambda name, tensor: tensor[:256].clone() if name.endswith(ends) else tensor,
            vocab_size=256,
        )
    elif fault == "heads":
        changed(tiny_checkpoint(), source, lambda _, tensor: tensor, heads=4)
    refused(source, tmp_path / "out", FAULTS[fault])


UP, DOWN = (f"decoder.layers.0.ffn.experts.2.{name}.weight" for name in ("up", "down"))
WEIGHTS = [
    (UP, torch.nan, "int8", rf"{UP} holds values that are NaN or infinite"),
    (UP, torch.inf, "int4", rf"{UP} holds values that are NaN or infinite"),
    (DOWN, 1e8, "int4", rf"{DOWN}: A 64x64 matrix holds a weight of .*, beyond what fp16"),
    # these are small, and written into the graph
    ("decoder.layers.2.ffn.router.bias", torch.nan, "int8", r"router\.bias holds values that"),
    ("decoder.norm.weight", -torch.inf, "fp32", r"decoder\.norm\.weight holds values that"),
    ("decoder.embed.weight", torch.nan, "fp32", r"decoder\.embed\.weight holds values that"),
    ("decoder.embed.weight", 1e6, "int8", r"decoder\.embed\.weight holds values that fp16 cannot"),
]


@pytest.mark.parametrize(("name", "value", "precision", "message"), WEIGHTS)
def test_a_weight_that_cannot_be_stored_is_named_and_leaves_nothing(
    tiny_checkpoint: Make, tmp_path: Path, name: str, value: float, precision: Any, message: str
) -> None:
    def spoil(other: str, tensor: Tensor) -> Tensor:
        if other == name:
            tensor = tensor.clone()
            tensor.view(-1)[-1] = value
        return tensor

    source = changed(tiny_checkpoint(), tmp_path / "source", spoil)
    refused(source, tmp_path / "out", message, precision=precision)


def refused(source: Path, out: Path, message: str, **options: Any) -> None:
    before = set(out.parent.iterdir())
    with pytest.raises(ModelError, match=message) as caught:
        export_bundle(source, out, BuildOptions(**options))
    assert "\n" not in str(caught.value)
    assert set(out.parent.iterdir()) == before


def test_statistics_of_another_checkpoint_are_refused(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    statistics = observed(read_checkpoint(tiny_checkpoint("tiny-phi")))
    with pytest.raises(DataError, match="made for another checkpoint"):
        export_bundle(tiny_checkpoint(), tmp_path / "out", statistics=statistics)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CheckpointError])
def test_an_export_that_is_broken_off_leaves_nothing(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(*_: object) -> None:
        (partial,) = tmp_path.iterdir()
        assert (partial / "decoder.data").exists()
        raise error("half", "way")

    monkeypatch.setattr(build, "write_manifest", broken)
    with pytest.raises(error):
        export_bundle(tiny_checkpoint(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", build.STEPS)
def test_an_export_that_is_interrupted_leaves_nothing(
    tiny_checkpoint: Make, tmp_path: Path, step: str
) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        assert list(tmp_path.iterdir())  # something to leave
        if name == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint(), tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_embedding_is_the_file_that_numpy_writes(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    table = read_checkpoint(tiny_checkpoint()).tensor("decoder.embed.weight").float().numpy()
    np.save(tmp_path / "whole.npy", table if precision == "fp32" else table.astype(np.float16))
    monkeypatch.setattr(weights, "CHUNK_BYTES", 7 * 4 * 64)  # blocks of 7 rows
    out = export_bundle(tiny_checkpoint(), tmp_path / "out", BuildOptions(precision=precision))
    assert (out / "embedding.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_blocks_of_rows_leave_no_trace_in_the_bundle(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_bundle(
        tiny_checkpoint(), tmp_path / "whole", BuildOptions(precision="int4", name="tiny")
    )
    monkeypatch.setattr(weights, "CHUNK_BYTES", 27 * 4 * 64)  # blocks of 27 rows
    parts = export_bundle(
        tiny_checkpoint(), tmp_path / "parts", BuildOptions(precision="int4", name="tiny")
    )
    for name in ("decoder.onnx", "decoder.data", "embedding.npy"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_an_existing_output_is_replaced_only_if_it_is_a_bundle(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    out = export_bundle(tiny_checkpoint(), tmp_path / "out", BuildOptions(precision="fp32"))
    (out / "old").write_text("old")
    with pytest.raises(InputError, match="exists already"):
        export_bundle(tiny_checkpoint(), out)
    assert (out / "old").exists()
    export_bundle(tiny_checkpoint(), out, BuildOptions(precision="int8"), force=True)
    assert not (out / "old").exists()
    assert Bundle.open(out).manifest["quantisation"]["precision"] == "int8"
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        export_bundle(tiny_checkpoint(), tiny_checkpoint(), force=True)
    assert read_checkpoint(tiny_checkpoint()).tokenizer_file
