"""What a person may have meant by a word that is none of ours, and what a shell completes.

The nearest by meaning goes before the nearest by letters: who types `quantize` wants `export`, not
`inspect`. Only what exists is ever proposed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medmoe_edge.embedded import EMBEDDED
from medmoe_edge.errors import did_you_mean

VERBS: Mapping[str, str] = {
    "ask": "answer query question predict infer inference generate chat run vqa describe caption",
    "classify": "label detect diagnose triage zero-shot",
    "locate": "segment ground heatmap explain attention saliency find-in where",
    "index": "embed archive catalogue catalog",
    "retrieve": "search find similar lookup",
    "export": "quantize quantise convert compile compress onnx tensorrt build "
    "optimize optimise pack",
    "calibrate": "calibration statistics stats observe",
    "init": "new create random scaffold start",
    "train": "fit finetune fine-tune learn tune resume",
    "data": "dataset prepare import preprocess",
    "pull": "download fetch get clone",
    "router": "route routing gate",
    "verify": "test check validate compare fidelity",
    "prove": "proof certify",
    "eval": "evaluate score metrics accuracy measure assess",
    "bench": "benchmark time speed profile perf latency throughput",
    "inspect": "info show summary summarise summarize details list tree",
    "doctor": "diagnostics devices env environment status health version",
    "plan": "estimate predict-memory fits size requirements memory",
    "serve": "server http api rest web deploy openai",
    "listen": "dicom node pacs scp receive",
    "batch": "bulk many folder csv parquet",
    "audit": "anonymize anonymise deidentify de-identify log",
}
OPTIONS: Mapping[str, str] = {
    "--int8": "--quantize --quantise --8bit --w8a8 --precision --bits --dtype",
    "--int4": "--4bit --w4a16 --nf4 --q4",
    "--fp32": "--float32 --full --no-quantize --no-quantise",
    "--mixed": "--bits --budget-bits --bpw --average-bits",
    "--output": "--out --out-dir --outdir --output-dir --dest --save --to --file --target-dir",
    "--data": "--dataset --questions --data-dir --test --val --input --images --source",
    "--calibrate": "--calibration --calib --data --dataset --images --calibration-data",
    "--against": "--checkpoint --reference --original --baseline --source",
    "--beside": "--compare --other --baseline",
    "--references": "--gt --ground-truth --truth --answers --reference",
    "--predictions": "--pred --preds --answers --save-predictions --output --out",
    "--model": "--bundle --checkpoint --name --weights --path",
    "--runtime": "--backend --engine --provider --ep --execution-provider",
    "--device": "--gpu --cuda --cpu --accelerator --where --hardware",
    "--gpu": "--device --arch --sm --card",
    "--max-new-tokens": "--max-tokens --max-length --length --tokens --limit",
    "--frame": "--slice --page --index --layer",
    "--memory-budget": "--memory --ram --vram --max-memory --budget --mem --offload",
    "--samples": "--num-samples --n --count --limit",
    "--limit": "--num --n --count --samples --max-samples --first",
    "--blind": "--no-image --text-only --black --without-image",
    "--force": "--overwrite --yes --replace --clobber -f -y",
    "--json": "--format --as-json --output-format --machine",
    "--quiet": "--silent --no-progress -s",
    "--verbose": "--debug --log-level --trace",
    "--show": "--preview --save-image --picture",
    "--explain": "--heatmap --attention --why --locate",
    "--target": "--format --platform --backend",
    "--precision": "--int8 --int4 --bits --dtype --quantize",
    "--port": "-p --listen",
    "--host": "--bind --address --ip",
    "--token-file": "--token --api-key --auth --password",
    "-k": "--top-k --top --count --n --limit",
}
NO_VERB = re.compile(r"No such command '([^']*)'")
NO_OPTION = re.compile(r"No such option:? '?(-[^\s']*)")
NO_CHOICE = re.compile(r"'([^']*)' is not one of (.*)\.")


def explained(message: str, context: Any) -> str:
    """A usage error's message, with what was meant, where that can be told.

    Args:
        message: As typer words it.
        context: The command's, or None.
    """
    command = getattr(context, "command", None)
    if found := NO_VERB.search(message):
        known = list(getattr(command, "commands", {}))
        return f"There is no verb {found[1]!r}." + _proposal(found[1], known, VERBS)
    if found := NO_OPTION.search(message):
        known = [name for parameter in getattr(command, "params", ()) for name in parameter.opts]
        known = [name for name in known if name.startswith("-")]
        return f"No such option: {found[1]}." + _proposal(found[1], known, OPTIONS)
    if found := NO_CHOICE.search(message):
        choices = re.findall(r"'([^']*)'", found[2])
        return message + _proposal(found[1], choices, {})
    return message


def _proposal(word: str, known: Iterable[str], meanings: Mapping[str, str]) -> str:
    names = list(known)
    meant = [name for name in names if word.lower() in meanings.get(name, "").split()]
    if meant:
        return f" Did you mean {meant[0]!r}?"
    hint = did_you_mean(word, names).rstrip()
    return f" {hint}" if hint else ""


# --- completion ---------------------------------------------------------------------------------


def complete_models(incomplete: str) -> list[str]:
    """Embedded models, and folders."""
    return [*_starting(EMBEDDED, incomplete), *_folders(incomplete)]


def complete_presets(incomplete: str) -> list[str]:
    """Presets of both families."""
    from medmoe_edge.presets import MODALITY_PRESETS, PRESETS

    return _starting((*PRESETS, *MODALITY_PRESETS), incomplete)


def complete_planned(incomplete: str) -> list[str]:
    """What can be planned: models and presets."""
    return list(dict.fromkeys([*complete_models(incomplete), *complete_presets(incomplete)]))


def complete_devices(incomplete: str) -> list[str]:
    """Devices that are known by name."""
    from medmoe_edge.device.hardware import DEVICES, HERE

    return _starting((*DEVICES, HERE), incomplete)


def complete_gpus(incomplete: str) -> list[str]:
    """GPUs that engines are built for."""
    from medmoe_edge.export.gpus import GPUS

    return _starting(GPUS, incomplete)


def complete_data(incomplete: str) -> list[str]:
    """The set that is named, and files."""
    paths = Path().glob(f"{incomplete}*") if incomplete[:1] != "/" else ()
    return [*_starting(("builtin",), incomplete), *map(str, paths)]


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _folders(incomplete: str) -> Iterator[str]:
    parent, _, start = incomplete.rpartition("/")
    base = Path(f"{parent}/" if parent or incomplete.startswith("/") else ".")
    if not base.is_dir():
        return
    for path in sorted(base.iterdir()):
        if path.name.startswith(start) and not path.name.startswith(".") and path.is_dir():
            yield f"{parent}/{path.name}" if "/" in incomplete else path.name
