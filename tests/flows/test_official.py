"""Folders as the official trainers save them, exported and asked, against transformers.

Nothing in them is made by this project but the tokenizers' vocabularies (`tokenizer_files`).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official_folders import Official
from tokenizer_files import END, SlowTokenizer, vocabulary, write_gpt2, write_phi, write_ranks

import medmoe_edge
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.checkpoint.tokenizer import TIKTOKEN
from medmoe_edge.errors import ConfigError
from medmoe_edge.export.build import BuildOptions, export_bundle
from medmoe_edge.image.loading import preprocess
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import AFTER_IMAGE, BEFORE_IMAGE, check_question

QUESTIONS = [
    f"Is there {what} in {where}? {number}"
    for number in range(10)
    for what in ("a mass", "größe", "3 nodules", "air")
    for where in ("the lung", "2 scans", "  the   chest", "region 日本", "it")
]
LIMIT = 2
# of `Official.answers`: rounding to int8 moves these models by less
DECIDED = {"phi": 0.1, "stablelm": 0.35}
PICTURE = Image.from_array(np.random.default_rng(5).integers(0, 256, (40, 30, 3), dtype=np.uint8))
SHAPES = [
    (kind, top_k, residual)
    for kind in ("phi", "stablelm")
    for top_k in (1, 2)
    for residual in (False, True)
]
Answers = list[tuple[str, float]]


def save(kind: str, folder: Path, **model: Any) -> tuple[Official, SlowTokenizer]:
    """An official folder with a slow tokenizer's files, and that tokenizer."""
    official = Official(kind, **model)
    folder.mkdir(parents=True)
    end = len(vocabulary())
    added: dict[str, int] = {}
    if kind == "phi":
        tokens = write_phi(folder)
        added = json.loads((folder / "added_tokens.json").read_text())
    else:
        tokens = write_gpt2(folder, {"clean_up_tokenization_spaces": False})
    known = torch.arange(official.rows) < tokens
    official.save(folder, known, eos_token_id=[end] if kind == "phi" else end)
    return official, SlowTokenizer(vocabulary(), {**added, END: end})


def expected(
    official: Official, slow: SlowTokenizer, folder: Path, end: int, count: int = len(QUESTIONS)
) -> Answers:
    """What the reference says to so many questions, and by how much each answer was decided."""
    pixels = torch.from_numpy(preprocess(PICTURE, read_checkpoint(folder).config.vision))
    after = [slow(AFTER_IMAGE.format(question=check_question(q))) for q in QUESTIONS[:count]]
    found = official.answers(pixels, slow(BEFORE_IMAGE), after, end, LIMIT)
    special = {index for text, index in slow.added.items() if text.startswith("<|")}
    clean = official.kind == "phi"
    return [(slow.text(ids, special, clean=clean).strip(), margin) for ids, margin in found]


def same_answers(bundle: Path, wanted: Answers, chosen: list[int]) -> None:
    questions = [QUESTIONS[index] for index in chosen]
    answers = medmoe_edge.load(bundle).ask_all(PICTURE, questions, max_new_tokens=LIMIT)
    assert [answer.text for answer in answers] == [wanted[index][0] for index in chosen]


@pytest.mark.parametrize(("kind", "top_k", "residual"), SHAPES)
def test_a_folder_as_saved_answers_as_transformers_does(
    kind: str, top_k: int, residual: bool, tmp_path: Path
) -> None:
    """In fp32 to any 50 questions, in int8 to 50 whose answers the reference is sure of."""
    official, slow = save(kind, tmp_path / "c", top_k=top_k, residual=residual)
    wanted = expected(official, slow, tmp_path / "c", len(vocabulary()))
    assert len({text for text, _ in wanted}) > 1, "a model that says one thing proves nothing"
    fp32 = export_bundle(tmp_path / "c", tmp_path / "fp32", BuildOptions("fp32"))
    same_answers(fp32, wanted, list(range(50)))
    int8 = export_bundle(tmp_path / "c", tmp_path / "int8", BuildOptions("int8"))
    sure = [index for index, (_, margin) in enumerate(wanted) if margin > DECIDED[kind]][:50]
    assert len(sure) == 50
    same_answers(int8, wanted, sure)


@pytest.mark.parametrize("kind", ["phi", "stablelm", "qwen"])
def test_moe_llava_answers_as_transformers_does(kind: str, tmp_path: Path) -> None:
    """No meta expert, no router bias; Qwen under the names of its own modelling."""
    official, slow = save(kind, tmp_path / "c", top_k=2, llava=True)
    config = read_checkpoint(tmp_path / "c").config
    assert config.decoder.kind == kind
    assert config.moe is not None
    assert (config.moe.meta_expert, config.moe.router_bias) == (False, False)
    wanted = expected(official, slow, tmp_path / "c", len(vocabulary()), count=50)
    fp32 = export_bundle(tmp_path / "c", tmp_path / "fp32", BuildOptions("fp32"))
    same_answers(fp32, wanted, list(range(50)))


def test_only_tokens_that_exist_are_chosen_by_every_runtime(tmp_path: Path) -> None:
    """Rows that no token has would win everywhere: the others' probabilities are over the rest."""
    official, slow = save("stablelm", tmp_path / "c")
    wanted = expected(official, slow, tmp_path / "c", len(vocabulary()), count=5)
    bundle = export_bundle(tmp_path / "c", tmp_path / "fp32", BuildOptions("fp32"))
    confidences = []
    runtimes: list[dict[str, Any]] = [
        {"model": tmp_path / "c"},
        {"model": bundle},
        {"model": bundle, "memory_budget": "50%"},
        {"model": bundle, "runtime": "torch"},
        {"model": bundle, "runtime": "torch", "memory_budget": "50%"},
    ]
    for options in runtimes:
        engine = medmoe_edge.load(**options)
        answers = engine.ask_all(PICTURE, QUESTIONS[:5], max_new_tokens=LIMIT)
        assert [answer.text for answer in answers] == [text for text, _ in wanted[:5]]
        confidences.append([answer.confidence for answer in answers])
    assert min(map(min, confidences)) > 1e-4
    for found in confidences[1:]:
        assert found == pytest.approx(confidences[0], rel=1e-3)


def test_arcade100k_with_its_hole(tmp_path: Path) -> None:
    form = TIKTOKEN["arcade100k.tiktoken"]
    official, folder = Official("stablelm", rows=100_352), tmp_path / "c"
    folder.mkdir()
    ranks = write_ranks(folder / "arcade100k.tiktoken", form.ranks)
    added = {name: form.first_special + index for index, name in enumerate(form.special)}
    known = torch.zeros(official.rows, dtype=torch.bool)
    known[[*ranks.values(), *added.values()]] = True
    assert int((~known[:100_289]).nonzero()) == 100_256
    official.save(folder, known, eos_token_id=100_257)
    slow = SlowTokenizer(ranks, added, ranked=True)
    wanted = expected(official, slow, folder, 100_257, count=20)
    fp32 = export_bundle(folder, tmp_path / "fp32", BuildOptions("fp32"))
    same_answers(fp32, wanted, list(range(20)))
    bundled = (fp32 / "tokenizer.json").stat().st_size
    assert bundled < 6e6, "one merge a token"


# --- configurations, and what is refused ------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "phi"
    save("phi", folder)
    return folder


@pytest.fixture(scope="module")
def stablelm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "stablelm"
    save("stablelm", folder)
    return folder


def test_what_changes_an_answer_is_refused_and_what_does_not_is_not(
    stablelm: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stablelm, tmp_path / "c")
    usual = read_checkpoint(folder).config
    edit(folder, unfreeze_mm_vision_tower=True, rotary_scaling_factor=1, temperature=0.2)
    assert read_checkpoint(folder).config == usual
    for changes, message in (
        ({"rotary_scaling_factor": 2.0}, "rotary_scaling_factor = 2.0"),
        ({"num_heads": 4}, "num_attention_heads = 2, num_heads = 4"),
        ({"eos_token_id": [416, 9999]}, "eos_token_id"),
        ({"unfreeze_mm_vision_towr": True}, "Did you mean 'unfreeze_mm_vision_tower'"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
    ):
        other = shutil.copytree(stablelm, tmp_path / "other")
        edit(other, **changes)
        with pytest.raises(ConfigError) as caught:
            read_checkpoint(other)
        assert message in str(caught.value)
        shutil.rmtree(other)


def test_heads_under_their_old_name_and_several_ends(stablelm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stablelm, tmp_path / "c")
    usual = read_checkpoint(folder).config
    data = json.loads((folder / "config.json").read_text())
    assert data.pop("num_attention_heads") == data["num_heads"]
    end = data.pop("eos_token_id")
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 300]}))
    found = read_checkpoint(folder).config.decoder
    assert found.end_tokens == (end, 300)
    assert "more_eos_token_ids" not in usual.decoder.to_json()
    assert found.to_json() == usual.decoder.to_json() | {"more_eos_token_ids": [300]}
    engine = medmoe_edge.load(folder)
    answers = engine.ask_all(PICTURE, QUESTIONS[:30], max_new_tokens=6)
    cut = medmoe_edge.load(stablelm).ask_all(PICTURE, QUESTIONS[:30], max_new_tokens=6)
    ended = [(a.text, b.text) for a, b in zip(answers, cut, strict=True) if a.complete]
    assert all(longer.startswith(text) for text, longer in ended)
    assert ended, "no answer reached the second end token"


def test_tokens_that_moe_llava_drops_are_told(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    official, _ = save("stablelm", tmp_path / "c", top_k=2, llava=True)
    moe = official.config()["moe"]
    assert read_checkpoint(tmp_path / "c").warnings == ()
    edit(tmp_path / "c", moe=moe | {"eval_capacity_factor": 1.5})
    (notice,) = read_checkpoint(tmp_path / "c").warnings
    assert notice.code == "tokens_dropped_elsewhere"
    shown = run("inspect", str(tmp_path / "c"), "--json")
    assert json.loads(shown.stdout)["warnings"][0]["code"] == "tokens_dropped_elsewhere"
    assert "would drop tokens" in run("inspect", str(tmp_path / "c")).output.replace("\n", " ")
    answer = medmoe_edge.load(tmp_path / "c").ask(PICTURE, "Is there air?", max_new_tokens=1)
    assert "tokens_dropped_elsewhere" in [each.code for each in answer.warnings]
    made = run("export", str(tmp_path / "c"), "--fp32", "-o", str(tmp_path / "b"))
    assert made.exit_code == 0, made.output
    assert "would drop" in made.output + caplog.text
    shown = run("inspect", str(tmp_path / "b"), "--json")
    assert json.loads(shown.stdout)["warnings"][0]["code"] == "tokens_dropped_elsewhere"
    answer = medmoe_edge.load(tmp_path / "b").ask(PICTURE, "Is there air?", max_new_tokens=1)
    assert "tokens_dropped_elsewhere" in [each.code for each in answer.warnings]


FAULTS = {
    "shard missing": "model.safetensors",
    "shard cut": "truncated",
    "tokenizer missing": "no tokenizer",
    "merges cut": "merges.txt",
    "pointer": "Git-LFS pointer",
    "another model's": "of another model",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused_in_two_lines(
    run: Any, phi: Path, stablelm: Path, tmp_path: Path, fault: str
) -> None:
    folder = shutil.copytree(phi, tmp_path / "c")
    weights = folder / "model.safetensors"
    if fault == "shard missing":
        weights.unlink()
    elif fault == "shard cut":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif fault == "tokenizer missing":
        (folder / "vocab.json").unlink()
    elif fault == "merges cut":
        (folder / "merges.txt").write_bytes((folder / "merges.txt").read_bytes()[:300])
    elif fault == "pointer":
        (folder / "vocab.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        edit(folder, eos_token_id=300)
    found = run("export", str(folder), "--fp32", "-o", str(tmp_path / "b"))
    assert found.exit_code == 3, found.output
    assert FAULTS[fault] in found.output.replace("\n", " ")
    assert "Traceback" not in found.output
    assert not (tmp_path / "b").exists()
