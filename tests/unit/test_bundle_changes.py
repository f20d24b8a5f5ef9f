"""The change record of two bundles: what differs, part by part, and nothing that is the same."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run

from medmoe_edge.bundle.bundle import MANIFEST, Bundle, status_of, write_manifest
from medmoe_edge.bundle.recorded import read_recorded, recorded_file, write_recorded
from medmoe_edge.embedded import bundle_path, checkpoint_path
from medmoe_edge.errors import BundleError, InputError
from medmoe_edge.evaluation.inspection import Change, compare_bundles

NANO = bundle_path("nano")


def remade(bundle: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose manifest was changed, and whole again."""
    shutil.copytree(bundle, out)
    return rewrite(out, change)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).unlink()
    change(manifest)
    made = {name for name in ("files", "seal", "format_version") if name in manifest}
    write_manifest(folder, {key: value for key, value in manifest.items() if key not in made})
    return folder


def test_a_bundle_is_like_itself() -> None:
    found = compare_bundles(NANO, NANO)
    parts = (found.precision, found.gates, found.thresholds, found.verification, found.other)
    assert not any(parts)
    assert found.weights is not None
    for compared in (found.weights, found.files):
        assert compared["same"] > 0
        assert [*compared["changed"], *compared["added"], *compared["removed"]] == []
    assert (found.asked, found.answers) == (64, ())
    assert found.before == found.after
    assert found.before["verification"] == status_of(Bundle.open(NANO).manifest["verification"])


def test_each_change_stands_in_its_part(tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["gates"]["routing_flips"] = 0.5
        manifest["refusals"]["not_a_scan"] = 0.25
        manifest["licence"] = "another"
        gates = manifest["verification"]["gates"]
        next(each for each in gates if each["name"] == "answer_agreement")["measured"] = 0.125
        gates.reverse()  # an order says nothing

    other = remade(NANO, tmp_path / "other", change)
    before = Bundle.open(NANO).manifest
    measured = next(
        gate["measured"]
        for gate in before["verification"]["gates"]
        if gate["name"] == "answer_agreement"
    )
    found = compare_bundles(NANO, other)
    assert found.gates == (Change("gates.routing_flips", before["gates"]["routing_flips"], 0.5),)
    was = before["refusals"]["not_a_scan"]
    assert found.thresholds == (Change("refusals.not_a_scan", was, 0.25),)
    place = "verification.gates.answer_agreement.measured"
    assert found.verification == (Change(place, measured, 0.125),)
    assert found.other == (Change("licence", before["licence"], "another"),)
    assert found.precision == ()


def test_another_precision_is_another_weight(tiny_bundle: Callable[..., Path]) -> None:
    found = compare_bundles(tiny_bundle(), tiny_bundle("int8"))
    names = [change.name for change in found.precision]
    assert Change("quantisation.precision", "fp32", "int8") in found.precision
    assert any(name.startswith("quantisation.matrices") for name in names)
    assert found.weights is not None
    assert found.weights["same"] > 0  # such as norms
    assert found.weights["removed"]
    assert "decoder.data" in found.files["changed"]
    assert found.before["checkpoint_sha256"] == found.after["checkpoint_sha256"]


def test_changed_weights_are_named(tmp_path: Path) -> None:
    bundle = shutil.copytree(NANO, tmp_path / "bundle")
    data = np.fromfile(bundle / "decoder.data", np.uint8)
    data[-1] ^= 1
    data.tofile(bundle / "decoder.data")
    with pytest.raises(BundleError, match="changed"):
        compare_bundles(NANO, bundle)  # it is not what its manifest says
    rewrite(bundle, lambda _: None)
    found = compare_bundles(NANO, bundle)
    assert found.weights is not None
    assert len(found.weights["changed"]) == 1
    assert found.weights["changed"][0].startswith("decoder: ")


def test_answers_of_the_checkpoints_are_compared(tmp_path: Path) -> None:
    bundle = shutil.copytree(NANO, tmp_path / "bundle")
    recorded = read_recorded(Bundle.open(bundle))
    answers: Mapping[str, Any] = recorded.arrays
    first = int(recorded.about["questions"][0]["tokens"])
    tokens = answers["answers"].copy()
    tokens[:first] = (tokens[:first] + 7) % 100 + 5
    (bundle / str(recorded_file(Bundle.open(bundle)))).unlink()
    changed = type(recorded)(recorded.signature, recorded.about, {**answers, "answers": tokens})
    write_recorded(bundle, changed)
    rewrite(bundle, lambda _: None)
    found = compare_bundles(NANO, bundle)
    assert found.asked == 64
    (change,) = found.answers
    assert change.name == recorded.about["questions"][0]["question"]
    assert change.before != change.after


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="different families"):
        compare_bundles(NANO, bundle_path("modality-nano"))
    with pytest.raises(InputError, match="is not a bundle"):
        compare_bundles(NANO, checkpoint_path("nano"))


def test_the_command(tmp_path: Path, run: Run) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        del manifest["verification"]
        manifest["quantisation"]["precision"] = "int4"

    other = str(remade(NANO, tmp_path / "other", forget))
    told = json.loads(run("inspect", "nano", other, "--json").stdout)
    assert told["after"]["verification"] == "not measured"
    assert [(each["name"], each["after"]) for each in told["verification"]] == [
        ("verification", None)
    ]
    shown = run("inspect", "nano", other)
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    assert "quantisation.precision int8 int4" in text
    assert "Thresholds: no change." in text
    same = run("inspect", "nano", "nano")
    assert "0 changed, 0 added, 0 removed" in " ".join(same.stdout.split())
