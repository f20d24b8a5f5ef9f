"""Zero-shot tasks: the findings of one kind of image, told apart by their names alone."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medmoe_edge.data.captions import label_captions
from medmoe_edge.data.datasets import LabelledImage


@dataclass(frozen=True)
class Task:
    """`images`, each with one of `findings`; a finding's `prompts` are what it may be called."""

    name: str
    findings: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    images: tuple[LabelledImage, ...]

    @property
    def texts(self) -> list[str]:
        """All prompts, finding by finding."""
        return [prompt for prompts in self.prompts for prompt in prompts]

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """The index of each image's finding `[N]`."""
        return np.array([self.findings.index(image.finding) for image in self.images])


def zero_shot_tasks(labelled: Iterable[LabelledImage]) -> list[Task]:
    """One task for each modality and body part that has more than one finding, in order.

    A finding goes by its own name and by that behind the kind of image, as in captions.
    """
    groups: dict[str, list[LabelledImage]] = {}
    for image in labelled:
        groups.setdefault(_view(image), []).append(image)
    tasks = []
    for view, images in groups.items():
        findings = tuple(sorted({image.finding for image in images}))
        prompts = tuple((finding, f"{view}, {finding}") for finding in findings)
        if len(findings) > 1:
            tasks.append(Task(view, findings, prompts, tuple(images)))
    return tasks


def best_prompts(similarities: npt.NDArray[np.float32], task: Task) -> npt.NDArray[np.float32]:
    """Each finding's best prompt: `[N, findings]` from `[N, prompts]`, of its `texts`."""
    counts = [len(prompts) for prompts in task.prompts]
    parts = np.split(similarities, np.cumsum(counts)[:-1], axis=1)
    return np.stack([part.max(1) for part in parts], 1)


def _view(image: LabelledImage) -> str:
    return label_captions([image])[0].phrases[0]
