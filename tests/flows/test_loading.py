"""From a name or a folder to an engine: what is loaded by which runtime, and what is refused."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from medmoe_edge.config import RuntimeName
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import BundleError, ModelError
from medmoe_edge.runtimes.ort.runtime import open_session, session_options

ROOT = Path(__file__).parents[2]
Make = Callable[..., Path]


@pytest.mark.parametrize("runtime", ["auto", "onnxruntime", "torch"])
def test_a_wrong_model_names_the_right_ones(tmp_path: Path, runtime: RuntimeName) -> None:
    (tmp_path / "scan.png").write_bytes(b"")
    for wrong in ("nanno", str(tmp_path / "absent"), tmp_path / "scan.png"):
        with pytest.raises(ModelError, match="one of: nano") as caught:
            load(wrong, runtime=runtime)
        assert "There is no model folder" in caught.value.what
    error = BundleError if runtime == "onnxruntime" else ModelError
    with pytest.raises(error, match=r"neither a bundle nor|manifest\.json cannot be read"):
        load(tmp_path, runtime=runtime)


def test_a_runtime_runs_what_is_made_for_it(tiny_bundle: Make, tiny_checkpoint: Make) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        load(tiny_checkpoint(), runtime="onnxruntime")
    assert load(tiny_bundle(), runtime="onnxruntime").runtime.name == "onnxruntime"
    assert load(tiny_checkpoint(), runtime="torch").runtime.name == "torch"
    assert load(tiny_bundle(), runtime="torch").runtime.name == "torch"


def test_a_checkpoint_without_its_tokenizer_is_told(tiny_checkpoint: Make, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint")
    tokenizer = tmp_path / "checkpoint" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": 300 + n, "content": f"<{n}>"} for n in range(30)
    ]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="330 tokens, the model 320"):
        load(tmp_path / "checkpoint")
    tokenizer.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load(tmp_path / "checkpoint")


def test_a_graph_that_does_not_load_is_told(tiny_bundle: Make) -> None:
    with pytest.raises(BundleError, match=r"cannot load tokenizer\.json") as caught:
        open_session(tiny_bundle() / "tokenizer.json", session_options())
    assert "\n" not in str(caught.value)


def test_asking_a_bundle_imports_no_torch(tiny_bundle: Make, tmp_path: Path) -> None:
    Image.new("L", (30, 20), 90).save(tmp_path / "scan.png")
    code = (
        "import sys, medmoe_edge.engine.engine as engine\n"
        "answer = engine.load(sys.argv[1]).ask(sys.argv[2], 'Where?', max_new_tokens=2)\n"
        "print(answer.confidence, *sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle("int8")), str(tmp_path / "scan.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    confidence, *modules = result.stdout.split()
    assert math.isfinite(float(confidence))
    assert "onnxruntime" in modules
    heavy = {"torch", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript", "pydicom"}
    assert heavy.isdisjoint(modules)
