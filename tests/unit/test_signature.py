"""Signed bundles: what a signature covers, who checks it, and what is refused without one."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import medmoe_edge
from medmoe_edge.bundle import trust
from medmoe_edge.bundle.bundle import MANIFEST, Bundle, sign_bundle, write_verification
from medmoe_edge.bundle.trust import SIGNATURE, TRUSTED_KEYS, read_private_key
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import BundleError, InputError, MissingDependencyError, VerificationError
from medmoe_edge.evaluation.inspection import inspect_modality
from medmoe_edge.pipeline import VerifyOptions

PKCS8 = serialization.PrivateFormat.PKCS8
PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Files of a new private key and its public key."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.touch(0o600)
    private.write_bytes(key.private_bytes(PEM, PKCS8, PLAIN))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(PEM, info))
    return private, public


@pytest.fixture
def keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Callable[..., Path]
) -> tuple[Path, Path]:
    """A key pair whose public half is trusted."""
    private, public = key_pair(tmp_path, "ward")
    monkeypatch.setenv(TRUSTED_KEYS, str(public))
    return private, public


SPACES = itertools.count(1)


def as_by_another(bundle: Path) -> Path:
    """The manifest with the same content in other bytes: this process has not seen these."""
    with (bundle / MANIFEST).open("a") as file:
        file.write(" " * next(SPACES))
    return bundle


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return as_by_another(shutil.copytree(tiny_bundle(), tmp_path / "bundle"))


def test_a_signed_bundle_opens(keys: tuple[Path, Path], bundle: Path) -> None:
    with pytest.raises(BundleError, match="is not signed"):
        Bundle.open(bundle)
    sign_bundle(bundle, keys[0])
    assert Bundle.open(bundle).name == "tiny"


def test_openssl_agrees(keys: tuple[Path, Path], bundle: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    sign_bundle(bundle, keys[0])
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys[1]), "-rawin"]
    files = ["-in", str(bundle / MANIFEST), "-sigfile", str(bundle / SIGNATURE)]
    assert subprocess.run([*check, *files], capture_output=True, check=False).returncode == 0
    made = ["openssl", "pkeyutl", "-sign", "-inkey", str(keys[0]), "-rawin"]
    theirs = [*made, "-in", str(bundle / MANIFEST), "-out", str(bundle / SIGNATURE)]
    subprocess.run(theirs, capture_output=True, check=True)
    assert Bundle.open(bundle).name == "tiny"


def test_another_key_is_refused_until_it_is_trusted(
    keys: tuple[Path, Path], bundle: Path, tmp_path: Path
) -> None:
    other, other_public = key_pair(tmp_path, "other")
    sign_bundle(bundle, other)
    with pytest.raises(BundleError, match="no trusted key"):
        Bundle.open(bundle)
    keys[1].write_bytes(keys[1].read_bytes() + other_public.read_bytes())  # while keys change
    assert Bundle.open(bundle).name == "tiny"


@pytest.mark.parametrize("damage", [b"", b"x" * 64, b"short"])
def test_a_wrong_signature_is_refused(keys: tuple[Path, Path], bundle: Path, damage: bytes) -> None:
    sign_bundle(bundle, keys[0])
    (bundle / SIGNATURE).write_bytes(damage)
    with pytest.raises(BundleError, match="no trusted key"):
        Bundle.open(bundle)


def test_the_signature_covers_every_file(keys: tuple[Path, Path], bundle: Path) -> None:
    sign_bundle(bundle, keys[0])
    names = {path.name for path in bundle.iterdir()} - {MANIFEST, SIGNATURE}
    assert names == set(json.loads((bundle / MANIFEST).read_bytes())["files"])
    for name in sorted(names):
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match="changed"):
            Bundle.open(bundle)
        (bundle / name).write_bytes(content)
    # Who can write the folder can write a manifest that is whole: not one that is signed.
    write_verification(Bundle.open(bundle), {"passed": True})
    with pytest.raises(BundleError, match="changed since"):
        Bundle.open(as_by_another(bundle))


def test_what_this_process_writes_it_may_open(keys: tuple[Path, Path], bundle: Path) -> None:
    sign_bundle(bundle, keys[0])
    written = write_verification(Bundle.open(bundle), {"passed": True})
    assert Bundle.open(written.folder).proof == "passed"


def test_what_failed_is_not_signed(keys: tuple[Path, Path], bundle: Path) -> None:
    trust.vouch_for((bundle / MANIFEST).read_bytes())
    write_verification(Bundle.open(bundle), {"passed": False})
    with pytest.raises(VerificationError, match="not signed"):
        sign_bundle(bundle, keys[0])
    assert not (bundle / SIGNATURE).exists()


def test_a_bundle_with_a_changed_file_is_trusted_by_no_verb(
    keys: tuple[Path, Path], bundle: Path, run: Run
) -> None:
    sign_bundle(bundle, keys[0])
    looks = (
        ("inspect", str(bundle), "--json"),
        ("plan", str(bundle), "--device", "orin-nano-8g"),
    )
    assert [run(*line).exit_code for line in looks] == [0, 0]
    largest = max(bundle.iterdir(), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for line in looks:
        done = run(*line)
        assert (done.exit_code, "trusted" in done.stdout) == (3, False)
        assert "does not match the manifest" in done.output.replace("\n", " ")


def test_a_contrastive_bundle_with_a_changed_file_is_not_trusted(
    keys: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bundle_path("modality-nano"), tmp_path / "modality")
    sign_bundle(folder, keys[0])
    assert inspect_modality(folder).signature == "trusted"
    (folder / "image.onnx").write_bytes(b"another")
    with pytest.raises(BundleError, match="does not match the manifest"):
        inspect_modality(folder)


def test_models_are_refused_wherever_they_are_loaded(
    keys: tuple[Path, Path],
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    # other tests of this process write copies of these models, which it may then open
    monkeypatch.setattr(trust, "_written", set())
    for model in ("nano", "modality-nano"):
        with pytest.raises(BundleError, match="is not signed"):
            medmoe_edge.load(model)
    with pytest.raises(BundleError, match="is a checkpoint"):
        medmoe_edge.load(tiny_checkpoint())
    with pytest.raises(BundleError, match="is a checkpoint"):
        medmoe_edge.load("modality-nano", runtime="torch")
    scan = Path("scan.png")
    shutil.copyfile(Path(__file__).parents[2] / "scan.png", scan)
    Path("scans").mkdir()
    Path("questions.txt").write_text("Is there effusion?")
    shutil.copyfile(scan, "scans/scan.png")
    listen = {"folder": "node", "peers": [{"ae_title": "A"}], "questions": [{"ask": ["Is it?"]}]}
    Path("listen.json").write_text(json.dumps(listen))
    for line in (
        "ask scan.png Where?",
        "classify scan.png --labels a,b",
        "locate scan.png heart -o map.png",
        "verify nano",
        "verify nano --quick",
        "inspect nano",
        "eval nano --data questions.jsonl",
        "batch scans --questions questions.txt -o out.csv",
        "serve --port 0",
        "listen --config listen.json",
        "index scans -o archive",
    ):
        if line.startswith("eval"):
            asked = {"image": "scan.png", "question": "Is it?", "answer": "No"}
            Path("questions.jsonl").write_text(json.dumps(asked))
        done = run(*line.split())
        assert done.exit_code == 3, (line, done.output)
        assert "is not signed" in " ".join(done.output.split()), (line, done.output)


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN PUBLIC KEY-----\nAA\n-----END PUBLIC"])
def test_keys_that_cannot_be_read_open_nothing(
    keys: tuple[Path, Path], bundle: Path, content: bytes | None
) -> None:
    sign_bundle(bundle, keys[0])
    if content is None:
        keys[1].unlink()
    else:
        keys[1].write_bytes(content)
    with pytest.raises(InputError, match=TRUSTED_KEYS):
        Bundle.open(bundle)


def test_without_the_package_nothing_is_opened(
    keys: tuple[Path, Path], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_bundle(bundle, keys[0])
    for name in ("cryptography", "cryptography.exceptions"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingDependencyError, match="cryptography"):
        Bundle.open(bundle)


def test_keys_to_sign_with(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "ward")
    read_private_key(private)
    private.chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        read_private_key(private)
    private.chmod(0o600)
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    hidden = key.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"secret"))
    other = generate_private_key(SECP256R1()).private_bytes(PEM, PKCS8, PLAIN)
    for content, said in ((hidden, "password"), (other, "Ed25519"), (b"", "no private key")):
        private.write_bytes(content)
        with pytest.raises(InputError, match=said):
            read_private_key(private)
    public.chmod(0o600)
    with pytest.raises(InputError, match="no private key"):
        read_private_key(public)
    with pytest.raises(InputError, match="does not exist"):
        read_private_key(tmp_path / "absent")


def test_export_signs(
    keys: tuple[Path, Path], tiny_checkpoint: Callable[..., Path], run: Run
) -> None:
    line = ["export", str(tiny_checkpoint()), "--fp32", "-o", "made"]
    done = run(*line, "--sign", "absent.key")
    assert done.exit_code == 2
    assert not Path("made").exists()
    assert run(*line, "--sign", str(keys[0])).exit_code == 0
    code = "from pathlib import Path; from medmoe_edge.bundle.bundle import Bundle\n"
    opened = [sys.executable, "-c", f"{code}Bundle.open(Path('made'))"]  # this process made it
    assert subprocess.run(opened, check=False).returncode == 0


def test_verify_signs_what_is_recorded(
    keys: tuple[Path, Path], bundle: Path, tiny_checkpoint: Callable[..., Path], run: Run
) -> None:
    assert run("verify", str(bundle), "--sign", str(keys[0])).exit_code == 0
    before = (bundle / MANIFEST).read_bytes()
    shutil.copyfile(Path(__file__).parents[2] / "scan.png", "scan.png")
    asked = {"image": "scan.png", "question": "Is it?", "answer": "No", "modality": "xray"}
    Path("questions.jsonl").write_text(json.dumps(asked))
    checkpoint = str(tiny_checkpoint())
    measured = ["verify", str(bundle), "--against", checkpoint, "--data", "questions.jsonl"]
    done = run(*measured, "--record")
    assert (done.exit_code, "--no-record" in done.output) == (2, True)
    options = VerifyOptions(Path(checkpoint), Path("questions.jsonl"), record=True)
    with pytest.raises(InputError, match="its signature would not hold"):
        medmoe_edge.verify(bundle, options)
    assert run(*measured, "--json").exit_code in (0, 4)
    assert (bundle / MANIFEST).read_bytes() == before  # a signed bundle is not written to
    done = run(*measured, "--sign", str(keys[0]))
    assert done.exit_code == 0, done.output
    assert (bundle / MANIFEST).read_bytes() != before
    told = run("inspect", str(bundle), "--json")
    assert json.loads(told.stdout)["signature"] == "trusted"


def test_a_manifest_that_was_not_verified_is_not_signed(
    keys: tuple[Path, Path], bundle: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def meanwhile(*arguments: Any) -> None:
        write_verification(Bundle.open(bundle), {"passed": True, "of": "another"})
        sign_bundle(*arguments)

    monkeypatch.setattr("medmoe_edge.cli.verify.sign_bundle", meanwhile)
    done = run("verify", str(bundle), "--sign", str(keys[0]), "--json")
    assert (done.exit_code, "changed meanwhile" in done.stderr) == (3, True), done.output
    told = json.loads(done.stdout)
    assert "changed meanwhile" in told["error"]["message"]
    assert told["outcome"] == "not measured"
    assert not (bundle / SIGNATURE).exists()


def test_a_manifest_that_changes_while_it_is_written_is_refused(
    keys: tuple[Path, Path], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust.vouch_for((bundle / MANIFEST).read_bytes())
    opened, other = Bundle.open(bundle), (bundle / MANIFEST).read_bytes()

    def put_back(text: bytes) -> None:
        (bundle / MANIFEST).write_bytes(other)

    monkeypatch.setattr("medmoe_edge.bundle.trust.vouch_for", put_back)
    with pytest.raises(BundleError, match="changed meanwhile"):
        write_verification(opened, {"passed": True})


def test_what_cannot_be_signed_is_refused_before_the_work(
    keys: tuple[Path, Path], run: Run
) -> None:
    installed = run("verify", "nano", "--sign", str(keys[0]))
    assert installed.exit_code == 2
    assert f"cp -r {bundle_path('nano')}" in installed.output.replace("\n", " ")
    quick = run("verify", "nano", "--quick", "--sign", str(keys[0]))
    assert (quick.exit_code, "Leave --sign out" in quick.output) == (2, True)


def test_inspect_tells_of_a_signature(
    keys: tuple[Path, Path], bundle: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.delenv(TRUSTED_KEYS)
    assert json.loads(run("inspect", str(bundle), "--json").stdout)["signature"] == "none"
    sign_bundle(bundle, keys[0])
    assert json.loads(run("inspect", str(bundle), "--json").stdout)["signature"] == "not checked"
