"""The bench: what it derives, how its processes fail, and that all of it fits together.

No figure is held against the clock: speed is what the command measures, not what tests assert.
"""

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from command_line import ROOT, Run, fake_module, two_lines
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st
from in_process import InProcess, without_processes

from medmoe_edge.bench import gguf as bench_gguf
from medmoe_edge.bench import measurement
from medmoe_edge.bench import run as bench
from medmoe_edge.bench import worker as processes
from medmoe_edge.bench.backends import LlamaBackend, shape_of
from medmoe_edge.bench.gguf import Form, tensors, widths, write_gguf
from medmoe_edge.bench.measurement import Allowance, Measured, Shape, Spread, turn
from medmoe_edge.bench.peers import PEERS, Comparison, Materials, Peer, compare
from medmoe_edge.bench.run import Bench, Length, Machine
from medmoe_edge.bench.worker import Measurement, Requests, Worker, cold_start, ended
from medmoe_edge.bundle import machine
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import InputError, ModelError, ResourceError
from medmoe_edge.presets import PRESETS
from medmoe_edge.render.bench import seconds, show_bench, write_plot
from medmoe_edge.runtimes.costs import decoder_parts

Make = Callable[..., Path]
SHAPE = Shape(prefix=20, image=4, question=6, new=8)
PARTS = {"vision", "prefill", "decode", "second"}


def spread(value: float) -> Spread:
    return Spread(value, value, value, 1)


def measured(scale: float = 1.0, memory: int | None = 100) -> Measured:
    times = {"load": 4, "vision": 1, "prefill": 3, "decode": 14, "question": 18, "second": 1}
    seconds = {name: spread(scale * value) for name, value in times.items()}
    return Measured(seconds, memory, memory and 2 * memory, memory and 3 * memory)


def result(**changes: Any) -> Bench:
    made = Bench(
        model="toy",
        sha256="0" * 64,
        precision="int8",
        machine=Machine("a CPU", "AVX2", "exact", 2, 10**9, 0.1, Spread(1000.0, 900.0, 1100.0, 5)),
        shape=SHAPE,
        cold_start=spread(9),
        measured=measured(),
        decode_bytes=200.0,
        cache_token_bytes=1000,
        lengths=(Length(128, spread(0.1), 7), Length(256, spread(0.2), None)),
        questions={1: spread(1), 2: spread(1.5)},
        peers=(
            Comparison(PEERS[0], "measured", measured(), measured(2.0, 400)),
            Comparison(PEERS[1], "failed", why="Why.", remedy="Do."),
        ),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[InProcess]:
    """The workers that were started, none with a process of its own."""
    return without_processes(monkeypatch)


# --- arithmetic -----------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=30))
def test_spread(values: list[float]) -> None:
    found = Spread.of(values)
    wanted = statistics.quantiles(values, n=4, method="inclusive")
    assert (found.low, found.median, found.high) == pytest.approx(tuple(wanted))
    assert found.count == len(values)
    assert Spread.of(values[:1]) == spread(values[0])


def test_a_turn_is_as_long_as_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def run() -> None:
        clock.now += 0.3

    stopped = SimpleNamespace(sleep=lambda rest: None, perf_counter=lambda: clock.now)
    monkeypatch.setattr(measurement, "time", stopped)
    for slot, runs in ((0.0, 1), (1.0, 4)):
        monkeypatch.setattr(measurement, "SLOT", slot)
        assert len(turn(run)) == runs
    assert measurement.seconds(run) == pytest.approx(0.3)


def test_an_allowance_is_for_one_run_and_for_more_while_it_suffices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, taken = SimpleNamespace(now=0.0), {"long": 0, "short": 0}
    monkeypatch.setattr(measurement, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    allowance = Allowance(10.0)

    def spend(name: str, seconds: float) -> None:
        taken[name] += 1
        clock.now += seconds

    for _ in range(5):
        allowance.take("long", lambda: spend("long", 99.0))
        allowance.take("short", lambda: spend("short", 3.0))
    assert taken == {"long": 1, "short": 3}


def test_what_follows_from_the_figures() -> None:
    found = result()
    assert found.prefill_rate == 10  # 30 tokens in 3 s
    assert found.decode_rate == 0.5  # the first of 8 tokens belongs to the prefill
    assert found.second_over_first == 0.25  # 1 s, of vision 1 s and prefill 3 s
    assert found.bandwidth_share == 0.1  # 200 bytes, half a token a second, of 1000 bytes a second
    assert found.length_ratio == 1
    assert found.token_bytes is None  # one peak is known
    peaks = [Length(n, spread(n * n), 10**6 + 1200 * n) for n in (16, 100, 200, 400)]
    grown = result(lengths=(*peaks[1:], dataclasses.replace(peaks[0], peak=9)))
    assert grown.token_bytes == pytest.approx(1200)  # 16 tokens are fewer than a question's
    assert grown.length_ratio == 25
    assert result(lengths=()).length_ratio is None
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["questions"][1] == {"questions": 2, "seconds": dataclasses.asdict(spread(1.5))}
    assert told["decode_share_of_bandwidth"] == 0.1
    assert told["lengths"][1]["peak"] is None
    first, second = told["peers"]
    assert first["ratios"]["decode"] == 2  # the peer takes twice as long
    assert first["ratios"]["peak"] == 0.25  # ours takes a quarter
    assert (second["state"], second["why"], second["ratios"]) == ("failed", "Why.", {})


def test_ratios_are_of_what_both_have() -> None:
    blind = measured(3.0, None)
    seconds = {name: each for name, each in blind.seconds.items() if name != "vision"}
    found = Comparison(
        PEERS[-1], "measured", measured(), dataclasses.replace(blind, seconds=seconds)
    )
    assert found.ratios == dict.fromkeys(("load", "prefill", "decode", "question", "second"), 3.0)


def test_decode_reads_the_weights_and_the_cache(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    d, f, v, cache = 64, 64, 320, 3 * 2 * 64 * (30 + 4 + 1)  # layers, keys and values
    moe = 2 * (2 * 3 * d * f)  # two layers: an expert and the meta expert
    int8 = 3 * 4 * d * d + 3 * d * f + moe + d * v
    routers = 2 * 4 * d
    assert bench.decode_bytes(bundle, SHAPE) == int8 + 4 * routers + 4 * cache
    stored = {"precision": "int4", "matrices": [{"group": 128}]}
    coarse = dataclasses.replace(bundle, manifest={**bundle.manifest, "quantisation": stored})
    int4 = (4 + 16 / 128) / 8 * (int8 - d * v) + d * v
    assert bench.decode_bytes(coarse, SHAPE) == int4 + 4 * routers + 4 * cache


def test_times_for_people() -> None:
    told = {0.0123: "12.3 ms", 0.9994: "999 ms", 0.9996: "1.00 s", 2.31: "2.31 s"}
    assert {value: seconds(value) for value in told} == told


def test_memory_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tVmRSS\nVmHWM:\t   300 kB\nVmRSS:\t   200 kB\n")
    monkeypatch.setattr(machine, "STATUS", tmp_path / "status")
    assert machine.peak_memory() == 300 * 1024
    monkeypatch.setattr(machine, "STATUS", tmp_path / "none")
    assert machine.peak_memory() is None
    for free in (None, 300):  # by the kernel and the control groups
        monkeypatch.setattr(measurement, "available_memory", lambda free=free: free)
        assert measurement.available() == 300 if free else measurement.available() > 2**20
    assert measurement.threads() >= 1


@pytest.mark.skipif(not measurement.LINUX, reason="storage is counted on Linux")
def test_what_storage_brings_is_counted(tmp_path: Path) -> None:
    before = measurement.storage()
    assert set(before) == {"faults", "read"}
    assert all(count is not None and count >= 0 for count in before.values())


@pytest.mark.skipif(not machine.CLEAR.exists(), reason="needs Linux's /proc")
def test_a_peak_begins_anew() -> None:
    held = np.ones(2**24)  # 128 MiB
    del held
    before = measurement.memory()
    machine.reset_peak()
    after = measurement.memory()
    assert before["peak"] is not None
    assert before["resident"] is not None
    assert after["peak"] is not None
    assert after["resident"] is not None
    assert before["peak"] - before["resident"] > 2**26
    assert after["peak"] - after["resident"] < 2**26


# --- processes ------------------------------------------------------------------------------------


def test_a_worker_tells_what_went_wrong() -> None:
    with Worker() as worker:
        with pytest.raises(ResourceError, match=r"It failed \(AttributeError\)"):
            worker.ask("dance")
        opening = {"kind": "bundle", "path": "/none", "form": "", "shape": {}}
        with pytest.raises(ResourceError, match=r"config lacks the key 'vision'"):
            worker.ask("open", config={}, **opening)
        assert set(worker.ask("memory")) == {"resident", "peak"}
        worker._process.send_signal(signal.SIGINT)  # as a terminal sends to all at once
        assert worker.ask("memory")
        worker._process.send_signal(signal.SIGSEGV)
        with pytest.raises(ResourceError, match=r"crashed \(SIGSEGV\)"):
            worker.ask("memory")
        assert worker.ended
        with pytest.raises(ResourceError, match="crashed"):
            worker.ask("memory")


def test_a_slow_worker_is_stopped_and_none_is_left_behind() -> None:
    with Worker(timeout=0.01) as worker, pytest.raises(ResourceError, match="longer than"):
        worker.ask("memory")
    with pytest.raises(KeyboardInterrupt), Worker() as worker:
        raise KeyboardInterrupt
    assert worker.ended


@pytest.mark.parametrize(
    ("code", "what"),
    [(3, "exit code 3"), (-signal.SIGKILL, "run out of memory"), (-signal.SIGILL, "SIGILL")],
)
def test_how_a_process_ended(code: int, what: str) -> None:
    error = ended(code)
    assert what in error.what
    assert error.remedy


def test_a_cold_start_is_a_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "COMMAND", "import sys; sys.exit(sys.argv[1] != 'a')")
    assert cold_start(["a"]) > 0
    with pytest.raises(ResourceError, match="exit code 1"):
        cold_start(["b"])
    monkeypatch.setattr(processes, "COMMAND", "import time; time.sleep(60)")
    with pytest.raises(ResourceError, match="longer than"):
        cold_start([], timeout=0.1)


# --- backends -------------------------------------------------------------------------------------


def opening(bundle: Bundle, kind: str, path: Path, form: str = "") -> dict[str, Any]:
    config, shape = bundle.config.to_json(), dataclasses.asdict(SHAPE)
    return {"kind": kind, "path": str(path), "form": form, "config": config, "shape": shape}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("kind", "form"),
    [("bundle", ""), ("torch", "float32"), ("torch", "bfloat16"), ("bitsandbytes", "nf4")],
)
def test_every_runtime_answers_questions_of_the_shape(
    kind: str, form: str, tiny_bundle: Make, tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    requests = Requests()
    path = bundle.folder if kind == "bundle" else tiny_checkpoint()
    opened = requests.open(**opening(bundle, kind, path, form))
    assert opened["load"] >= 0
    backend: Any = requests.backend
    steps: list[tuple[int, int]] = []
    step = backend.runtime.step

    def counted(embeds: Any, cache: Any) -> Any:
        steps.append((len(embeds), cache.length))
        return step(embeds, cache)

    monkeypatch.setattr(backend.runtime, "step", counted)
    (parts,) = requests.question()
    assert set(parts) == PARTS
    assert min(parts.values()) > 0
    # the prompt of 30, the tokens after the first, and 6 tokens of another question after the image
    assert steps == [(30, 0), *((1, 30 + step) for step in range(7)), (6, 24)]
    if kind == "bundle":
        (seconds,) = requests.prefill(128)
        assert seconds > 0
        assert steps[-1] == (128, 0)
        (seconds,) = requests.ask(2)
        assert seconds > 0


def test_a_checkpoint_of_another_model_is_refused(tiny_bundle: Make, tiny_checkpoint: Make) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    other = opening(bundle, "torch", tiny_checkpoint("tiny-phi"), "float32")
    with pytest.raises(ModelError, match="another model"):
        Requests().open(**other)


def test_llama_cpp_is_asked_for_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Llama:
        n_tokens = -1

        def __init__(self, path: str, **options: Any) -> None:
            assert (path, options["n_ctx"]) == ("model.gguf", 38)

        def reset(self) -> None:
            self.n_tokens = 0

        def eval(self, tokens: list[int]) -> None:
            calls.append((len(tokens), self.n_tokens))
            self.n_tokens += len(tokens)

    fake_module(monkeypatch, "llama_cpp", Llama=Llama)
    backend = LlamaBackend(Path("model.gguf"), PRESETS["tiny"], SHAPE)
    backend.touch()
    assert set(backend.question()) == PARTS - {"vision"}
    assert calls == [(1, 0), (30, 0), *((1, 30 + step) for step in range(7)), (6, 24)]


@pytest.mark.parametrize("preset", ["med-moe-stablelm-1.6b", "med-moe-phi2-2.7b", "nano"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gguf_is_as_much_work(preset: str, top_k: int) -> None:
    base = PRESETS[preset]
    assert base.moe is not None
    config = dataclasses.replace(base, moe=dataclasses.replace(base.moe, top_k=top_k))
    stored = sum(np.prod(tensor.shape) for tensor in tensors(config, "q8_0"))
    parts = decoder_parts(config)
    assert stored == pytest.approx(sum(part.weights for part in parts.values()), rel=0.01)
    width, decoder = widths(config), config.decoder
    active = 3 * decoder.layers * decoder.hidden_size * (width.shared + top_k * width.expert)
    wanted = sum(parts[kind].active for kind in ("ffn", "experts", "meta"))
    assert active == pytest.approx(wanted, rel=0.01)


def test_dense_models_have_no_gguf() -> None:
    with pytest.raises(ModelError, match="without experts"):
        widths(dataclasses.replace(PRESETS["tiny"], moe=None))


@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
def test_the_gguf_can_be_read(form: Form, tmp_path: Path) -> None:
    config, file = PRESETS["tiny"], tmp_path / "model.gguf"
    write_gguf(config, form, file)
    read = gguf.GGUFReader(file)
    keys = {"expert_count": 4, "expert_used_count": 1, "embedding_length": 64, "block_count": 3}
    assert {key: read.fields[f"qwen2moe.{key}"].contents() for key in keys} == keys
    wanted = {tensor.name: tensor for tensor in tensors(config, form)}
    assert [tensor.name for tensor in read.tensors] == list(wanted)
    names = set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN2MOE])
    assert len({tensor.name.split(".")[-2] for tensor in read.tensors}) == len(names)
    for tensor in read.tensors:
        assert tuple(tensor.shape[::-1]) == wanted[tensor.name].shape
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        limit = 1.1 * bench_gguf.LARGEST if wanted[tensor.name].kind else 1.0
        assert np.abs(values).max() <= limit
        assert np.abs(values).max() > 0.01
    assert {tensor.tensor_type.name.lower() for tensor in read.tensors} == {"f32", "q8_0", form}


# --- peers ----------------------------------------------------------------------------------------


def peer(name: str, **changes: Any) -> Peer:
    (found,) = (each for each in PEERS if each.name == name)
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize("name", ["torch-fp32", "bitsandbytes-int8", "onnxruntime-fp32"])
def test_a_peer_is_measured_beside_the_bundle(
    name: str,
    in_process: list[InProcess],
    tiny_bundle: Make,
    tiny_checkpoint: Make,
) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    with Materials(bundle, tiny_checkpoint()) as materials:
        found = compare(peer(name), materials, SHAPE, rounds=2)
    assert (found.state, found.why) == ("measured", "")
    assert found.theirs is not None
    assert found.theirs.seconds["decode"].count == 2
    assert set(found.ratios) >= PARTS | {"load", "question", "resident", "peak", "loading"}
    assert all(worker.ended for worker in in_process)


def test_weights_are_made_up_where_there_is_no_checkpoint(
    in_process: list[InProcess], tiny_bundle: Make
) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    with Materials(bundle, None) as materials:
        first = materials.checkpoint
        assert materials.model(peer("torch-bf16"), Path("unused")) == first
        assert len(in_process) == 1  # made once
        Requests().open(**opening(bundle, "torch", first, "float32"))
        assert (first / "tokenizer.json").exists()
    assert not first.exists()


def test_a_gguf_is_made_for_llama_cpp(
    in_process: list[InProcess], tiny_bundle: Make, tmp_path: Path
) -> None:
    with Materials(Bundle.open(tiny_bundle("int8")), None) as materials:
        made = materials.model(peer("llama.cpp-q4-0"), tmp_path)
    assert made.read_bytes()[:4] == b"GGUF"
    assert len(in_process) == 1


@pytest.mark.usefixtures("in_process")
def test_a_peer_that_cannot_be_measured_is_a_result(
    tiny_bundle: Make, tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    with Materials(bundle, tiny_checkpoint("tiny-phi")) as materials:
        none = compare(peer("llama.cpp-q8-0", packages=("no_such",)), materials, SHAPE, 1)
        assert (none.state, none.remedy) == ("not installed", "pip install 'medmoe-edge[peers]'")
        wrong = compare(peer("torch-fp32"), materials, SHAPE, 1)
        assert wrong.state == "failed"
        assert "another model" in wrong.why
        monkeypatch.setattr(measurement, "available", lambda: 10**6)
        short = compare(peer("torch-fp32"), materials, SHAPE, 1)
        assert short.state == "not enough memory"
        assert short.why.endswith("1.0 MB are free.")
        assert compare(peer("torch-fp32", bytes=0.1), materials, SHAPE, 1).state == "failed"


def test_a_failure_of_our_own_is_no_result(
    in_process: list[InProcess], tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(self: Measurement, worker: Any) -> None:
        worker.ended = True
        raise ResourceError("Its process crashed.", "Do.")

    monkeypatch.setattr(Measurement, "open", end)
    bundle = Bundle.open(tiny_bundle("int8"))
    with Materials(bundle, bundle.folder) as materials, pytest.raises(ResourceError):
        compare(peer("torch-fp32"), materials, SHAPE, 1)
    assert in_process


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_bench(tiny_bundle: Make, tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int, int]] = []
    found = bench.bench(
        str(tiny_bundle("int8")),
        rounds=2,
        peers=(peer("torch-fp32"), peer("torch-bf16", packages=("no",))),
        checkpoint=str(tiny_checkpoint()),
        progress=lambda *step: steps.append(step),
    )
    assert [length.tokens for length in found.lengths] == [128, 256, 512]  # of 512 positions
    assert all(length.seconds.count == 2 for length in found.lengths)
    assert list(found.questions) == [1, 2, 4, 8]
    assert (found.cold_start, found.precision) == (Spread(0.5, 0.5, 0.5, 2), "int8")
    assert found.measured.seconds["load"].count == 3  # each round's own process, and the last one
    assert [each.state for each in found.peers] == ["measured", "not installed"]
    assert [step for step, _, _ in steps][-2:] == ["PyTorch eager fp32", "PyTorch eager bf16"]
    assert "prefill of 512 tokens" in {step for step, _, _ in steps}
    assert sorted({done for _, done, _ in steps}) == list(range(6))
    assert {total for *_, total in steps} == {6}
    assert found.shape == shape_of(Bundle.open(tiny_bundle("int8")))
    assert json.dumps(found.to_json(), allow_nan=False)


def test_bench_in_real_processes(
    tiny_bundle: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LENGTHS", (16,))
    monkeypatch.setattr(bench, "QUESTIONS", (1,))
    result = run("bench", str(tiny_bundle("int8")), "--rounds", "1", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert told["model"] == "tiny"
    assert told["cold_start"]["median"] > told["measured"]["seconds"]["question"]["median"] > 0
    assert told["peers"] == []


def test_the_base_install_suffices() -> None:
    heavy = ["torch", "onnx", "onnx_ir", "safetensors", "gguf", "llama_cpp", "matplotlib"]
    code = "import medmoe_edge.bench.run, medmoe_edge.bench.worker"
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_people_see_tables_and_then_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "bench", lambda model, **options: result())
    shown = run("bench", "--plot", "cost.png")
    assert (shown.exit_code, shown.stderr) == (0, "")
    *lines, last = shown.stdout.splitlines()
    assert json.loads(last) == json.loads(json.dumps(result().to_json()))
    assert lines[0] == "toy (int8) on a CPU (AVX2, exact int8), 2 threads"
    assert any("of it" in line and "10.0%" in line for line in lines)
    (row,) = (line for line in lines if line.strip().startswith("PyTorch eager fp32 "))
    assert row.split()[3:] == [*("5/s", "x", "2.00", "0/s", "x", "2.00"), *row.split()[9:]]
    assert "PyTorch eager bf16, failed: Why. Do." in lines
    assert lines[-1] == "Wrote the plot cost.png"
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(run("bench", "--json").stdout)["model"] == "toy"


def test_a_busy_machine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    show_bench(result())
    assert "trust ratios" not in capsys.readouterr().out
    busy = dataclasses.replace(result().machine, load=1.5)
    show_bench(result(machine=busy, peers=()))
    shown = capsys.readouterr().out
    assert "1.5 programs ran on 2 threads: trust ratios more than times." in shown
    assert "Peers" not in shown


@pytest.mark.parametrize(
    ("line", "what", "code"),
    [
        (["none"], "There is no model folder 'none'.", 3),
        (["."], ". is no bundle, so there is nothing to measure.", 2),
        (["--checkpoint", "nano"], "--checkpoint is for --peers or --memory-limit.", 2),
        (["--follow", "0.5"], "--follow is for --paging or --soak.", 2),
        (["--memory-budget", "50%"], "--memory-budget is for --paging or --soak.", 2),
        (["--paging", "--soak", "9"], "--paging and --soak do not go together.", 2),
        (["--paging", "--peers"], "Peers page no experts.", 2),
        (["--paging", "--memory-budget", "half"], "'half' is no memory budget.", 2),
        (["--memory-limit", "little"], "'little' is no memory budget.", 2),
        (["--peer", "ollama"], "There is no peer 'ollama'.", 2),
        (["--peers", "--checkpoint", "none"], "There is no model folder 'none'.", 3),
        (["--plot", "cost.docx"], "cost.docx names no picture format.", 2),
        (["--plot", "scan.png"], "scan.png exists already.", 2),
        (["--rounds", "0"], "--rounds", 2),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, scan: Path, line: list[str], what: str, code: int
) -> None:
    monkeypatch.setattr(processes, "cold_start", None)
    result = run("bench", *line)
    assert result.exit_code == code
    assert what in two_lines(result)[0]


def test_an_interrupt_is_one_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "cold_start", interrupted)
    result = run("bench")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "Interrupted."


def test_a_plot_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    for name in ("cost.svg", "cost.pdf"):
        write_plot(result(), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(InputError, match="picture format"):
        write_plot(result(), tmp_path / "cost")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_plot(result(), tmp_path / "none" / "cost.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.pdf", "cost.svg"]
