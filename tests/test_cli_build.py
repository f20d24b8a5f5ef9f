"""The verbs that build: what they pass on, what they print, and what they refuse."""

@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The calls of the exporter, which writes nothing."""
    calls: list[dict[str, Any]] = []

    def export_bundle(checkpoint: Path, out: Path, *, progress: Any, **options: Any) -> Path:
        for done in (0, 1, 2):
            progress("Decoder", done, 2)
        calls.append({"checkpoint": checkpoint, "out": out, **options})
        return out

    fake_module(monkeypatch, "medmoe_edge.export.build", export_bundle=export_bundle)
    (tmp_path / "my-model").mkdir()
    return calls


def test_export_alone_makes_the_embedded_model_int8(
    run: Run, exported: list[dict[str, Any]]
) -> None:
    for line in (["export", "--int8"], ["export"]):
        result = run(*line)
        assert (result.exit_code, result.stdout) == (0, "Wrote the bundle nano-int8\n")
    first, second = exported
    assert first == second
    assert first == {
        "checkpoint": checkpoint_path("nano"),
        "out": Path("nano-int8"),
        "precision": "int8",
        "name": "nano",
        "vision_tower": None,
        "force": False,
    }


def test_export_of_a_folder(run: Run, exported: list[dict[str, Any]]) -> None:
    result = run("export", "my-model/", "--fp32", "--vision-tower", "clip", "--force", "--json")
    assert json.loads(result.stdout) == {
        "bundle": "my-model-fp32",
        "name": "my-model",
        "precision": "fp32",
    }
    assert exported == [
        {
            "checkpoint": Path("my-model"),
            "out": Path("my-model-fp32"),
            "precision": "fp32",
            "name": "my-model",
            "vision_tower": Path("clip"),
            "force": True,
        }
    ]
    run("export", "my-model", "-o", "elsewhere")
    assert exported[1]["out"] == Path("elsewhere")


@pytest.mark.parametrize("verb", ["export", "inspect"])
@pytest.mark.usefixtures("exported")
def test_a_wrong_model_name_lists_the_right_ones(run: Run, verb: str) -> None:
    result = run(verb, "nanno")
    assert result.exit_code == 3
    what, remedy = two_lines(result)
    assert "'nanno'" in what
    assert "nano" in remedy


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


def test_train(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(recipe: str, data: Path, out: Path, progress: Any) -> Path:
        assert (recipe, data, out) == ("recipe nano", Path("images"), Path("run"))
        progress.advance(progress.add_task("epoch", total=1))
        return out / "checkpoint"

    read = SimpleNamespace(read_recipe=lambda name: f"recipe {name}")
    monkeypatch.setitem(sys.modules, "medmoe_edge.training.recipe", read)
    fake_module(monkeypatch, "medmoe_edge.training.run", train=train)
    result = run("train", "--data", "images", "-o", "run")
    assert result.stdout == "Wrote the checkpoint run/checkpoint\n"
    assert result.stderr == ""


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
