"""The verbs that build: what they pass on, what they print, and what they refuse."""

import json
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import Run, fake_module, two_lines
from PIL import Image

from medmoe_edge._types import Progress
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.embedded import checkpoint_path
from medmoe_edge.errors import MedMoEError, VerificationError
from medmoe_edge.evaluation.record import read_record
from medmoe_edge.evaluation.verify import Verification
from medmoe_edge.families import FAMILIES, MedMoEFamily
from medmoe_edge.pipeline import ExportOptions
from medmoe_edge.pipeline.med_moe import Export
from medmoe_edge.render import console as render

Make = Callable[..., Path]
NAMES = ("ct", "mri", "pathology", "xray")


# --- export -----------------------------------------------------------------------------------


class Exporter(MedMoEFamily):
    """A family that remembers what it was to export, and gives what it was told to."""

    def __init__(self, made: Export | MedMoEError | None = None) -> None:
        self.asked: list[tuple[Path, Path, ExportOptions]] = []
        self.made = made

    def export(
        self, checkpoint: Path, out: Path, options: ExportOptions, progress: Progress
    ) -> Export:
        for done in (0, 1, 2):
            progress("decoder", done, 2)
        self.asked.append((checkpoint, out, options))
        if isinstance(self.made, MedMoEError):
            raise self.made
        return self.made or Export(out, None)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Exporter:
    """What Med-MoE's checkpoints are exported by; it writes nothing."""
    made = Exporter()
    monkeypatch.setitem(FAMILIES, "med-moe", made)
    (tmp_path / "my-model").mkdir()
    return made


NANO = checkpoint_path("nano"), Path("nano-int8"), ExportOptions(name="nano")


def test_export_alone_makes_the_embedded_model_int8(run: Run, exporter: Exporter) -> None:
    for line in (["export", "--int8"], ["export"]):
        result = run(*line)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.splitlines()[0] == "Wrote the bundle nano-int8"
        assert "not measured" in result.stdout
    assert exporter.asked == [NANO, NANO]


def test_export_of_a_folder(run: Run, exporter: Exporter) -> None:
    result = run("export", "my-model/", "--fp32", "--vision-tower", "clip", "--force", "--json")
    assert json.loads(result.stdout) == {
        "bundle": "my-model-fp32",
        "name": "my-model",
        "precision": "fp32",
        "verification": None,
    }
    options = ExportOptions("fp32", name="my-model", vision_tower=Path("clip"), force=True)
    assert exporter.asked == [(Path("my-model"), Path("my-model-fp32"), options)]
    run("export", "my-model", "-o", "elsewhere")
    assert exporter.asked[1][1] == Path("elsewhere")


@pytest.mark.parametrize(
    ("line", "given"),
    [
        (["--int4", "--method", "rtn"], {"precision": "int4", "method": "rtn"}),
        (["--mixed", "4.5"], {"precision": "mixed", "budget_bits": 4.5}),
        (["--calibrate", "scans", "--samples", "64"], {"calibrate_on": "scans", "samples": 64}),
        (["--int4", "--stats", "s", "--strict"], {"precision": "int4", "stats": Path("s")}),
        (["--int4", "--group-size", "128"], {"precision": "int4", "group": 128}),
        (["--vision", "tokens"], {"precision": "int8", "vision": "tokens"}),
    ],
)
def test_export_passes_its_options_on(
    run: Run, exporter: Exporter, line: list[str], given: dict[str, Any]
) -> None:
    assert run("export", *line).exit_code == 0
    options = ExportOptions(name="nano", strict="--strict" in line, **given)
    out = Path(f"nano-{options.precision}")
    assert exporter.asked == [(checkpoint_path("nano"), out, options)]


def test_export_shows_its_proof(run: Run, proven_bundle: Path, exporter: Exporter) -> None:
    bundle = Bundle.open(proven_bundle)
    exporter.made = Export(Path("out"), Verification(bundle, [], read_record(bundle)))
    lines = run("export").stdout.splitlines()
    assert lines[0].split() == ["tiny", "against", "its", "checkpoint"]
    assert lines[-2].startswith("Not decided: 2 questions about 1 images of questions.jsonl")
    assert lines[-1] == "Wrote the bundle out"
    told = json.loads(run("export", "--json").stdout)
    assert told["verification"]["outcome"] == "not decided"
    exporter.made = VerificationError("It failed.", "Do not use it.")
    result = run("export", "--json")
    assert result.exit_code == 4
    assert result.stderr.splitlines() == ["It failed.", "Do not use it."]
    assert json.loads(result.stdout)["error"]["code"] == "verification_failed"


@pytest.mark.parametrize(
    ("line", "what", "remedy"),
    [
        (["--int4", "--int8"], "--int8 and --int4 exclude each other.", "Give one of them."),
        (["--mixed", "4", "--fp32"], "--mixed and --fp32 exclude", "Give one of them."),
        (["--mixed", "4.5"], "what calibration measured", "Add --calibrate DATA or --stats FILE"),
        (["--strict"], "is told by a calibration", "Add --calibrate DATA or --stats FILE"),
        (["--dtype", "bf16"], "--memory-limit and --dtype are for GPUs.", "Add --target"),
        (["--mixed", "1", "--calibrate", "builtin"], "1 bits per weight are too few", "2.5"),
        (["--calibrate", "nowhere"], "no calibration data 'nowhere'", "builtin"),
        (["--calibrate", "empty"], "'empty' holds no image", "PNG"),
        (["--stats", "scan.png"], "scan.png is truncated or no statistics", "calibrate"),
        (["--stats", "s", "--calibrate", "builtin"], "Both data and statistics", "one of the two"),
        (["--calibrate", "builtin", "-o", "empty"], "empty exists already", "--force"),
        (["--calibrate", "builtin", "-o", "empty", "--force"], "holds no manifest.json", "another"),
        (["--samples", "0"], "--samples", "export --help"),
        (["--method", "best"], "'rtn'", "export --help"),
    ],
)
@pytest.mark.usefixtures("scan")
def test_what_cannot_be_exported(
    run: Run, tmp_path: Path, line: list[str], what: str, remedy: str
) -> None:
    (tmp_path / "empty").mkdir()
    result = run("export", *line)
    assert result.exit_code == 2
    told = two_lines(result)
    assert what in told[0]
    assert remedy in told[1]
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "scan.png"}


@pytest.mark.parametrize("line", ["export nano", "inspect nano", "plan nano --device cpu"])
def test_a_folder_named_as_an_embedded_model_is_not_taken_silently(
    run: Run, exporter: Exporter, tmp_path: Path, line: str
) -> None:
    (tmp_path / "nano").mkdir()
    result = run(*line.split())
    assert result.exit_code == 0
    assert result.stderr == "nano is the embedded model; ./nano is the folder here.\n"
    assert all(asked[0] == checkpoint_path("nano") for asked in exporter.asked)


@pytest.mark.parametrize("verb", ["export", "inspect"])
@pytest.mark.usefixtures("exporter")
def test_a_wrong_model_name_lists_the_right_ones(run: Run, verb: str) -> None:
    result = run(verb, "nanno")
    assert result.exit_code == 3
    what, remedy = two_lines(result)
    assert "'nanno'" in what
    assert "nano" in remedy


# --- calibrate --------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Questions about 21 images; that of patient 3 is damaged."""
    generator = np.random.default_rng(0)
    records = []
    for index in range(21):
        image = f"patient{index}.png"
        pixels = generator.integers(0, 256, (28, 28), np.uint8)
        Image.fromarray(pixels).save(tmp_path / image)
        records.append({"image": image, "question": "Where?", "modality": NAMES[index % 4]})
    (tmp_path / "patient3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    path = tmp_path / "scans.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_calibrate(run: Run, tiny_checkpoint: Make, scans: Path) -> None:
    command = ["calibrate", str(tiny_checkpoint()), "--data", "scans.jsonl", "-o", "stats"]
    result = run(*command, "--no-hessians")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "Skipped images that cannot be read: 1.\n"
    lines = result.stdout.splitlines()
    assert lines[0].strip() == "Calibrated on 6 ct, 5 mri, 5 pathology, 4 xray"
    assert len([line for line in lines if line.rstrip().endswith(("covered", "borrowed"))]) == 8
    assert lines[-2].startswith("Skipped: 'patient3.png' is damaged")
    assert lines[-1] == "Wrote the statistics stats"
    made = Path("stats").read_bytes()
    assert b"patient" not in made
    refused = run(*command)
    assert refused.exit_code == 2
    assert two_lines(refused)[0] == "stats exists already."
    assert Path("stats").read_bytes() == made
    again = run("-q", *command, "--force", "--json", "--samples", "4")
    assert again.stderr == ""
    (line,) = again.stdout.splitlines()
    told = json.loads(line)
    assert (told["statistics"], told["data"], told["skipped"]) == ("stats", "scans.jsonl", 1)
    assert sum(told["samples"].values()) > 4  # more were drawn for experts that were short
    assert len(told["coverage"]) == 8
    assert Statistics.open(Path("stats")).inputs["decoder.head.in"].hessian is not None


def test_an_interrupted_calibration_goes_on(
    run: Run, tiny_checkpoint: Make, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["calibrate", str(tiny_checkpoint()), "--data", "scans.jsonl", "-o", "stats"]
    steps: list[str] = []

    @contextmanager
    def working(what: str) -> Iterator[Callable[[str, int, int], None]]:
        steps.clear()
        yield report

    def report(step: str, done: int, total: int) -> None:
        steps.append(step)
        if interrupting and step == "layers" and done == 25:
            raise KeyboardInterrupt

    monkeypatch.setattr(render, "working", working)
    interrupting = True
    result = run(*command)
    assert (result.exit_code, result.stdout, steps[0]) == (130, "", "decoding")
    assert "images" in steps
    assert result.stderr.splitlines()[-1] == "Interrupted."
    assert not Path("stats").exists()
    assert Path(".stats.work").is_dir()
    interrupting = False
    assert run(*command).exit_code == 0
    assert list(dict.fromkeys(steps))[:2] == ["decoding", "layers"]  # no image is seen again
    assert Path("stats").is_file()
    assert not Path(".stats.work").exists()


@pytest.mark.parametrize(
    ("data", "code", "what"),
    [
        ("nowhere", 2, "There is no calibration data 'nowhere'."),
        ("empty", 2, "'empty' holds no image."),
        ("bad.jsonl", 2, "bad.jsonl, line 1"),
        ("martian.jsonl", 2, "modalities that the model does not know: martian"),
        ("broken", 2, "2 of 2 images of 'broken' cannot be read, more than 5%: 'patient"),
    ],
)
def test_what_cannot_be_calibrated_on(
    run: Run, tmp_path: Path, data: str, code: int, what: str
) -> None:
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    for index in (0, 1):
        (tmp_path / "broken" / f"patient{index}.png").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "martian.jsonl").write_text('{"image": "a.png", "modality": "martian"}')
    before = sorted(tmp_path.iterdir())
    result = run("calibrate", "nano", "--data", data, "-o", "stats", "--samples", "2")
    assert result.exit_code == code
    assert what in two_lines(result)[0]
    assert sorted(tmp_path.iterdir()) == before


def test_strict_calibration_refuses(run: Run, tiny_checkpoint: Make, scans: Path) -> None:
    command = ["calibrate", str(tiny_checkpoint()), "--data", "scans.jsonl", "-o", "stats"]
    before = sorted(scans.parent.iterdir())
    scans.write_text(scans.read_text().splitlines()[0])
    result = run(*command, "--strict")
    assert result.exit_code == 4
    assert two_lines(result)[0].startswith("Calibration did not reach every expert: layer 0 mri")
    assert sorted(scans.parent.iterdir()) == before


# --- init, train, data ------------------------------------------------------------------------


def test_init_and_inspect(run: Run) -> None:
    pytest.importorskip("torch")
    assert run("init", "tiny", "out", "--seed", "3").stdout == "Wrote the checkpoint out\n"
    shown = run("inspect", "out")
    assert shown.exit_code == 0, shown.stderr
    described = json.loads(run("inspect", "out", "--json").stdout)
    assert described["kind"] == "checkpoint"
    for figure in (described["parameters_total"], described["parameters_activated"]):
        assert f"{figure:,}" in shown.stdout
    assert "4, top-1 + meta expert, in 2 layers" in shown.stdout
    again = run("init", "tiny", "out")
    assert again.exit_code == 2
    two_lines(again)
    assert run("init", "tiny", "out", "--force").exit_code == 0
    unknown = run("init", "tyny", "new")
    assert unknown.exit_code == 2
    assert "tiny" in two_lines(unknown)[1]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which trainer got which recipe."""
    calls: list[tuple[str, str]] = []

    def trainer(name: str) -> Callable[..., Path]:
        def train(recipe: str, data: Path, out: Path, progress: Any, options: Any) -> Path:
            assert options.base is None
            assert (data, out) == (Path("images"), Path("run"))
            progress.advance(progress.add_task("epoch", total=1))
            calls.append((name, recipe))
            return out / "checkpoint"

        return train

    modules: dict[str, dict[str, Any]] = {
        "recipe": {"read_recipe": lambda name: f"recipe {name}"},
        "report": {"TrainOptions": SimpleNamespace},
        "run": {"train": trainer("med-moe")},
        "contrastive": {
            "read_modality_recipe": lambda name: f"recipe {name}",
            "is_modality_recipe": lambda name: "modality" in name,
            "train_modality": trainer("modality-moe"),
        },
    }
    for name, members in modules.items():
        fake_module(monkeypatch, f"medmoe_edge.training.{name}", **members)
    return calls


@pytest.mark.parametrize(
    ("options", "trainer", "recipe"),
    [
        ([], "med-moe", "nano"),
        (["--model", "modality-moe"], "modality-moe", "modality-nano"),
        (["mine.json"], "med-moe", "mine.json"),
        (["modality-nano-shared"], "modality-moe", "modality-nano-shared"),
        (
            ["modality-nano-shared", "--model", "modality-moe"],
            "modality-moe",
            "modality-nano-shared",
        ),
    ],
)
def test_train(
    run: Run, trained: list[tuple[str, str]], options: list[str], trainer: str, recipe: str
) -> None:
    result = run("train", *options, "--data", "images", "-o", "run")
    assert result.stdout == "Wrote the checkpoint run/checkpoint\n"
    assert result.stderr == ""
    assert trained == [(trainer, f"recipe {recipe}")]


def test_a_recipe_of_the_other_model_is_refused(run: Run, trained: list[tuple[str, str]]) -> None:
    result = run("train", "nano", "--model", "modality-moe", "--data", "images", "-o", "run")
    assert result.exit_code == 2
    assert "modality-moe" in two_lines(result)[0]
    assert trained == []


def test_data(run: Run, tmp_path: Path) -> None:
    record = {
        **{"qid": 1, "img_name": "xmlab1/source.jpg", "q_lang": "en", "modality": "CT"},
        **{"location": "Lung", "question": "Is it?", "answer": "No", "answer_type": "CLOSED"},
        "content_type": "Abnormality",
    }
    source = tmp_path / "slake"
    (source / "imgs" / "xmlab1").mkdir(parents=True)
    (source / "imgs" / "xmlab1" / "source.jpg").write_bytes(b"picture")
    (source / "test.json").write_text(json.dumps([record]))
    result = run("data", "slake", "slake", "out")
    assert result.stdout == f"Wrote 1 test questions about 1 images to {tmp_path / 'out'}\n"
    assert run("data", "slake", "slake", "out").exit_code == 2
    assert run("data", "slake", "slake", "out", "--force").exit_code == 0
    assert run("data", "slack", "slake", "new").exit_code == 2


def test_data_labels_and_what_does_not_go_together(run: Run, tmp_path: Path) -> None:
    for modality in ("ct", "oct"):
        (tmp_path / "mine" / modality).mkdir(parents=True)
        Image.new("RGB", (8, 8), len(modality)).save(tmp_path / "mine" / modality / "1.png")
    result = run("data", "labels", "mine", "data", "--split", "train", "--body", "eye")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        "Modalities: ct 1, oct 1",
        f"Wrote 2 train labels about 2 images to {tmp_path / 'data'}",
    ]
    told = json.loads(run("data", "labels", "mine", "data", "--force", "--json").stdout)
    assert told["modalities"] == {"ct": 1, "oct": 1}
    assert run("data", "labels", "mine", "data").exit_code == 2
    for wrong in (
        ("slake", "mine", "x", "--modality", "ct"),
        ("labels", "mine", "x", "--lang", "en"),
        ("questions", "mine", "x", "--levels", "finding"),
        ("labels", "none", "x"),
    ):
        result = run("data", *wrong)
        assert result.exit_code == 2
        two_lines(result)
    assert not (tmp_path / "x").exists()


def test_train_tells_recipes_and_runs(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    shown = run("train", "--show-recipe", "nano")
    assert tomllib.loads(shown.stdout)["preset"] == "nano"
    assert json.loads(run("train", "--show-recipe", "fine-tune", "--json").stdout)["preset"] is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    rows = [
        {"phase": "alignment", "epoch": 0, "loss": 2.5, "seconds": 12.0},
        {"phase": "moe", "epoch": 0, "loss": 1.25, "seconds": 61.0, "modality": 0.5},
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"phase": "mo'
    (tmp_path / "run" / "log.jsonl").write_text(text)
    watched = run("train", "--watch", "run")
    assert "moe" in watched.stdout
    assert "50.0%" in watched.stdout
    assert "2 epochs are done; the run is not finished." in watched.stdout
    told = json.loads(run("train", "--watch", "run", "--json").stdout)
    assert told == {"epochs": rows, "finished": False}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--show-recipe", "nanoo"], "no recipe 'nanoo'"),
        (["--watch", "nowhere"], "no run's folder"),
        (["nano", "-o", "run"], "--data was not given"),
        (["nano", "--data", "none", "-o", "run"], "does not exist"),
        (["modality-nano", "--from", "nano", "--data", "d", "-o", "r"], "--from does not go with"),
        (["modality-nano", "--vision-tower", "v", "--data", "d", "-o", "r"], "--vision-tower does"),
        (["--vision-tower", "v", "--data", "d", "-o", "r"], "no checkpoint to start from"),
        (["--show-recipe", "nano", "--watch", "run"], "print, and train nothing"),
        (["--watch", "run", "--data", "d"], "print, and train nothing"),
        (["--from", "none", "--data", "d", "-o", "r"], "none"),
    ],
)
def test_what_cannot_be_trained(run: Run, options: list[str], what: str) -> None:
    pytest.importorskip("torch")
    result = run("train", *options)
    assert result.exit_code in (2, 3)
    assert what in two_lines(result)[0]


def test_a_router_is_put_into_a_checkpoint(
    run: Run, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    shutil.copytree(tiny_checkpoint("tiny-phi", expert_names=()), tmp_path / "c")
    torch.save({"fc1.weight": torch.ones(4, 64), "fc1.bias": torch.ones(4)}, "phi_router.pth")
    result = run("router", "import", "phi_router.pth", "c")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "Wrote the router into c\n"
    assert "name them with --modalities" in result.stderr
    order = "ct,mri,oct,xray"
    told = json.loads(
        run("router", "import", "phi_router.pth", "c", "--modalities", order, "--json").stdout
    )
    assert told["modalities"] == order.split(",")
    assert order.replace(",", ", ") in run("inspect", "c").stdout
    for wrong, code in (
        (["router", "import", "phi_router.pth", "c", "--modalities", "ct"], 2),
        (["router", "import", "phi_router.pth", "nano"], 2),
        (["router", "import", "none.pth", "c"], 3),
        (["router", "train", "c", "--data", "none"], 2),
    ):
        result = run(*wrong)
        assert result.exit_code == code, result.stderr
        two_lines(result)


def test_no_verb_that_builds_replaces_its_own_input(
    run: Run, tiny_checkpoint: Make, tiny_bundle: Make, tmp_path: Path
) -> None:
    """Neither as a whole nor in part, and not with what lies within it."""
    shutil.copytree(tiny_bundle(), tmp_path / "b")
    for place in ("c", "b/c", "run/checkpoint"):
        shutil.copytree(tiny_checkpoint(), tmp_path / place)
    (tmp_path / "b" / "phi_router.pth").write_bytes(b"")
    own = ("chat_template.json", "vocab.json", "LICENSE", "modeling.py", "notes.txt", "empty")
    for name, text in zip(own, ("{}", '{"id": 1}', "MIT", "import os", "Mine.", ""), strict=True):
        (tmp_path / "c" / name).write_text(text)
    weights = next((tmp_path / "c").glob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for line in (
        ["export", "c", "-o", "c", "--force"],
        ["export", "c", "-o", "c/int8"],
        ["export", "b/c", "-o", "b", "--force"],
        ["export", "c", "--vision-tower", "b/c", "-o", "b", "--force"],
        ["export", "c", "--calibrate", "b/images", "-o", "b", "--force"],
        ["export", "b", "--target", "onnxruntime-cuda", "-o", "b", "--force"],
        ["calibrate", "c", "--data", "builtin", "-o", "c/config.json", "--force"],
        ["calibrate", "c", "--data", "builtin", "-o", str(weights), "--force"],
        *(["eval", "c", "--data", "q.jsonl", "--predictions", f"c/{n}", "--force"] for n in own),
        ["train", "--from", "run/checkpoint", "--data", "d", "-o", "run"],
        ["train", "--from", "run", "--data", "d", "-o", "run"],
        ["router", "import", "b/phi_router.pth", "c", "-o", "c", "--force"],
        ["router", "train", "c", "--data", "d", "-o", "c/new"],
        ["verify", "b", "--report", "b/manifest.json", "--force"],
        ["verify", "b", "--report", "b/decoder.onnx", "--force"],
    ):
        result = run(*line)
        assert result.exit_code == 2, line
        assert two_lines(result)[0].endswith("would replace or change its own input."), line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_a_verb_wrote_into_a_models_folder_is_replaced(
    run: Run, tiny_checkpoint: Make, tiny_bundle: Make, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path / "c")
    shutil.copytree(tiny_bundle(), tmp_path / "b")
    Image.new("L", (8, 8)).save(tmp_path / "scan.png")
    question = {"image": "scan.png", "question": "Is it?", "answer": "No"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question))
    for line in (
        ["calibrate", "c", "--data", "builtin", "--samples", "4", "-o", "c/my.stats"],
        ["eval", "c", "--data", "q.jsonl", "--predictions", "c/answers.json"],
        ["verify", "b", "--report", "b/report.html"],
    ):
        for again in ([], ["--force"]):
            result = run(*line, *again)
            assert "own input" not in result.stderr
            assert result.exit_code == 0, result.stderr


def test_an_export_within_its_checkpoint_is_told_where_to_write(
    run: Run, tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path / "c")
    monkeypatch.chdir(tmp_path / "c")
    result = run("export", ".")
    assert result.exit_code == 2
    assert two_lines(result)[1] == f"Name another place: -o {tmp_path / 'c-int8'}"


# --- targets ---------------------------------------------------------------------------------


def test_a_target_is_made_from_the_embedded_bundle(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "cuda"
    result = run("export", "nano", "--target", "onnxruntime-cuda", "-o", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["target"]["name"] == "onnxruntime-cuda"
    assert told["engines"] == {}
    assert "onnxruntime-cuda fp16" in run("inspect", str(out)).stdout


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--gpu", "sm89"], "are for GPUs"),
        (["--target", "tensorrt-rtx"], "builds for one GPU"),
        (["--target", "tensorrt-rtx", "--gpu", "sm1"], "There is no GPU 'sm1'"),
        (["--target", "onnxruntime-cuda", "--dtype", "bf16"], "computes in fp16"),
    ],
)
def test_what_no_target_can_be(run: Run, tmp_path: Path, options: list[str], what: str) -> None:
    result = run("export", "nano", *options, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert what in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_keeps_its_precision(run: Run, tmp_path: Path) -> None:
    from medmoe_edge.embedded import bundle_path

    command = ["export", str(bundle_path("nano")), "--int4", "--target", "onnxruntime-cuda"]
    result = run(*command, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "it was quantised and calibrated when it was made" in result.stderr
