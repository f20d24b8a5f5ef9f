"""From a checkpoint to a bundle: the same bytes each time, with all that belongs to it, or none."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medmoe_edge import __version__
from medmoe_edge.bundle import MANIFEST, NOTICE, Bundle
from medmoe_edge.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from medmoe_edge.errors import CheckpointError, InputError, ModelError
from medmoe_edge.export import build
from medmoe_edge.export.build import export_bundle

Make = Callable[..., Path]


@pytest.fixture
def without_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after the tower, which takes a second to trace."""

    def write(source: Checkpoint, folder: Path, precision: str) -> None:
        (folder / "vision.onnx").write_bytes(b"")

    monkeypatch.setattr(build, "_write_vision", write)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_checkpoint_gives_the_same_bytes(tiny_checkpoint: Make, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint(), moved)
    steps: list[tuple[str, int, int]] = []
    first = export_bundle(tiny_checkpoint(), tmp_path / "first", name="tiny")
    out = export_bundle(moved, tmp_path / "out", name="tiny", progress=lambda *a: steps.append(a))
    assert contents(out) == contents(first)
    assert steps == [(step, index, 4) for index, step in enumerate([*build.STEPS, "done"])]
    for name, content in contents(out).items():  # nothing tells where it was made
        for place in (str(tmp_path), str(Path(build.__file__).parents[1]), "site-packages"):
            assert place.encode() not in content, (name, place)


def test_the_manifest_vouches_for_all(tiny_checkpoint: Make, tiny_bundle: Make) -> None:
    folder = tiny_bundle("int8")
    checkpoint = read_checkpoint(tiny_checkpoint())
    manifest = Bundle.open(folder).manifest
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert {name.partition(".")[0] for name in manifest["files"]} == {
        *("decoder", "vision", "embedding", "tokenizer")
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


def changed(
    tiny_checkpoint: Make, folder: Path, tensors: dict[str, Any] | None = None, **decoder: Any
) -> Path:
    """A copy of the tiny checkpoint with some tensors or decoder settings replaced."""
    source = read_checkpoint(tiny_checkpoint())
    config = source.config
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))
    pairs = ((name, (tensors or {}).get(name, tensor)) for name, tensor in source)
    write_checkpoint(folder, config, pairs, tokenizer_file=source.tokenizer_file)
    return folder


FAULTS = {
    "no tokenizer": "no tokenizer.json",
    "damaged tokenizer": "tokenizer.json cannot be read",
    "large tokenizer": "300 tokens, the model 256",
    "heads": "Heads of 16 channels, 8 of them rotating",
    "nan": r"experts\.2\.up\.weight holds values that are infinite or no numbers",
    "no folder": "not a folder",
}


@pytest.mark.usefixtures("without_tower")
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
        rows = {f"decoder.{name}.weight": torch.zeros(256, 64) for name in ("embed", "head")}
        changed(tiny_checkpoint, source, rows, vocab_size=256)
    elif fault == "heads":
        changed(tiny_checkpoint, source, heads=4)
    elif fault == "nan":
        name = "decoder.layers.0.ffn.experts.2.up.weight"
        changed(tiny_checkpoint, source, {name: torch.full((64, 64), torch.nan)})
    before = set(tmp_path.iterdir())
    with pytest.raises(ModelError, match=FAULTS[fault]) as caught:
        export_bundle(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_an_infinite_weight_of_the_tower_is_told(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    changed(tiny_checkpoint, source, {"vision.class_embedding": torch.full((16,), torch.inf)})
    with pytest.raises(CheckpointError, match=r"vision\.class_embedding holds values"):
        export_bundle(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.usefixtures("without_tower")
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


@pytest.mark.usefixtures("without_tower")
def test_an_existing_output_is_replaced_only_if_it_is_a_bundle(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    out = export_bundle(tiny_checkpoint(), tmp_path / "out", precision="fp32")
    (out / "old").write_text("old")
    with pytest.raises(InputError, match="exists already"):
        export_bundle(tiny_checkpoint(), out)
    assert (out / "old").exists()
    export_bundle(tiny_checkpoint(), out, precision="int8", force=True)
    assert not (out / "old").exists()
    assert Bundle.open(out).manifest["quantisation"]["precision"] == "int8"
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        export_bundle(tiny_checkpoint(), tiny_checkpoint(), force=True)
    assert read_checkpoint(tiny_checkpoint()).tokenizer_file
