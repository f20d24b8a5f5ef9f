"""Captions from labels and answered questions."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.data.captions import Captioned, fact_captions, facts, label_captions
from medmoe_edge.data.datasets import Example, LabelledImage, read_examples, read_labels


@pytest.mark.parametrize(
    ("question", "answer", "phrases"),
    [
        ("Does the picture contain liver?", "Yes", ["liver"]),
        ("Does the picture contain liver?", "No", []),
        ("Does the picture contain brian?", "Yes", ["brain"]),
        ("Does the picture contain the organ which has the effect of excreting?", "Yes", []),
        ("Does the rectum appear in this picture?", "Yes", ["rectum"]),
        ("Does the patient have liver cancer?", "Yes", ["liver cancer"]),
        ("Does the patient have any abnormalities?", "Yes", []),
        ("Can effusion be observed on the lower left lung in this picture?", "Yes",
         ["effusion lower left lung"]),
        ("Can cardiomegaly be observed in this picture?", "Yes", ["cardiomegaly"]),
        ("Is/Are there a pleural effusion?", "yes", ["pleural effusion"]),
        ("Is/Are there a pleural effusion?", "no", []),
        ("Is/Are there a pneumothorax in the patient's right lung?", "Yes",
         ["pneumothorax right lung"]),
        ("Are there organs in the picture that can digest food?", "Yes", []),
        ("Are there abnormalities in this image?", "Yes", []),
        ("Is the lung healthy?", "Yes", ["normal lung"]),
        ("Is the lung healthy?", "No", ["abnormal lung"]),
        ("Is the lung unhealthy?", "No", ["normal lung"]),
        ("Does the brain look abnormal?", "Yes", ["abnormal brain"]),
        ("Is the lung not healthy?", "No", []),
        ("Does this image look normal?", "Yes", []),
        ("Which organ is abnormal, heart or lung?", "Lung", []),
        ("What diseases are included in the picture?", "Brain Tumor, Brain Edema",
         ["brain tumor", "brain edema"]),
        ("What diseases are included in the picture?", "None", ["no finding"]),
        ("What is the main organ in the image?", "Lung, Heart", ["lung", "heart"]),
        ("What is the organ on the top of the body in this image?", "Heart and Liver",
         ["heart", "liver"]),
        ("What organ is the black part on the left of the image?", "Right Lung.", ["right lung"]),
        ("Which organ system is imaged?", "Chest", []),
        ("Where is the liver?", "Upper  Left", ["liver upper left"]),
        ("Where is the liver?", "Not seen", []),
        ("Where is/are the mass in the lung located?", "Left Lung", ["mass left lung"]),
        ("Where is/are the abnormality located?", "Center", []),
        ("What is the scanning plane of this image?", "Transverse  Plane", ["transverse plane"]),
        ("Is this a transverse plane?", "Yes", []),
        ("What is the mr weighting in this image?", "T2", ["t2 weighted"]),
        ("What is the effect of the main organ?", "Breathe", []),
        ("How many kidneys in this image?", "0", []),
        ("What is the largest organ in the picture?", "", []),
    ],
)  # fmt: skip
def test_what_a_question_says(question: str, answer: str, phrases: list[str]) -> None:
    assert list(facts(question, answer)) == phrases


@given(st.text(), st.text())
def test_any_text_gives_tidy_phrases(question: str, answer: str) -> None:
    for phrase in facts(question, answer):
        assert phrase.strip() == phrase != ""


def example(image: str, question: str, answer: str, **fields: str | None) -> Example:
    known = {"modality": "ct", "body": "Chest_lung", "source": "slake", "content": None} | fields
    return Example(
        id="",
        image=Path(image),
        question=question,
        answer=answer,
        answer_type="OPEN",
        modality=known["modality"],
        body=known["body"],
        content=known["content"],
        source=known["source"] or "",
    )


def test_the_facts_of_an_image_become_one_caption() -> None:
    captions = fact_captions(
        [
            example("a.jpg", "Does the picture contain lung?", "Yes"),
            example("b.jpg", "Is/Are there a mass?", "Yes", modality=None, body="head"),
            example("a.jpg", "What is the largest organ in the picture?", "Lung"),
            example("a.jpg", "Is the lung healthy?", "No"),
            example("c.jpg", "Why?", "So", modality=None, body=None),
        ]
    )
    assert captions == [
        Captioned(Path("a.jpg"), ("chest ct", "lung", "abnormal lung"), "ct", "slake"),
        Captioned(Path("b.jpg"), ("head", "mass"), None, "slake"),
    ]
    assert captions[0].caption == "chest ct, lung, abnormal lung"


def test_labels_become_captions() -> None:
    label = LabelledImage(Path("a"), "xray", "chest", "No Finding", "covid_cxr", "train")
    assert label_captions([label]) == [
        Captioned(Path("a"), ("chest x-ray", "no finding"), "xray", "covid_cxr")
    ]


def test_the_real_files(data_dir: Path) -> None:
    labelled = read_labels(data_dir / "labels.jsonl")
    for split, labels, distinct in (("train", 1789, 19), ("val", 352, 19)):
        captions = label_captions(item for item in labelled if item.split == split)
        assert len(captions) == labels
        assert len({caption.caption for caption in captions}) == distinct

    counts = {}
    for split in ("train", "val"):
        captions = fact_captions(read_examples(data_dir / f"vqa_{split}.jsonl"))
        assert len({caption.image for caption in captions}) == len(captions)
        for source in ("slake", "vqa_rad"):
            own = [caption for caption in captions if caption.source == source]
            # SLAKE's are told apart well enough for retrieval
            counts[split, source] = len(own), len({caption.caption for caption in own})
            assert all((caption.modality is None) == (source == "vqa_rad") for caption in own)
    assert {key: images for key, (images, _) in counts.items()} == {
        ("train", "slake"): 450,
        ("train", "vqa_rad"): 282,
        ("val", "slake"): 96,
        ("val", "vqa_rad"): 32,
    }
    assert counts["val", "slake"][1] >= 80
