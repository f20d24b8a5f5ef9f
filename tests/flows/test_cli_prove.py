"""The verbs that prove: what they pass on, what they print, and what they refuse."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, start_without, two_lines

from medmoe_edge.bundle.bundle import MANIFEST, NOTICE, Bundle, write_verification
from medmoe_edge.embedded import bundle_path, checkpoint_path
from medmoe_edge.errors import ResourceError
from medmoe_edge.evaluation.verify import Verification
from medmoe_edge.families import FAMILIES, MedMoEFamily
from medmoe_edge.pipeline import VerifyOptions

Make = Callable[..., Path]


@pytest.fixture
def questions(tmp_path: Path, scan: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    records = [
        {
            **{"id": f"q{number}", "image": "scan.png", "question": "Is it?", "answer": answer},
            **{"answer_type": "CLOSED", "modality": "xray", "source": "slake"},
        }
        for number, answer in enumerate(["no", "yes"])
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


# --- eval -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("questions")
def test_eval(run: Run, loaded: list[tuple[str, str]], tmp_path: Path) -> None:
    label = {"image": "scan.png", "body": "chest", "finding": "none", "source": "s"}
    splits = [("xray", "train"), ("ct", "val"), ("xray", "test"), ("xray", "val")]
    lines = [json.dumps({**label, "modality": name, "split": split}) for name, split in splits]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    command = ["eval", "my", "--data", "questions.jsonl", "--runtime", "torch"]
    result = run(*command, "--labels", "labels.jsonl", "--predictions", "out.jsonl", "--json")
    figures = json.loads(result.stdout)
    assert figures["overall"]["exact_match"] == 0.5
    assert figures["image_tokens"] == 64
    assert figures["labels"]["images"] == 3  # the training image is left out
    assert figures["labels"]["accuracy"] == pytest.approx(2 / 3)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert loaded == [("my", "torch")]
    shown = run(*command)
    assert re.search(r"^ *all +2 +50.0% ", shown.stdout, re.MULTILINE)
    assert "Modality found in these images: 100.0% of 1" in shown.stdout
    assert "Of an image 64 tokens were read." in shown.stdout
    assert json.loads(run(*command, "--json").stdout)["labels"] is None


@pytest.mark.usefixtures("loaded")
def test_labels_alone_can_be_scored(run: Run, scan: Path, tmp_path: Path) -> None:
    label = {"image": scan.name, "body": "chest", "finding": "none", "source": "s", "split": "val"}
    lines = [json.dumps({**label, "modality": name}) for name in ("xray", "ct")]
    (tmp_path / "DATA").mkdir()
    shutil.copy(scan, tmp_path / "DATA")
    (tmp_path / "DATA/labels.jsonl").write_text("\n".join(lines))
    command = ["eval", "my", "--labels", "DATA/labels.jsonl"]
    told = run(*command, "--json")
    assert told.exit_code == 0, told.stdout
    figures = json.loads(told.stdout)
    assert (figures["labels"]["accuracy"], figures["labels"]["images"]) == (0.5, 2)
    assert "overall" not in figures
    assert "Modality found in the labelled images: 50.0% of 2" in run(*command).stdout
    refused = run("eval", "my", "--data", "DATA")
    assert refused.exit_code == 2
    assert "--labels DATA/labels.jsonl alone" in two_lines(refused)[1]


@pytest.mark.usefixtures("questions")
def test_eval_refuses_before_it_works(
    run: Run, loaded: list[tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    absent = {"image": "absent.png", "modality": "ct", "question": "Is it?", "answer": "No"}
    (tmp_path / "absent.jsonl").write_text(json.dumps(absent | {"split": "val"}))
    command = ["eval", "--data", "questions.jsonl", "--predictions"]
    for line in (
        [*command, "out.jsonl"],
        [*command, "none/out.jsonl"],
        [*command, "questions.jsonl", "--force"],
        ["eval", "--data", "x"],
        ["eval", "--data", "absent.jsonl"],
        ["eval", "--labels", "absent.jsonl"],
        ["eval", "--findings", "absent.jsonl"],
    ):
        result = run(*line)
        assert result.exit_code == 2
        two_lines(result)
    assert loaded == []
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert run(*command, "out.jsonl", "--force").exit_code == 0
    assert (tmp_path / "out.jsonl").read_text() != "mine"


@pytest.mark.usefixtures("questions")
def test_eval_asks_a_black_picture_and_a_sample(
    run: Run, loaded: list[tuple[str, str]], tmp_path: Path
) -> None:
    found = run(
        *("eval", "--data", "questions.jsonl", "--blind", "--limit", "1", "--seed", "3"),
        *("--max-new-tokens", "2048", "--json"),
    )
    figures = json.loads(found.stdout)
    assert (figures["of"], figures["overall"]["n"], figures["blind"]["overall"]["n"]) == (2, 1, 1)
    assert figures["official_open_recall"] is None
    assert run("eval", "--data", "questions.jsonl", "--max-new-tokens", "2049").exit_code == 2


@pytest.mark.usefixtures("questions")
def test_eval_scores_answers_in_a_file(run: Run, tmp_path: Path) -> None:
    lines = [{"question_id": f"q{number}", "text": "No."} for number in range(2)]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["eval", "--predictions", "answers.jsonl", "--references", "questions.jsonl"]
    assert json.loads(run(*command, "--json").stdout)["official_closed_accuracy"] == 0.5
    shown = run(*command).stdout
    assert re.search(r"closed accuracy +50.00% +50.00%", shown)
    for more, what in (
        ([*command, "--blind"], "with no model"),
        ([*command, "--max-new-tokens", "64"], "with no model"),
        ([*command, "--allow-repetition"], "with no model"),
        (command[:1] + command[3:], "no answers to score"),
        (["eval"], "Neither --data nor"),
    ):
        assert what in " ".join(two_lines(run(*more)))


# --- verify -----------------------------------------------------------------------------------


@pytest.fixture
def bundle(proven_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a proof, to be damaged."""
    return Path(shutil.copytree(proven_bundle, tmp_path / "bundle"))


def test_verify_against_a_checkpoint(
    run: Run, bundle: Path, tiny_checkpoint: Make, tiny_bundle: Make, questions: Path
) -> None:
    beside = ["--beside", str(tiny_bundle("int8")), "--report", "page.html"]
    command = ["verify", "bundle", "--against", str(tiny_checkpoint()), "--data", "questions.jsonl"]
    result = run(*command, *beside)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == "tiny against its checkpoint"
    agreement = r" Answer agreement +100.00% +\S+ to 100.00% +at least 99.90% +not decided"
    assert any(re.fullmatch(agreement, line) for line in lines)
    assert "  2 questions are too few to prove 99.9%: that takes 2,703" in lines
    assert any(re.fullmatch(r" xray +2 +100.00% +\+0.00 points .*", line) for line in lines)
    shown = lines[lines.index("Beside other candidates") + 2 :]
    assert shown[0].startswith(" tiny (this bundle) ")
    assert shown[1].startswith(f" {tiny_bundle('int8').name} ")
    assert lines[-2].startswith("Not decided: 2 questions about 1 images of questions.jsonl, 20")
    assert lines[-1] == "Wrote the report page.html"
    page = Path("page.html").read_text()
    assert "scan.png" not in page + (bundle / MANIFEST).read_text()
    refused = run(*command, "--report", "page.html")
    assert (refused.exit_code, two_lines(refused)[0]) == (2, "page.html exists already.")
    assert Path("page.html").read_text() == page
    told = json.loads(run(*command, "--json").stdout)
    assert (told["passed"], told["outcome"]) == (None, "not decided")
    assert (told["faults"], told["beside"]) == ([], {})
    assert told["verification"]["figures"]["questions"] == 2


def test_verify_alone_needs_the_base_install_only(tiny_bundle: Make) -> None:
    absent = ["torch", "onnx", "onnx_ir", "safetensors", "jinja2", "matplotlib", "transformers"]
    checked = start_without(absent, "verify", str(tiny_bundle()))
    assert (checked.returncode, checked.stderr) == (0, "")
    first, second = checked.stdout.splitlines()
    assert first == "Its files are whole, its weights and experts sound."
    assert "was not measured" in second


def test_a_recorded_proof_is_shown_again(run: Run, bundle: Path) -> None:
    result = run("verify", "bundle")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("Not decided: 2 questions about 1 images")
    assert json.loads(run("verify", "bundle", "--json").stdout)["outcome"] == "not decided"


def test_a_failed_gate_is_exit_code_4(
    run: Run, bundle: Path, scan: Path, tiny_bundle: Make
) -> None:
    record: Any = json.loads((bundle / MANIFEST).read_text())["verification"]
    (gate,) = (gate for gate in record["gates"] if gate["name"] == "routing_flips")
    gate |= {"measured": 0.25, "interval": [0.24, 0.26], "verdict": "failed"}
    write_verification(Bundle.open(bundle), record | {"passed": False})
    result = run("verify", "bundle")
    assert result.exit_code == 4
    assert result.stdout.splitlines()[-1].startswith("Failed: 2 questions")
    what, remedy = result.stderr.splitlines()
    assert what == "tiny failed its verification: routing flips 25.00%, should be at most 0.10%."
    assert remedy.startswith("Do not use it")
    told = run("verify", "bundle", "--json")
    assert (told.exit_code, json.loads(told.stdout)["passed"]) == (4, False)
    assert len(told.stderr.splitlines()) == 2

    asked = ["ask", "scan.png", "Where?", "--model", "bundle", "--max-new-tokens", "1", "--json"]
    answered = run(*asked)
    assert answered.exit_code == 0
    assert answered.stderr.splitlines() == [
        "tiny failed its verification: it may answer otherwise than its checkpoint.",
        NOTICE,
    ]
    (answer,) = json.loads(answered.stdout)["answers"]
    assert answer["model"]["verification"] == "failed"
    assert run("-q", *asked).stderr == f"{NOTICE}\n"
    for path, proof in ((bundle, "failed"), (tiny_bundle(), "not measured")):
        assert re.search(rf"verification +{proof}", run("inspect", str(path)).stdout)
        assert json.loads(run("inspect", str(path), "--json").stdout)["verification"] == proof


def test_a_bundle_that_was_edited_is_refused(run: Run, bundle: Path) -> None:
    manifest = (bundle / MANIFEST).read_text()
    edited = json.loads(manifest)
    edited["verification"]["figures"]["overall"]["kl"]["mean"] = 0.0
    (bundle / MANIFEST).write_text(json.dumps(edited, indent=1))
    for verb in ("verify", "inspect"):
        result = run(verb, "bundle")
        assert result.exit_code == 3
        assert "manifest.json is damaged or was edited" in two_lines(result)[0]
    (bundle / MANIFEST).write_text(manifest)
    with (bundle / "decoder.data").open("r+b") as file:
        file.write(b"edited")
    result = run("verify", "bundle")
    assert result.exit_code == 3
    assert "decoder.data was changed or is incomplete" in two_lines(result)[0]


@pytest.mark.parametrize("model", ["nano", "modality-nano"])
def test_inspect_tells_of_files_that_are_missing_or_cut_off(
    run: Run, tmp_path: Path, model: str
) -> None:
    shutil.copytree(bundle_path(model), tmp_path / "copy")
    assert json.loads(run("inspect", "copy", "--json").stdout)["damaged"] == []
    first, second = sorted(Path("copy").glob("*.data"))
    first.unlink()
    os.truncate(second, second.stat().st_size - 1)
    result = run("inspect", "copy")
    assert result.exit_code == 3
    assert f"size than the manifest says: {first.name}, {second.name}." in result.stderr
    told = json.loads(run("inspect", "copy", "--json").stdout)
    assert (told["damaged"], told["error"]["code"]) == ([first.name, second.name], "bad_bundle")


def test_inspect_tells_of_a_checkpoint_without_all_of_its_tensors(run: Run, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_path("modality-nano"), tmp_path / "c")
    assert run("inspect", "c").exit_code == 0
    (tmp_path / "c" / "model-00002-of-00002.safetensors").unlink()
    result = run("inspect", "c")
    assert result.exit_code == 3
    assert "model-00002-of-00002.safetensors is missing" in two_lines(result)[0]


@pytest.mark.parametrize(
    ("line", "code", "what"),
    [
        (["nowhere"], 3, "There is no model folder 'nowhere'."),
        (["bundle", "--data", "builtin"], 2, "are to measure against a checkpoint."),
        (["bundle", "--beside", "nano"], 2, "are to measure against a checkpoint."),
        (["bundle", "--vision-tower", "clip"], 2, "are to measure against a checkpoint."),
        (["bundle", "--against", "nano", "--beside", "gptq"], 2, "no 'gptq' to measure beside"),
        (["bundle", "--against", "nano", "--data", "nowhere"], 2, "no calibration data 'nowhere'"),
        (["bundle", "--against", "nano"], 3, "bundle was not made from the checkpoint"),
        (["bundle", "--against", "bundle"], 3, "bundle is a bundle, not a checkpoint."),
        (["bundle", "--report", "none/page.html"], 2, "none is not a folder."),
    ],
)
def test_what_cannot_be_verified(
    run: Run, bundle: Path, line: list[str], code: int, what: str
) -> None:
    before = (bundle / MANIFEST).read_bytes()
    result = run("verify", *line)
    assert result.exit_code == code
    assert what in two_lines(result)[0]
    assert (bundle / MANIFEST).read_bytes() == before


def test_verify_passes_its_options_on(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Verifier(MedMoEFamily):
        def verify(self, bundle: Path, options: VerifyOptions, progress: object) -> Verification:
            calls.append((bundle, options))
            raise ResourceError("Enough.", "Stop.")

    monkeypatch.setitem(FAMILIES, "med-moe", Verifier())
    line = ["verify", "bundle", "--against", "my", "--beside", "a", "--beside", "b"]
    Path("my").mkdir()
    assert run(*line, "--vision-tower", "clip").exit_code == 5
    options = VerifyOptions(Path("my"), beside=["a", "b"], vision_tower=Path("clip"))
    assert calls == [(Path("bundle"), options)]


# --- what is not installed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "line", "extra"),
    [
        ("torch", ["export"], "export"),
        ("onnx_ir", ["export"], "export"),
        ("torch", ["calibrate", "--data", "builtin", "-o", "no.stats"], "export"),
        ("torch", ["verify", "--against", "nano"], "export"),
        ("jinja2", ["verify", "--report", "page.html"], "export"),
        ("accelerate", ["train", "--data", "data", "-o", "out"], "train"),
    ],
)
def test_a_missing_package_names_its_extra(package: str, line: list[str], extra: str) -> None:
    result = start_without([package], *line)
    assert (result.returncode, result.stdout) == (5, "")
    what, remedy = result.stderr.splitlines()
    assert f"'{package}'" in what
    assert remedy == f"Install it with: pip install 'medmoe-edge[{extra}]'"


def test_tables_leave_out_what_nobody_measured(
    run: Run, bundle: Path, tiny_checkpoint: Make, questions: Path
) -> None:
    lines = questions.read_text().splitlines()
    stripped = [json.loads(line) | {"answer": ""} for line in lines]
    questions.write_text("\n".join(map(json.dumps, stripped)))
    shown = run("verify", "bundle", "--against", str(tiny_checkpoint()), "--data", str(questions))
    assert "KL, nats" in shown.stdout
    assert "accuracy" not in shown.stdout


# --- verify --targets -------------------------------------------------------------------------


def test_targets_are_held_against_each_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from medmoe_edge.evaluation.metrics import Share
    from medmoe_edge.evaluation.targets import Agreement

    def agree(bundle: Path, source: str, **_: object) -> list[Agreement]:
        assert (bundle.name, source) == ("nano-bundle", "builtin")
        exact, off = (0.0, 1e-6, 1e-5), (0.0, 0.02, 0.1)
        shares = Share.of(9, 10), Share.of(1, 100)
        return [
            Agreement("good", "this CPU", 10, *exact, *shares, 0.001),
            Agreement("bad", "that CPU", 10, *off, *shares, 0.5),
        ]

    monkeypatch.setattr("medmoe_edge.pipeline.med_moe.agree", agree)
    result = run("verify", "nano", "--targets", "all-available", "--json")
    told = json.loads(result.stdout)
    assert [target["agrees"] for target in told["targets"]] == [True, False]
    assert told["targets"][1]["rerouted"] == {"share": 0.01, "count": 1, "total": 100}
    shown = run("verify", "nano", "--targets", "all-available").stdout
    assert "9 of 10" in shown
    assert "bad is off by more than 1%" in shown
    assert "good is off" not in shown


def test_targets_need_no_checkpoint(run: Run) -> None:
    for other in (["--against", "nano"], ["--no-record"], ["--vision-tower", "clip"]):
        result = run("verify", "nano", "--targets", "all-available", *other)
        assert result.exit_code == 2
        assert "--targets holds a bundle's targets against each other" in result.stderr
