"""The verbs that prove: what they pass on, what they print, and what they refuse."""

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
    assert figures["labels"]["images"] == 3  # the training image is left out
    assert figures["labels"]["accuracy"] == pytest.approx(2 / 3)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert loaded == [("my", "torch")]
    shown = run(*command)
    assert re.search(r"^ *all +2 +50.0% ", shown.stdout, re.MULTILINE)
    assert "Modality found in these images: 100.0% of 1" in shown.stdout
    assert json.loads(run(*command, "--json").stdout)["labels"] is None


@pytest.mark.usefixtures("questions")
def test_eval_refuses_before_it_works(
    run: Run, loaded: list[tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    command = ["eval", "--data", "questions.jsonl", "--predictions"]
    for line in ([*command, "out.jsonl"], [*command, "none/out.jsonl"], ["eval", "--data", "x"]):
        result = run(*line)
        assert result.exit_code == 2
        two_lines(result)
    assert loaded == []
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert run(*command, "out.jsonl", "--force").exit_code == 0
    assert (tmp_path / "out.jsonl").read_text() != "mine"
