"""Bundles and checkpoints as Hugging Face users expect models: from_pretrained, pipeline, Hub.

    model = MedMoEForVisualQuestionAnswering.from_pretrained("nano")
    pipe = transformers.pipeline(
        "visual-question-answering", model=model, config=model.config,
        pipeline_class=VisualQuestionAnsweringPipeline)
    pipe("scan.png", "Is there effusion?")

transformers 5 removed its own `visual-question-answering` pipeline, and keeps the name only for
models that bring a pipeline: ours does, so that `config` and `pipeline_class` must be named, or
`model.pipeline()` called. What answers is the engine: ONNX Runtime on a bundle, torch on a
checkpoint, the same answers as `medmoe_edge.load(...).ask(...)`. Needs the extra `optimum`.
"""

import glob
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from medmoe_edge.atomic import atomic_folder, check_apart
from medmoe_edge.bundle.bundle import MANIFEST, NOTICE, Bundle
from medmoe_edge.checkpoint.hub import PullOptions, find_files, pull
from medmoe_edge.checkpoint.published import (
    CARD,
    CONFIG,
    PICKLES,
    RECORD,
    Pulled,
    find_published,
)
from medmoe_edge.config import Device, RuntimeName
from medmoe_edge.embedded import EMBEDDED, bundle_path, checkpoint_path
from medmoe_edge.engine.answer import Answer
from medmoe_edge.engine.engine import MAX_NEW_TOKENS, Engine, load
from medmoe_edge.errors import InputError, ResourceError, needs
from medmoe_edge.image.inputs import as_image

with needs("optimum"):
    import platformdirs
    import torch
    from huggingface_hub import CommitOperationAdd, HfApi
    from transformers import Pipeline, PretrainedConfig

TASK = "visual-question-answering"
# transformers types its pipelines for its own models, which ours is not.
_Pipeline: Any = Pipeline


class MedMoEConfig(PretrainedConfig):  # type: ignore[no-untyped-call]  # transformers' own hook
    """What transformers asks of a configuration; `medmoe` is the model's own, as JSON."""

    model_type = "medmoe_edge"

    def __init__(self, medmoe: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.medmoe = dict(medmoe or {})
        # With these, and a class of its own, a pipeline may have a task that transformers dropped.
        self.custom_pipelines = {
            TASK: {"impl": VisualQuestionAnsweringPipeline.__qualname__, "pt": ()}
        }


class MedMoEForVisualQuestionAnswering:
    """A loaded bundle or checkpoint, as transformers knows a model.

    Attributes:
        engine: What answers.
        folder: Its files.
        name_or_path: The same as text.
        config: Its configuration, as transformers knows one.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.name_or_path = str(folder)
        self.config = MedMoEConfig(engine.config.to_json(), name_or_path=str(folder))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str = "main",
        cache_dir: str | os.PathLike[str] | None = None,
        runtime: RuntimeName = "auto",
        device: Device = "auto",
        memory_budget: str | None = None,
    ) -> Self:
        """Load a model by its folder or its name.

        Args:
            name_or_path: A folder, an embedded model, a name that `medmoe-edge pull` knows, or
                OWNER/REPOSITORY[/FOLDER] of the Hub.
            revision: Of a model on the Hub: a branch, a tag or a commit.
            cache_dir: Where such a model is kept; the user's cache by default.
            runtime: As of `medmoe_edge.load`.
            device: As of `medmoe_edge.load`.
            memory_budget: As of `medmoe_edge.load`.

        Returns:
            The loaded model.

        Raises:
            MedMoEError: As `pull` and `medmoe_edge.load` raise.
        """
        name = os.fspath(name_or_path)
        if name in EMBEDDED or Path(name).is_dir():
            folder = checkpoint_path(name) if runtime == "torch" else bundle_path(name)
        else:
            folder = _fetched(name, revision, cache_dir)
        engine = load(folder, runtime=runtime, device=device, memory_budget=memory_budget)
        return cls(engine, folder)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        force: bool = False,
        **options: Any,
    ) -> Path:
        """Copy the model's files, with a model card, into a folder; it appears whole or not at all.

        Args:
            save_directory: The folder; an existing one is refused.
            push_to_hub: Push the folder, too; `options` as of `push_to_hub`.
            repo_id: OWNER/REPOSITORY to push to; its name by default.
            force: Replace a model that stands there.
            options: Of `push_to_hub`.

        Returns:
            The folder.

        Raises:
            InputError: It exists and may not be replaced.
            ResourceError: The disk does not take it.
        """
        out = Path(save_directory)
        marker = MANIFEST if (self.folder / MANIFEST).exists() else CONFIG
        check_apart(out, self.folder)
        with atomic_folder(out, force=force, marker=marker) as staging:
            for path in filter(_is_shared, self.folder.iterdir()):
                shutil.copyfile(path, staging / path.name)
            if not (staging / CARD).exists():
                (staging / CARD).write_text(self.card(), encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or out.name, **options)
        return out

    def push_to_hub(
        self,
        repo_id: str,
        *,
        path_in_repo: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        endpoint: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the model with its card to a repository of the Hub, which is made if need be.

        Args:
            repo_id: OWNER/REPOSITORY.
            path_in_repo: A folder in it; its root by default.
            revision: The branch to commit to.
            private: Of a new repository: who may see it.
            commit_message: Of the commit.
            endpoint: The Hub's address; `HF_ENDPOINT` by default.
            token: Of your account; the one you are logged in with by default.

        Returns:
            The commit, which `from_pretrained(revision=...)` takes.
        """
        api = HfApi(endpoint=endpoint, token=token, library_name="medmoe-edge")
        api.create_repo(repo_id, private=private, exist_ok=True)
        files: dict[str, Path | bytes] = {CARD: self.card().encode()}
        files |= {path.name: path for path in self.folder.iterdir() if _is_shared(path)}
        done = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(f"{path_in_repo}/{name}" if path_in_repo else name, content)
                for name, content in sorted(files.items())
            ],
            commit_message=commit_message or f"Upload {self.engine.name}",
            revision=revision,
        )
        return str(done.oid)

    def card(self) -> str:
        """Write a model card.

        Returns:
            Markdown: what the folder holds, how it was verified, what it is for.
        """
        lines = [
            "---",
            "library_name: medmoe-edge",
            f"pipeline_tag: {TASK}",
            "tags: [medical, mixture-of-experts, research-only]",
            "---",
            f"# {self.engine.name}",
            "",
            NOTICE,
        ]
        if (self.folder / MANIFEST).exists():
            bundle = Bundle.open(self.folder, verify=False)
            stored = bundle.manifest["quantisation"]
            licence = bundle.manifest["licence"]
            lines.insert(1, "license: other" if " " in str(licence) else f"license: {licence}")
            lines += [
                "",
                f"A bundle of medmoe-edge for {bundle.target}; decoder: {stored['decoder']}.",
                f"Fidelity to its checkpoint: {bundle.proof}. Licence of the weights: {licence}.",
            ]
        lines += [
            "",
            "```python",
            "import medmoe_edge",
            "",
            'print(medmoe_edge.load("FOLDER").ask("scan.png", "Is there effusion?").text)',
            "```",
            "",
        ]
        return "\n".join(lines)

    def pipeline(self, **options: Any) -> "VisualQuestionAnsweringPipeline":
        """Put this model into a transformers pipeline.

        Args:
            options: As of a call of the pipeline.

        Returns:
            The pipeline for visual question answering.
        """
        return VisualQuestionAnsweringPipeline(model=self, task=TASK, device=-1, **options)

    # What `transformers.Pipeline` asks of a model.

    @property
    def device(self) -> torch.device:
        """Where transformers would put tensors: they never leave the host before the engine."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in: pictures of 8 bits."""
        return torch.uint8

    input_modalities = ("image", "text")
    output_modalities = ("text",)

    def to(self, device: object) -> Self:
        """The engine chose its device when it was loaded: `from_pretrained(device=...)`."""
        return self

    def eval(self) -> Self:
        """It answers only."""
        return self

    def can_generate(self) -> bool:
        """Not through transformers' own loop: the engine decodes."""
        return False


class VisualQuestionAnsweringPipeline(_Pipeline):  # type: ignore[misc]  # see _Pipeline
    """Takes an image and a question, or dicts of both, one or many; yields answers with scores.

    The form is that of the pipeline that transformers had: a list of `{"answer", "score"}` for each
    input. `score` is the model's own probability of the answer; `modality` and `warnings` are told
    besides.
    """

    _load_processor = _load_image_processor = _load_tokenizer = False
    _load_feature_extractor = _load_video_processor = False

    def __call__(
        self, image: Any, question: str | Sequence[str] | None = None, **options: Any
    ) -> Any:
        """Answer a question about an image; or each of several dicts `{"image", "question"}`.

        Args:
            image: Any that `ask` takes; or a dict, a list of dicts, a generator.
            question: With an image alone; a list of questions about it is taken too.
            options: `max_new_tokens`, and `frame` of a file with several.

        Returns:
            A list with one answer; for several inputs a list of such lists.
        """
        if question is None:
            return super().__call__(image, **options)
        if isinstance(question, str):
            return super().__call__({"image": image, "question": question}, **options)
        return super().__call__(
            [{"image": image, "question": each} for each in question], **options
        )

    def _sanitize_parameters(
        self, max_new_tokens: int | None = None, frame: int | None = None, **others: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if others:
            raise InputError(
                f"The pipeline has no option {min(others)!r}.", "Use max_new_tokens or frame."
            )
        before = {} if frame is None else {"frame": frame}
        during = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        return before, during, {}

    def preprocess(self, inputs: Any, frame: int | None = None) -> dict[str, Any]:
        """The picture is read here, so that a damaged file fails before the model runs."""
        try:
            image, question = inputs["image"], inputs["question"]
        except (KeyError, TypeError) as error:
            raise InputError(
                "An input of the pipeline has no image or no question.",
                'Give {"image": FILE, "question": TEXT}.',
            ) from error
        return {"image": as_image(image, frame=frame), "question": question}

    def _forward(self, inputs: Any, max_new_tokens: int = MAX_NEW_TOKENS) -> dict[str, Answer]:
        engine: Engine = self.model.engine
        asked = engine.ask(inputs["image"], inputs["question"], max_new_tokens=max_new_tokens)
        return {"answer": asked}

    def postprocess(self, outputs: Any) -> list[dict[str, Any]]:
        """One answer in the form that transformers' pipeline had."""
        answer: Answer = outputs["answer"]
        return [
            {
                "answer": answer.text,
                "score": answer.confidence,
                "modality": answer.modality,
                "warnings": [notice.message for notice in answer.warnings],
                "unsure": answer.unsure,
                "stopped": answer.stopped,
            }
        ]


def _is_shared(path: Path) -> bool:
    """Whether a file goes where the model goes: no pickle, no code, no record of our own pulls."""
    hidden = path.name.startswith(".") or path.name == RECORD
    return path.is_file() and not hidden and not path.name.endswith((*PICKLES, ".py"))


def _fetched(name: str, revision: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """A model of the Hub in the cache, by its commit; fetched where that is not there yet.

    Without a network the commit that the revision was last is taken.
    """
    root = Path(cache_dir) if cache_dir else platformdirs.user_cache_path("medmoe-edge") / "hub"
    known = f"{name.replace('/', '--')}@"
    options = PullOptions(revision=revision)
    try:
        commit = find_files(find_published(name), options).commit
    except ResourceError:
        kept = [Pulled.of(folder) for folder in root.glob(f"{glob.escape(known)}*")]
        there = [each for each in kept if each and revision in (each.revision, each.commit)]
        if not there:
            raise
        return max(there, key=lambda each: (each.folder / RECORD).stat().st_mtime).folder
    folder = root / f"{known}{commit}"
    if Pulled.of(folder) is None:
        root.mkdir(parents=True, exist_ok=True)
        pull(name, folder, options)
    return folder
