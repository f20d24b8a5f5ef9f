"""The verbs that deploy: what they print, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, Run, start_without, two_lines

from medmoe_edge.device import doctor, estimate, measure
from medmoe_edge.device.doctor import Ort
from medmoe_edge.device.measure import Comparison
from medmoe_edge.runtimes.costs import Speed

HEAVY = ["torch", "onnx", "onnx_ir", "ml_dtypes", "safetensors", "transformers", "pynvml"]


def test_doctor(run: Run) -> None:
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert any(line[:2] == ["ONNX", "Runtime"] for line in lines)
    assert "pip install 'medmoe-edge[tensorrt]'" in result.stdout
    told = json.loads(run("doctor", "--json").stdout)
    assert "CPUExecutionProvider" in told["onnxruntime"]["providers"]
    assert {extra["name"] for extra in told["extras"]} >= {"export", "gpu", "rtx", "tensorrt"}


def test_doctor_with_a_broken_base(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "look_at_onnxruntime", lambda: Ort(failure="ImportError"))
    result = run("doctor")
    assert result.exit_code == 5
    assert "Problem: ONNX Runtime cannot be imported (ImportError)." in result.stdout
    assert result.stderr.splitlines()[0] == "This installation cannot answer questions."


def test_the_base_install_suffices() -> None:
    plans = [["plan", model, "--device", "cpu", "--json"] for model in ("nano", "tiny")]
    for line in (["doctor", "--json"], *plans):
        found = start_without(HEAVY, *line)
        assert (found.returncode, found.stderr) == (0, "")
        assert json.loads(found.stdout)
    refused = start_without(HEAVY, "plan", "--device", "here")
    assert refused.returncode == 5
    assert "pip install 'medmoe-edge[export]'" in refused.stderr


def test_the_extras_of_engines_suffice_to_export_and_to_prove(tmp_path: Path) -> None:
    """On a Jetson there is neither PyTorch nor what else a checkpoint is read with."""
    absent = ["torch", "safetensors", "transformers", "onnxscript", "scipy"]
    out = str(tmp_path / "out")
    made = start_without(absent, "export", "nano", "--target", "onnxruntime-cuda", "-o", out)
    assert (made.returncode, made.stderr) == (0, "")
    code = f"""import sys; sys.modules.update(dict.fromkeys({absent}))
import medmoe_edge.device.prove, medmoe_edge.evaluation.targets
import medmoe_edge.kernels.tensorrt_plugin, medmoe_edge.runtimes.tensorrt.runtime"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_plan(run: Run) -> None:
    command = ["plan", "med-moe-stablelm-1.6b", "--device", "rtx-4060"]
    result = run(*command)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "med-moe-stablelm-1.6b on GeForce RTX 4060 8 GB, 7.50 GB usable"
    rows = {line.split()[0]: line for line in lines[2:6]}
    assert list(rows) == ["int8", "int4", "mixed", "fp16"]
    assert rows["int4"].rstrip().endswith("yes")
    assert "GB for experts" in rows["fp16"]
    assert lines[6].startswith("To build fp16 takes more memory than it has")
    assert "not run" in lines[-3]
    assert lines[-2].startswith("Paging reads for another modality: int8 ")
    assert "what paging was measured to cost" in lines[-1]
    told = json.loads(run(*command, "--json", "--precision", "fp16").stdout)
    assert (told["model"], told["device"]["name"]) == ("med-moe-stablelm-1.6b", "rtx-4060")
    (forecast,) = told["forecasts"]
    assert forecast["expert_budget"] < forecast["experts"]
    assert told["measured"] is None


def test_what_does_not_fit_is_an_error(run: Run) -> None:
    command = ["plan", "med-moe-phi2-2.7b", "--device", "orin-nano-8g", "--precision", "fp16"]
    result = run(*command)
    assert result.exit_code == 5
    what, remedy = result.stderr.splitlines()
    assert what.startswith("med-moe-phi2-2.7b does not fit orin-nano-8g: even in fp16 ")
    assert remedy.startswith("It would fit ")
    assert json.loads(run(*command, "--json").stdout)["forecasts"][0]["fits"] is False


@pytest.mark.parametrize(
    ("line", "what", "code"),
    [
        (["nano", "--device", "orin"], "There is no device 'orin'.", 2),
        (["none", "--device", "cpu"], "There is no model 'none'.", 3),
        (["nano", "--device", "cpu", "--precision", "fp16"], "cpu is not planned in fp16.", 2),
        (["nano", "--device", "cpu", "--measure"], "Measured is this machine", 2),
        (["nano", "--device", "cpu", "--fit"], "--fit needs --latency", 2),
        (["nano", "--device", "cpu", "--latency", "1"], "--fit needs --latency", 2),
        (["nano", "--device", "cpu", "--fit", "--latency", "0"], "A latency of 0 s is none.", 2),
        (["nano", "--device", "cpu", "--group-size", "48"], "There are no groups of 48.", 2),
        (["nano", "--device", "cpu", "--prompt-tokens", "9"], "A prompt of 9 tokens", 2),
        (["nano", "--device", "cpu", "--new-tokens", "9999"], "A prompt of 112 tokens", 2),
        (["nano", "--device", "none.toml"], "none.toml cannot be read.", 2),
        (["nano", "--device", "here", "--measure", "--precision", "int8"], "Measured is", 2),
        (["nano", "--device", "here", "--measure", "--experts", "delta"], "Measured is", 2),
        (["nano", "--device", "here", "--measure", "--vision", "groups"], "Measured is", 2),
        (["nano", "--device", "here", "--measure", "--group-size", "32"], "Measured is", 2),
        (["nano", "--device", "here", "--measure", "--prompt-tokens", "90"], "Measured is", 2),
        (["nano", "--device", "here", "--measure", "--new-tokens", "8"], "Measured is", 2),
        (["nano", "--device", "cpu", "--vision", "tokens"], "A scale per token is for", 2),
    ],
)
def test_what_cannot_be_planned(run: Run, line: list[str], what: str, code: int) -> None:
    result = run("plan", *line)
    assert result.exit_code == code
    assert two_lines(result)[0].startswith(what)


def test_an_answer_that_leaves_no_room_is_told_how_long_it_may_be(run: Run) -> None:
    for tokens, remedy in (
        ("9999", "Give an answer of at most 959 tokens."),
        ("950", "Give a prompt of 65 to 74 tokens."),
    ):
        result = run("plan", "nano", "--device", "cpu", "--new-tokens", tokens)
        assert two_lines(result)[1] == remedy


def test_fit_proposes_what_export_takes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from documents import check_command

    command = ["plan", "med-moe-phi2-2.7b", "--device", "orin-nano-8g", "--fit"]
    result = run(*command, "--latency", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    commands = [line for line in result.stdout.splitlines() if line.startswith("medmoe-edge ")]
    assert len(commands) == 3
    for line in commands:
        check_command(line, monkeypatch)
    told = json.loads(run(*command, "--latency", "3", "--json").stdout)
    assert told["forecast"]["answer"] <= 3
    assert told["forecast"]["precision"] in commands[0]
    late = run(*command, "--latency", "0.5")
    assert late.exit_code == 5
    what, remedy = late.stderr.splitlines()
    in_json = json.loads(run(*command, "--latency", "0.5", "--json").stdout)
    assert in_json["error"]["message"] in what
    assert "does not answer within 0.5 s on orin-nano-8g" in what
    assert "It would take " in remedy


def test_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed(1e-10, 1e-12, 1e-11, step=1e-4)
    asked: list[set[str]] = []

    def measured(_: object, precisions: set[str]) -> dict[str, Speed]:
        asked.append(set(precisions))
        return dict.fromkeys(precisions, speed)

    monkeypatch.setattr(measure, "measure_speeds", measured)
    result = run("plan", "--device", "here", "--precision", "int4")
    assert asked == [{"int4", "fp32"}]
    assert "from measured rates; not run." in result.stdout
    assert json.loads(run("plan", "--device", "here", "--json").stdout)["device"]["ratings"] is None


def test_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = estimate.plan("nano", estimate.PlanOptions("cpu", "int8"))
    figures = Comparison(
        112, {"prefill": 0.006, "token": 0.0012}, {"prefill": 0.005, "token": 0.001}
    )
    monkeypatch.setattr(estimate, "plan_and_measure", lambda _: (made, figures))
    command = ["plan", "nano", "--device", "here", "--measure"]
    result = run(*command)
    rows = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert rows == [
        ["prefill", "6", "ms", "5", "ms", "1.20"],
        ["token", "1.2", "ms", "1", "ms", "1.20"],
    ]
    told = json.loads(run(*command, "--json").stdout)
    assert told["measured"]["ratios"]["token"] == pytest.approx(1.2)
