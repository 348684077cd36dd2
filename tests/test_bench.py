"""What a benchmark must not do: measure less work for one than for another, mix codes, or leave a failure out."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cheaptrain.bench import experiments, runner
from cheaptrain.bench import measure as measuring
from cheaptrain.bench.children import Child
from cheaptrain.bench.floor import dimensions, measure_floor
from cheaptrain.bench.gpt2_loop import Gpt2
from cheaptrain.bench.measure import flops_per_token, measure
from cheaptrain.bench.profiling import category
from cheaptrain.bench.rows import attended, step_rows
from cheaptrain.bench.samples import Row, add_sample, newest_rows, read_samples
from cheaptrain.bench.table import mismatch, table_rows
from cheaptrain.bench.trial import Figures, Trial, Unavailable, plain_model, repeated, spec_of
from cheaptrain.bench.works import (
    CHEAPTRAIN,
    CUDA_GRAPHS,
    FLOOR,
    FP8,
    FULL_LOGITS,
    GPT2_LOOP,
    GPU_WORKS,
    LAYER_KERNELS,
    LIGER,
    TRANSFORMERS,
    Work,
    chosen_works,
    find_work,
)
from cheaptrain.data.rows import IGNORED
from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.model import compiled
from cheaptrain.model.facts import model_facts
from cheaptrain.parallel.processes import leave

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def small(name: str, **changes: Any) -> Work:
    work = find_work(name, "cpu")
    return replace(work, **({"seq_len": 64, "rows": 4, "micro_rows": 2, "steps": 3, "vocab": 256} | changes))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A process that has joined others must not be forked by a later test."""
    yield
    leave()


@pytest.mark.parametrize(
    ("work", "others"),
    [
        (small("tiny"), [TRANSFORMERS]),
        (small("gpt2", micro_rows=1), [GPT2_LOOP, TRANSFORMERS]),
        (small("r1"), [TRANSFORMERS]),
        (small("distill"), [FULL_LOGITS]),
    ],
    ids=lambda value: value.name if isinstance(value, Work) else "",
)
def test_nobody_is_measured_doing_less_than_cheaptrain(work: Work, others: list[str]) -> None:
    ours = measure(work, CHEAPTRAIN, CPU)
    assert ours["tokens_per_second"] > 0 and ours["steps"] == 3 and len(ours["losses"]) == 3
    for variant in others:
        theirs = measure(work, variant, CPU)
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
        assert theirs["grad_norms"] == pytest.approx(ours["grad_norms"], rel=1e-3)
        assert (
            mismatch(Row(work.name, variant, [theirs], None), Row(work.name, CHEAPTRAIN, [ours], None), "cpu") is None
        )


def test_documents_of_a_row_are_learnt_apart() -> None:
    alone, packed = small("tiny", rows=1, micro_rows=1), small("packed", rows=1, micro_rows=1, documents=16)
    model = plain_model(alone, alone.model, CPU)
    rows = step_rows(packed, 0, 1)[0]
    losses, ends = [], 0
    for length in rows.lengths[0]:
        ids = rows.input_ids[:, ends : ends + length]
        losses.append(model(input_ids=ids, labels=ids).loss.item() * (length - 1))
        ends += length
    measured = measure(replace(packed, model=alone.model), CHEAPTRAIN, CPU)
    assert len(losses) > 2
    assert measured["losses"][0] == pytest.approx(sum(losses) / rows.supervised, rel=1e-5)


def test_a_row_that_learned_something_else_says_so() -> None:
    ours = Row("tiny", CHEAPTRAIN, [{"losses": [7.0, 6.9, 6.8], "grad_norms": [1.0, 1.0, 1.0]}], None)

    def said(losses: list[float], norm: float) -> str | None:
        sample = {"losses": losses, "grad_norms": [norm, 1.0, 1.0]}
        return mismatch(Row("tiny", TRANSFORMERS, [sample], None), ours, "cpu")

    assert said([7.0, 6.9, 6.8], 1.0) is None
    assert "first loss 7.1" in str(said([7.1, 6.9, 6.8], 1.0))
    assert "third loss 6.7" in str(said([7.0, 6.9, 6.7], 1.0))
    assert "gradient norm 0.5" in str(said([7.0, 6.9, 6.8], 0.5))


def test_fewer_rows_at_once_are_the_same_step() -> None:
    work = small("packed", documents=16)
    whole, pieces = step_rows(work, 1, 4), step_rows(work, 1, 1)
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert torch.equal(getattr(whole[0], name), torch.cat([getattr(piece, name) for piece in pieces]))
    assert whole[0].supervised == sum(piece.supervised for piece in pieces)
    assert not torch.equal(whole[0].input_ids, step_rows(work, 2, 4)[0].input_ids)


def test_lengths_of_documents_fill_each_row_and_have_their_mean() -> None:
    work = small("packed", seq_len=4096, rows=16, documents=100)
    rows = step_rows(work, 0, 16)[0]
    every = [length for of_row in rows.lengths for length in of_row]
    assert [sum(of_row) for of_row in rows.lengths] == [4096] * 16
    assert min(every) >= 20 and 90 < sum(every) / len(every) < 115
    assert rows.supervised == 16 * 4096 - len(every)
    assert int((rows.labels[:, -1] != IGNORED).sum()) == 0
    assert sum(every) / len(every) < attended(work) < 220
    assert attended(small("tiny")) == 64


def test_what_does_not_fit_is_tried_with_half_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def build(work: Work, variant: str, device: torch.device, micro_rows: int) -> Trial:
        tried.append(micro_rows)
        if micro_rows > 2:
            raise torch.OutOfMemoryError("too much")
        return Trial(repeated(lambda number: lambda: Figures(1.0, 1.0)))

    monkeypatch.setattr(measuring, "prepare", lambda variant: build)
    sample = measure(small("tiny", rows=16, micro_rows=16), CHEAPTRAIN, CPU)
    assert tried == [16, 8, 4, 2] and sample["micro_rows"] == 2

    monkeypatch.setattr(measuring, "prepare", lambda variant: lambda *given: (_ for _ in ()).throw(MemoryError("gone")))
    assert measure(small("tiny"), CHEAPTRAIN, CPU) == {"error": "MemoryError: gone"}
    monkeypatch.setattr(
        measuring,
        "prepare",
        lambda variant: lambda *given: Trial(repeated(lambda n: lambda: Figures(float("nan"), 1.0))),
    )
    assert "not finite" in measure(small("tiny"), CHEAPTRAIN, CPU)["error"]


@pytest.mark.parametrize(
    ("variant", "words"), [(LIGER, ("GPU", "liger-kernel")), (FP8, ("GPU", "torchao")), (CUDA_GRAPHS, ("GPU",))]
)
def test_what_a_machine_lacks_is_a_reason_and_no_crash(variant: str, words: tuple[str, ...]) -> None:
    reason = measure(small("quick"), variant, CPU)["error"]
    assert any(word in reason for word in words)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Compiling quickly, and nothing of it left behind."""
    from torch._dynamo import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(compiled, "lower", torch._dynamo.lookup_backend("aot_eager"))
    torch._dynamo.reset()
    with config.patch(recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["tiny", "r1"])
def test_layers_with_our_kernels_learn_the_same(name: str, compiling: None) -> None:
    work = small(name)
    ours, theirs = measure(work, CHEAPTRAIN, CPU), measure(work, LAYER_KERNELS, CPU)
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-6)
    assert theirs["grad_norms"] == pytest.approx(ours["grad_norms"], rel=1e-5)
    assert "our kernels" in theirs["note"]


def test_layers_that_our_kernels_are_not_for_are_not_measured_as_if_they_were(compiling: None) -> None:
    assert "norms=0" in measure(small("gpt2"), LAYER_KERNELS, CPU)["error"]


def test_cuda_graphs_are_refused_where_gradients_are_added_up_or_nothing_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, gpu = find_work("140m", "cuda"), torch.device("cuda")
    experiments.refuse_experiment(work, CUDA_GRAPHS, gpu, work.rows)
    with pytest.raises(Unavailable, match="one micro-batch"):
        experiments.refuse_experiment(work, CUDA_GRAPHS, gpu, work.rows // 2)
    begun: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    for recorded, skipped in ((0, 0), (5, 1), (5, 0)):
        with monkeypatch.context() as patched:
            did = {"cudagraph_recorded_non_static_inputs": recorded, "cudagraph_skips": skipped}
            patched.setitem(torch._dynamo.utils.counters, "inductor", did)
            begun.clear()
            for number in range(2):
                experiments.before_step(CUDA_GRAPHS, number)
            if recorded and not skipped:
                experiments.before_step(CUDA_GRAPHS, 2)
                assert len(begun) == 3
            else:
                with pytest.raises(Unavailable, match=f"{skipped} left out"):
                    experiments.before_step(CUDA_GRAPHS, 2)
    experiments.before_step(CHEAPTRAIN, 0)
    assert len(begun) == 3


def test_cuda_graphs_are_what_is_compiled(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def lower(module: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        asked.append(config_patches)
        return module.forward

    monkeypatch.setattr(compiled, "lower", lower)
    work = small("tiny")
    model = plain_model(work, work.model, CPU)
    experiments.compile_experiment(model, CUDA_GRAPHS)
    model(input_ids=step_rows(work, 0, 1)[0].input_ids, use_cache=False)
    assert asked and all(patches["triton.cudagraphs"] and patches["triton.cudagraph_or_error"] for patches in asked)
    with torch._inductor.config.patch(asked[0]):  # names that this torch knows
        assert torch._inductor.config.triton.cudagraphs


def test_the_plain_gpt2_is_gpt2() -> None:
    work = small("gpt2")
    reference = plain_model(work, work.model, CPU)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.05)  # biases and gains too, or a forgotten one would not show
    ids = step_rows(work, 0, 4)[0].input_ids
    torch.testing.assert_close(Gpt2(reference)(ids), reference(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["950m", "gpt2", "r1"])
def test_the_floor_counts_every_matrix_of_the_model(name: str) -> None:
    work = next(work for work in GPU_WORKS if work.name == name)
    found = dimensions(work, work.model)
    facts = model_facts(spec_of(work.model), vocab_size=work.vocab, seq_len=work.seq_len)
    inside = sum(count * inputs * sum(outputs) for (inputs, outputs), count in found.matrices.items())
    biases = 12 * (2304 + 768 + 3072 + 768) if name == "gpt2" else 0
    assert inside == facts.by_part["attention"] + facts.by_part["mlp"] - biases
    assert found.vocab == work.vocab and found.parameters == facts.parameters


def test_the_floor_is_the_sum_of_its_parts() -> None:
    found = measure_floor(small("distill"), CPU)
    total = sum(found["parts_ms"].values())
    assert found["tokens_per_second"] == pytest.approx(4 * 64 / total * 1000, rel=1e-2)
    assert {"attention", "teacher's attention", "matmuls of the head", "clipping and AdamW"} <= set(found["parts_ms"])
    assert min(found["parts_ms"].values()) > 0


def test_mfu_counts_what_the_plan_counts_and_no_attention_across_documents() -> None:
    work = find_work("950m", "cuda")
    facts = model_facts(spec_of(work.model), vocab_size=work.vocab, seq_len=work.seq_len)
    assert flops_per_token(work) == pytest.approx(facts.flops_per_token, rel=1e-12)
    assert facts.flops_per_token == 6 * 949_688_576 + 12 * 22 * 24 * 64 * 2048
    packed = find_work("packed", "cuda")
    assert flops_per_token(packed) - 6 * 949_688_576 == pytest.approx(12 * 22 * 24 * 64 * attended(packed))


def sample(speed: float | None, code: str = "a", variant: str = CHEAPTRAIN, **more: Any) -> dict[str, Any]:
    what = {"tokens_per_second": speed, "flops_per_token": 2.0} if speed is not None else {"error": "out of memory"}
    figures = {"losses": [1.0, 1.0, 1.0], "grad_norms": [1.0, 1.0, 1.0]}
    about = {"work": "tiny", "variant": variant, "code": code, "versions": {"torch": "2"}, "commit": None}
    return about | figures | what | {"date": "2026-11-20T00:00:00+00:00"} | more


def test_samples_of_another_code_or_version_stay_out_of_the_median() -> None:
    samples = [sample(1000.0), sample(10.0, "b"), sample(30.0, "b"), sample(20.0, "b")]
    (row,) = newest_rows(samples, "tiny")
    assert row.median("tokens_per_second") == 20.0 and row.ends("tokens_per_second") == (10.0, 30.0)
    other = sample(500.0, "b") | {"versions": {"torch": "3"}}
    (row,) = newest_rows([*samples, other], "tiny")
    assert row.median("tokens_per_second") == 500.0


def test_the_table_has_ratio_share_and_failures(tmp_path: Path) -> None:
    machine = {
        "type": "cpu",
        "device": "X",
        "peak_flops": 400.0,
        "cores": 1,
        "code": "a",
        "versions": {},
        "commit": None,
    }
    held = {
        "machine": machine,
        "samples": [sample(100.0), sample(50.0, variant=TRANSFORMERS), sample(125.0, variant=FLOOR)],
    }
    ours, theirs, floor = table_rows(held)
    assert ours[1:6] == [CHEAPTRAIN, "100", "1", "50.0%", "80%"]
    assert theirs[1:7] == [TRANSFORMERS, "50", "1", "25.0%", "40%", "2.00×"]
    assert floor[1:3] == [FLOOR, "125"]
    failed = table_rows({"machine": machine, "samples": [sample(100.0), sample(None, variant=TRANSFORMERS)]})
    assert failed[1][1:3] == [TRANSFORMERS, "–"] and failed[1][-1] == "not measured: out of memory"
    file = tmp_path / "x" / "throughput.json"
    for each in held["samples"]:
        add_sample(file, machine, each)
    assert read_samples(file)["samples"] == held["samples"]
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(CheaptrainError, match=r"throughput\.json"):
        read_samples(file)


def test_what_has_the_fewest_samples_comes_first_and_nothing_begins_without_time(tmp_path: Path) -> None:
    chosen = [(find_work("quick", "cpu"), [CHEAPTRAIN]), (find_work("tiny", "cpu"), [CHEAPTRAIN, TRANSFORMERS])]
    machine = {"type": "cpu", "code": "a", "versions": {"torch": "2"}, "commit": None, "cores": 1}
    held = [sample(1.0), sample(1.0), sample(1.0, "old", TRANSFORMERS), sample(1.0, work="quick")]
    order = runner._in_order(chosen, held, machine, 2)
    assert order == [
        ("tiny", TRANSFORMERS, 1),
        ("quick", CHEAPTRAIN, 2),
        ("tiny", TRANSFORMERS, 2),
        ("quick", CHEAPTRAIN, 3),
        ("tiny", CHEAPTRAIN, 3),
        ("tiny", CHEAPTRAIN, 4),
    ]
    work, held = find_work("tiny", "cpu"), [sample(1.0)]
    order = runner._in_order([(work, [LAYER_KERNELS]), *chosen[:1]], held, machine, 2)
    assert order == [
        ("quick", CHEAPTRAIN, 1),
        ("tiny", LAYER_KERNELS, 1),
        ("quick", CHEAPTRAIN, 2),
        ("tiny", LAYER_KERNELS, 2),
    ]
    left = runner.run(chosen, machine, tmp_path / "f.json", runner.Limits(0.0, 1), lambda text: None)
    assert len(left) == 3 and not (tmp_path / "f.json").exists()


def test_names_that_do_not_exist_are_refused_with_what_there_is() -> None:
    with pytest.raises(RecipeError, match="950m"):
        chosen_works("95m", None, "cuda")
    with pytest.raises(RecipeError, match="plain GPT-2 loop"):
        chosen_works(None, "nanochat", "cuda")
    assert "fp8-loss" not in [work.name for work, _ in chosen_works(None, None, "cuda")]
    assert [(work.name, names) for work, names in chosen_works("tiny", "floor", "cpu")] == [("tiny", [FLOOR])]


def test_kernels_are_counted_under_what_they_are_for() -> None:
    known = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "matmul",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "matmul",
        "aten::addmm_": "matmul",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel": "attention",
        "_cross_entropy_rows": "loss kernels",
        "triton_per_fused_add_mean_mul_pow_rsqrt_3": "norms and element-wise",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "Memcpy HtoD (Pinned -> Device)": "copies and casts",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
        "something_new": "other",
    }
    assert {name: category(name) for name in known} == known


@pytest.mark.slow
def test_a_process_whose_parent_is_gone_ends_itself() -> None:
    child = Child({"do": "measure", "work": "quick", "variant": FLOOR, "device": "cpu", "threads": 1})
    try:
        assert "error" not in child.wait("ready", 60)
        child.go()
        assert child.process.stdin is not None
        child.process.stdin.close()  # as when the parent is killed
        assert child.process.wait(30) == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            os.killpg(child.process.pid, 0)
    finally:
        if child.process.poll() is None:
            os.killpg(child.process.pid, signal.SIGKILL)


def test_a_process_that_hangs_is_ended_and_named() -> None:
    child = Child({"do": "machine"})
    assert child.wait("result", 0.01) == {"error": "nothing after 0 s"}
    child.close()
    assert child.process.returncode == -signal.SIGKILL
    gone = Child({})
    assert "ended with 1" in gone.wait("ready", 60)["error"]
    gone.close()


def test_the_command_measures_side_by_side_and_keeps_every_sample(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--works", "tiny", "--rounds", "1"]
    command += ["--variants", f"{CHEAPTRAIN};{TRANSFORMERS}", "--threads", "1", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*/throughput.json")
    held = json.loads(file.read_text(encoding="utf-8"))
    assert {(s["work"], s["variant"]) for s in held["samples"]} == {("tiny", CHEAPTRAIN), ("tiny", TRANSFORMERS)}
    for each in held["samples"]:
        assert each.get("error") is None
        assert each["tokens_per_second"] > 0 and each["code"] and each["versions"]["torch"] == torch.__version__
        assert each["peak_bytes"] > 0 and 0 < each["first_step_seconds"] < each["wall_seconds"]
    assert "tiny-qwen3" in done.stdout and "DIFFERS" not in done.stdout


def test_interrupted_it_leaves_no_process_behind(tmp_path: Path) -> None:
    code = "from cheaptrain.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "--works", "quick", "--variants", CHEAPTRAIN, "--rounds", "50"]
    command += ["--threads", "1", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline, children = time.monotonic() + 60, []
        while not children and time.monotonic() < deadline:
            children = [pid for pid in _descendants(parent.pid) if "measure" in _words(pid)]
            time.sleep(0.1)
        assert children
        parent.send_signal(signal.SIGINT)
        assert parent.wait(30) == 130
        assert not [pid for pid in children if "measure" in _words(pid)]
    finally:
        parent.kill()
        parent.communicate()


def _descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
