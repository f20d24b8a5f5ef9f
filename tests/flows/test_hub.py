"""`pull` against a stand-in for the Hub on this machine."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT, Run, two_lines
from hub_server import Hub, answering, serving

import medmoe_edge
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.checkpoint.hub import PullOptions, pull
from medmoe_edge.checkpoint.published import PUBLISHED, Pulled
from medmoe_edge.errors import CheckpointError, InputError, MedMoEError, ResourceError

Make = Callable[..., Path]
pytest.importorskip("huggingface_hub", reason="needs the extra hub")
REPOSITORY, FOLDER = "JsST/Med-MoE", "stage3/llavastablelm-1.6b-medmoe"
NAME = "med-moe-stablelm-1.6b"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """All other tests are kept from the network; these ask this machine alone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def hub(tiny_checkpoint: Make) -> Iterator[Hub]:
    """Serves a tiny checkpoint as the authors published theirs, with a pickle and code beside."""
    files = {
        f"{FOLDER}/{path.name}": path.read_bytes()
        for path in sorted(tiny_checkpoint().iterdir())
        if path.is_file()
    }
    files["README.md"] = b"---\nlicense: other\n---\n# Med-MoE\n"
    for name in ("pytorch_model.bin", "training_args.pt", "modeling.py"):
        files[f"{FOLDER}/{name}"] = b"cos\nsystem\n(S'false'\ntR." * 99
    files["stage2/x/config.json"] = b"{}"
    with serving(Hub(REPOSITORY, files)) as hub:
        yield hub


@pytest.fixture
def options(hub: Hub, tmp_path: Path) -> PullOptions:
    return PullOptions(endpoint=hub.url, cache=tmp_path / "cache")


def weights_of(hub: Hub) -> str:
    return next(name for name in hub.files if name.endswith(".safetensors"))


def test_a_published_name_becomes_a_checkpoint_and_a_bundle_that_says_so(
    hub: Hub, options: PullOptions, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    pulled = pull(NAME, tmp_path / "out", options, progress=lambda *step: told.append(step))
    kept = {file.name for file in (tmp_path / "out").iterdir()}
    assert kept == {*pulled.files, "pulled.json"}
    assert {"config.json", "tokenizer.json", "README.md"} < kept
    assert not any(name.endswith((".bin", ".pt", ".py")) for name in kept)
    asked = {name for name, _ in hub.asked}
    assert not any(name.endswith((".bin", ".pt", ".py")) for name in asked)
    for name, entry in pulled.files.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert content == hub.files.get(f"{FOLDER}/{name}", hub.files["README.md"])
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert told[-1][1] == told[-1][2] == sum(entry["bytes"] for entry in pulled.files.values())
    assert pulled == Pulled.of(tmp_path / "out")
    assert pulled.commit == hub.commit

    medmoe_edge.export_model(tmp_path / "out", tmp_path / "bundle")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    source = manifest["source"]["published"]
    assert (source["repository"], source["path"]) == (REPOSITORY, FOLDER)
    assert (source["commit"], source["revision"]) == (hub.commit, "main")
    assert source["changed"] == []
    assert source["files"]["config.json"] == pulled.files["config.json"]["sha256"]
    assert manifest["licence"] == "other"

    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text() + "\n")
    (tmp_path / "out" / "README.md").unlink()
    medmoe_edge.export_model(tmp_path / "out", tmp_path / "edited")
    source = Bundle.open(tmp_path / "edited").manifest["source"]["published"]
    assert source["changed"] == ["README.md", "config.json"]


def test_a_killed_download_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    """Killed with SIGKILL in the middle of the weights; the next process asks for the rest only.

    The library writes 10 MiB at a time, so that the weights have more.
    """
    large = f"{FOLDER}/a.safetensors"
    hub.files[large] = np.random.default_rng(0).bytes(15 * 2**20)
    hub.broken[large] = 12 * 2**20
    command = [sys.executable, str(ROOT / "cli.py"), "pull", NAME, "-o", "out"]
    environment = {
        **os.environ,
        **{"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")},
        "PYTHONPATH": str(ROOT),
    }
    begun, deadline = 0, time.monotonic() + 60
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        while begun < 10 * 2**20 and time.monotonic() < deadline and process.poll() is None:
            parts = (tmp_path / ".out.pull").glob("a.safetensors.*.part")
            begun = max((part.stat().st_size for part in parts), default=0)
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert begun == 10 * 2**20
    assert not (tmp_path / "out").exists()
    hub.pause.set()
    done = subprocess.run(
        [*command, "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == hub.commit
    assert [start for name, start in hub.asked if name == large] == [0, begun]
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == hub.files[large]
    assert not list(tmp_path.glob(".out*"))


def test_a_file_that_is_not_what_is_listed_is_refused_and_fetched_again(
    hub: Hub, options: PullOptions, tmp_path: Path
) -> None:
    for name in (f"{FOLDER}/config.json", weights_of(hub)):
        listed = hub.files[name]
        hub.replaced[name] = listed[:-1] + b"!"
        with pytest.raises(CheckpointError, match=f"{name} of .* is not what the Hub lists"):
            pull(NAME, tmp_path / "out", options)
        assert not (tmp_path / "out").exists()
        del hub.replaced[name]
    pull(NAME, tmp_path / "out", options)
    before = len(hub.asked)
    with pytest.raises(InputError, match="exists already"):
        pull(NAME, tmp_path / "out", options)
    assert len(hub.asked) == before
    pull(NAME, tmp_path / "out", dataclasses.replace(options, force=True))
    assert len(hub.asked) > before


def test_too_little_room_is_told_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    options = PullOptions(endpoint=hub.url, cache=tmp_path, free_space=lambda _: 10_000)
    with pytest.raises(ResourceError, match=r"takes 0\.00 GB more, and 0\.00 GB are free in"):
        pull(NAME, tmp_path / "out", options)
    assert hub.asked == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_told_with_what_is(
    hub: Hub, options: PullOptions, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no published model 'med-moe'") as found:
        pull("med-moe", out, options)
    assert all(name in found.value.remedy for name in PUBLISHED)
    with pytest.raises(InputError, match="has no repository who/what"):
        pull("who/what", out, options)
    revision = PullOptions("v9", endpoint=hub.url, cache=tmp_path)
    with pytest.raises(InputError, match="has no revision 'v9'") as found:
        pull(NAME, out, revision)
    assert "one of: main, v1" in found.value.remedy
    with pytest.raises(InputError, match="holds neither config") as found:
        pull(f"{REPOSITORY}/stage3", out, options)
    assert f"{REPOSITORY}/{FOLDER}" in found.value.remedy
    assert not out.exists()


def test_pickles_alone_are_not_fetched(hub: Hub, options: PullOptions, tmp_path: Path) -> None:
    for name in [name for name in hub.files if name.endswith(".safetensors")]:
        del hub.files[name]
    with pytest.raises(CheckpointError, match=r"only as pytorch_model\.bin, training_args\.pt"):
        pull(NAME, tmp_path / "out", options)
    assert hub.asked == []


def test_without_a_network_the_cache_serves_or_two_lines_say_what_to_do(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    cache = tmp_path / "cache"
    away = PullOptions(endpoint=nobody, cache=cache)
    with pytest.raises(ResourceError, match="cannot be reached") as found:
        pull(NAME, tmp_path / "out", away)
    assert "HF_ENDPOINT" in found.value.remedy

    huggingface_hub.snapshot_download(
        REPOSITORY, endpoint=hub.url, cache_dir=cache, allow_patterns=[f"{FOLDER}/*"]
    )
    hub.asked.clear()
    assert pull(NAME, tmp_path / "out", away).commit == hub.commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pulled = pull(NAME, tmp_path / "again", PullOptions(endpoint=hub.url, cache=cache))
    assert pulled.files == Pulled.of(tmp_path / "out").files  # type: ignore[union-attr]
    assert hub.asked == []
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE is set"):
        pull("who/what", tmp_path / "other", PullOptions(cache=cache))
    weights = next(cache.rglob("*.safetensors"))
    weights.resolve().write_bytes(b"other")
    with pytest.raises((CheckpointError, ResourceError)):
        pull(NAME, tmp_path / "third", PullOptions(cache=cache))


def test_an_incomplete_upload_is_refused_before_its_weights_are_fetched(
    hub: Hub, options: PullOptions, tmp_path: Path
) -> None:
    weights = weights_of(hub)
    del hub.files[weights]
    hub.files[f"{FOLDER}/other.safetensors"] = b"x"
    with pytest.raises(CheckpointError, match=f"lacks {Path(weights).name}, which its"):
        pull(NAME, tmp_path / "out", options)
    assert not any(name.endswith(".safetensors") for name, _ in hub.asked)


def test_a_cache_that_holds_a_part_does_not_serve(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    hub.files[f"{FOLDER}/b.safetensors"] = b"x"
    huggingface_hub.snapshot_download(
        REPOSITORY,
        endpoint=hub.url,
        cache_dir=cache,
        allow_patterns=[f"{FOLDER}/*"],
        ignore_patterns=[weights_of(hub)],
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="not whole in the cache"):
        pull(NAME, tmp_path / "out", PullOptions(endpoint=hub.url, cache=cache))


def test_two_pulls_do_not_write_one_folder(hub: Hub, options: PullOptions, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".out.pull.lock"), pytest.raises(ResourceError, match="another pull"):
        pull(NAME, tmp_path / "out", options)
    pull(NAME, tmp_path / "out", options)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("status", "body", "what"),
    [
        (200, b"<html>log in</html>", "does not answer as the Hub does"),
        (200, b"[]", "does not answer as the Hub does"),
        (503, b"", "answered with status 503"),
        (401, b"", "does not show JsST/Med-MoE to you"),
    ],
)
def test_what_is_no_hub_is_told(status: int, body: bytes, what: str, tmp_path: Path) -> None:
    with answering(status, body) as url, pytest.raises(MedMoEError, match=what) as found:
        pull(NAME, tmp_path / "out", PullOptions(endpoint=url, cache=tmp_path / "cache"))
    assert found.value.remedy


def test_what_the_cache_has_is_not_fetched_again(
    hub: Hub, options: PullOptions, tmp_path: Path
) -> None:
    import huggingface_hub

    weights = weights_of(hub)
    huggingface_hub.hf_hub_download(REPOSITORY, weights, endpoint=hub.url, cache_dir=options.cache)
    hub.asked.clear()
    pull(NAME, tmp_path / "out", options)
    assert weights not in {name for name, _ in hub.asked}


def test_a_bundle_is_pulled_with_its_card(
    hub: Hub, options: PullOptions, tmp_path: Path, tiny_bundle: Make
) -> None:
    folder = tiny_bundle()
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.files["README.md"] = b"# A card"
    pull(REPOSITORY, tmp_path / "bundle", options)
    assert Bundle.open(tmp_path / "bundle").name == "tiny"
    assert (tmp_path / "bundle" / "README.md").read_bytes() == b"# A card"
    hub.files["embedding.npy"] += b"x"
    with pytest.raises(CheckpointError, match=r"a bundle whose embedding\.npy is missing or"):
        pull(REPOSITORY, tmp_path / "other", options)


def test_the_verb(hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # as HF_ENDPOINT at the start of a process
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    listed = run("pull", NAME, "--dry-run", "--json")
    assert listed.exit_code == 0, listed.stderr
    found = json.loads(listed.stdout)
    assert found["bytes"] == sum(found["files"].values()) > 0
    assert hub.asked == []
    assert "GB in all" in run("pull", NAME, "--dry-run").stdout
    done = run("pull", NAME)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"of {REPOSITORY}/{FOLDER} (commit c0ffee" in done.stdout
    assert (tmp_path / NAME / "pulled.json").exists()
    again = run("pull", NAME)
    assert again.exit_code == 2
    assert two_lines(again)[0] == f"{NAME} exists already."
    shutil.rmtree(tmp_path / NAME)
    wrong = run("pull", "nothing")
    assert wrong.exit_code == 2


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "pulled.json").write_text('{"files": {"a": 1}}')
    with pytest.raises(CheckpointError, match="damaged"):
        Pulled.of(tmp_path)
    assert Pulled.of(tmp_path / "none") is None


def test_published_names_are_those_of_presets() -> None:
    from medmoe_edge.presets import PRESETS

    assert set(PUBLISHED) <= set(PRESETS)
