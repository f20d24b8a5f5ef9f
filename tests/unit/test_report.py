"""The report: one page, whole by itself, that says what was measured and escapes what it quotes."""

import dataclasses
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from medmoe_edge.bundle.bundle import DEFAULT_GATES, NOTICE, Bundle
from medmoe_edge.calibration.coverage import ExpertCoverage
from medmoe_edge.config import Bin, Confidence, Curve, Reliability, Unsure
from medmoe_edge.errors import ResourceError
from medmoe_edge.evaluation.gates import outcome_of
from medmoe_edge.evaluation.metrics import (
    Accuracy,
    Answers,
    Divergence,
    Fidelity,
    Routing,
    Share,
    Vision,
)
from medmoe_edge.evaluation.record import PASSED, AnswersRecord, Source
from medmoe_edge.evaluation.report import coverage_plot, errors_plot, render_report, write_report
from medmoe_edge.evaluation.verify import Verification, judge
from medmoe_edge.presets import PRESETS

HOSTILE = "<script>alert('$x$')</script>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The text of a page, its headings, its images of each kind, and whatever it would load."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(
                ("#", "data:")
            ):
                self.loaded.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.text.append(data)
            if self._open[-1] == "h2":
                self.headings.append(data)


def fidelity(**changes: Any) -> Fidelity:
    share = Share.of(298, 300)
    accuracy = Accuracy(300, 0.8, 0.79, -0.01, (-0.02, 0.001))
    answers = Answers(300, share, share, Divergence(0.0009, 0.02, 0.1), accuracy)
    flips = Share.of(8, 9000)
    values: dict[str, Any] = {
        "questions": 300,
        "images": 20,
        "overall": answers,
        "by_modality": {"ct": answers, "mri": dataclasses.replace(answers, accuracy=None)},
        "by_answer_type": {"CLOSED": answers},
        "routing": Routing(flips, {0: flips, 2: flips}, {"ct": flips}, {0: 0.03, 2: 0.02}),
        "vision": Vision(0.998, (0.997, 0.999), 0.99, 0.02),
        "finite": True,
    }
    return Fidelity(**values | changes)


def verification(
    figures: Fidelity | None = None, manifest: dict[str, Any] | None = None, **changes: Any
) -> Verification:
    results = judge(figures, DEFAULT_GATES["int8"]) if figures else []
    record = figures and AnswersRecord(
        passed=PASSED[outcome_of(results)],
        when="2026-01-01T00:00:00+00:00",
        checkpoint_sha256="c" * 64,
        data=Source("vqa_val.jsonl", "d" * 64),
        runtime="onnxruntime",
        gates=tuple(results),
        faults=(),
        figures=figures,
    )
    whole = {"name": "tiny", "quantisation": {"precision": "int8"}, "licence": "none"}
    bundle = Bundle(Path(), whole | (manifest or {}), PRESETS["nano"], "b" * 64)
    values: dict[str, Any] = {"faults": [], "record": record, **changes}
    return Verification(bundle, **values)


MATRICES = [
    {"name": f"decoder.layers.{layer}.{name}.weight", "bits": 4, "group": 32, "error": 0.07}
    for layer in (0, 1)
    for name in ("attention.q", "ffn.experts.1.up", "ffn.meta.up", "ffn.down")
]
PROFILE = {
    "modalities": ["ct", "mri"],
    "layers": [0, 2, 4],
    "experts": 4,
    "tokens": [[[1, 20], [300, 4000], [50_000, 0], [7, 8]]] * 3,
}


COVERAGE = [
    ExpertCoverage(0, 0, 5000, 512, 900),
    ExpertCoverage(2, 1, 14, 512, 0, status="data-free"),
]


def test_a_full_page() -> None:
    manifest = {
        "quantisation": {"precision": "int4", "matrices": MATRICES},
        "calibration": {"routing": PROFILE, "coverage": [record.to_json() for record in COVERAGE]},
    }
    source = render_report(verification(fidelity(), manifest, beside={"nf4": fidelity()}))
    page, text = Page(source), " ".join(Page(source).text)
    assert page.headings == [
        *("Gates", "Answers", "Routing", "Beside other candidates", "Weights"),
        *("What calibration saw", "Provenance"),
    ]
    assert page.tags.count("svg") == 4
    assert page.loaded == []
    for shown in (NOTICE, "Not decided", "99.33%", "at least 99.00%", "not decided", "50k", "nf4"):
        assert shown in text, shown
    assert "Gates that so few cannot decide: 2" in text
    assert "300 questions about 20 images of vqa_val.jsonl" in text
    assert "data-free" in text
    assert text.count("Expert that was short") == text.count("Accuracy is exact match.") == 1
    assert "Every expert was reached" not in text
    covered = {**manifest, "calibration": {"routing": PROFILE, "coverage": []}}
    assert "Every expert was reached" in render_report(verification(fidelity(), covered))
    assert render_report(verification(fidelity(), manifest, beside={"nf4": fidelity()})) == source


def test_what_the_bundle_knows_of_its_confidence() -> None:
    """The figures are those of the manifest, and drawn."""
    bins = (Bin(40, 0.25, 0.5), Bin(60, 0.85, 0.9))
    before = Reliability(100, 0.74, 0.13, bins, ((0.5, 0.1), (1.0, 0.26)))
    after = dataclasses.replace(before, ece=0.0213)
    curve = Curve("isotonic", 500, ((0.1, 0.2), (0.9, 0.8)))
    fitted = Confidence(
        closed=curve,
        open=curve,
        threshold=0.61,
        selective_accuracy=0.9,
        images=20,
        data="<val>.jsonl",
        data_sha256="e" * 64,
        before=before,
        after=after,
        unsure=Unsure(0.2, 0.55, 0.91),
    )
    source = render_report(verification(fidelity(), {"confidence": fitted.to_json()}))
    page, text = Page(source), " ".join(Page(source).text)
    assert page.headings == ["Gates", "Answers", "Routing", "Confidence", "Provenance"]
    assert page.tags.count("svg") == 3
    for shown in ("13.00%", "2.13%", "90.00%", "61.00%", "55.00%", "<val>.jsonl"):
        assert shown in text, shown
    told = verification(fidelity(), {"confidence": fitted.to_json()}).to_json()
    assert told["confidence"] == fitted.to_json()


def test_absent_data_is_left_out() -> None:
    page = Page(render_report(verification(fidelity(routing=None))))
    assert page.headings == ["Gates", "Answers", "Provenance"]
    assert page.tags.count("svg") == 1
    answers = dataclasses.replace(fidelity().overall, accuracy=None)
    silent = fidelity(
        overall=answers, by_modality={"ct": answers}, by_answer_type={"OPEN": answers}
    )
    text = " ".join(Page(render_report(verification(silent, beside={"nf4": silent}))).text)
    assert "no answers to be right about" in text
    assert "Difference" not in text


def test_a_bundle_that_was_never_measured() -> None:
    page = Page(render_report(verification()))
    assert page.headings == ["Provenance"]
    assert "Not measured" in page.text
    assert NOTICE in page.text


def test_a_failure_is_the_headline() -> None:
    broken = fidelity(vision=Vision(0.9, (0.89, 0.91), 0.8, 0.3))
    text = " ".join(Page(render_report(verification(broken))).text)
    assert "Failed: do not use it" in text
    assert "cosine of image tokens 0.9000, should be at least 0.9900" in text
    faulty = verification(faults=["decoder.layers.2.ffn.experts.1 (ct)"])
    page = Page(render_report(faulty))
    assert "Failed: do not use it" in page.text
    assert page.headings[0] == "Weights or outputs that are not sound"
    assert "decoder.layers.2.ffn.experts.1 (ct)" in page.text


def test_names_are_escaped_everywhere() -> None:
    answers = fidelity().overall
    figures = fidelity(by_modality={HOSTILE: answers})
    manifest = {
        "name": HOSTILE,
        "licence": HOSTILE,
        "quantisation": {"precision": HOSTILE, "matrices": [*MATRICES, {"name": HOSTILE}]},
        "calibration": {"routing": {**PROFILE, "modalities": [HOSTILE, "mri"]}},
    }
    source = render_report(
        verification(figures, manifest, faults=[HOSTILE], beside={HOSTILE: fidelity()})
    )
    page = Page(source)
    assert "script" not in page.tags
    assert sum(HOSTILE in text for text in page.text) >= 8


def test_plots_of_odd_data() -> None:
    assert errors_plot([]) == errors_plot([{"name": "vision.conv", "error": 1}]) == ""
    many = {**PROFILE, "layers": list(range(0, 24, 2)), "tokens": [PROFILE["tokens"][0]] * 12}  # type: ignore[index]
    assert coverage_plot(many, list("abcd")).count("layer ") == 12
    assert "layer 0" in coverage_plot({**PROFILE, "layers": [0], "tokens": [[[0, 0]]]}, ["a"])


def test_the_page_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(verification(), path)
    assert path.read_text("utf-8") == render_report(verification())
    with pytest.raises(ResourceError, match="cannot be written"):
        write_report(verification(), tmp_path / "absent" / "report.html")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_text("utf-8")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_report(verification(fidelity()), path)
    assert path.read_text("utf-8") == before
    assert list(tmp_path.iterdir()) == [path]
