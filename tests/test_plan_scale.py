"""A plan for many processes that is wrong costs a cluster: what fits on paper must fit, and what it says must be so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_recipe import pipe, tiny_recipe
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import CheaptrainError, PreflightError, RecipeError
from cheaptrain.hardware import find_gpu
from cheaptrain.model.build import build_model
from cheaptrain.model.config import model_config
from cheaptrain.model.context import Context
from cheaptrain.model.facts import model_facts
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import join
from cheaptrain.parallel.root import last_micro_batch
from cheaptrain.recipe.layout import Layout, planned_processes
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.schema import Model, Train
from cheaptrain.report import measure as measuring
from cheaptrain.report.advice import warnings
from cheaptrain.report.depth import alike_at_the_end
from cheaptrain.report.device import device_to_plan_for
from cheaptrain.report.measure import Measured, Setting, measure
from cheaptrain.report.memory import peak_bytes
from cheaptrain.report.plan import layout_overrides, print_plans
from cheaptrain.report.plan_view import report_lines
from cheaptrain.report.pretend import as_one_of
from cheaptrain.report.reckon import PlanReport, plan_report
from cheaptrain.report.search import Found, Wanted, find, layouts
from cheaptrain.report.speed import link_bytes_per_second, predicted_step_seconds
from cheaptrain.train.objective import OBJECTIVES, Compute
from cheaptrain.train.outlook import survey_leniently

SEQ, ROWS, VOCABULARY, LAYERS = 256, 4, 2048, 6
PLAIN = Setting(Layout(), SEQ, ROWS, False, False, False, True, 256)
SHAPE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
TRAIN = Train.model_validate({"steps": 1, "global_batch_tokens": SEQ, "lr": 1e-3})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def spec_of(kind: str, layers: int = LAYERS) -> Model:
    if kind == "gpt2":
        return Model(preset="tiny-gpt2", overrides={"n_embd": 256, "n_head": 8, "n_layer": layers})
    return Model(preset=f"tiny-{kind}", overrides={**SHAPE, "intermediate_size": 768, "num_hidden_layers": layers})


SMALL = model_config(spec_of("qwen3", 2), vocab_size=VOCABULARY, seq_len=SEQ)


def peak_of(measured: Measured) -> int:
    return max(moment.total for moment in measured.moments)


def allocated(_: int, processes: int, kind: str, setting: Setting, pretended: bool) -> int:
    """The most that PyTorch's allocator holds on this process in a step of two micro-batches, or of one, without an
    optimizer. The profiler only counts what comes and goes while it looks, so what was there before is added."""
    if not pretended:
        join(60)
    model = build_model(spec_of(kind), vocab_size=VOCABULARY, seq_len=SEQ, seed=0, eot_id=0)
    mesh = make_mesh(setting.layout, "cpu")
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    root = parallelize(model, mesh, dtype=dtype, recompute=setting.recompute)
    context = Context.of(mesh["cp"].get_group())
    compute = Compute(torch.device("cpu"), dtype, setting.masked, setting.loss_chunk_tokens, context)
    ids = torch.randint(0, VOCABULARY, (setting.micro_batch_size, SEQ))
    documents = torch.zeros(ids.shape, dtype=torch.int32)
    documents[:, SEQ // 2 :] = 1
    positions = torch.arange(SEQ).expand(ids.shape).clone()
    batch = RowBatch(ids, ids.clone(), positions, documents, np.zeros(len(ids), np.int64), ids.numel())
    if context is not None:
        batch = batch.share(context.rank, context.size)

    def step() -> None:
        for last in (False, True) if setting.accumulates else (True,):
            last_micro_batch(root, last)
            sums = root(OBJECTIVES["next_token"], batch, compute)
            (sums.loss / 100).backward()
            del sums

    step()
    root.zero_grad(set_to_none=True)
    held = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers())]
    held += [batch.input_ids, batch.labels, batch.position_ids, batch.document_ids]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(tensor.untyped_storage().nbytes() for tensor in held) + int(np.cumsum(changes).max())


LAYOUTS = {
    "fsdp2": Layout(dp_shard=2),
    "ddp2": Layout(dp_replicate=2),
    "tp2": Layout(tp=2),
    "fsdp2xtp2": Layout(dp_shard=2, tp=2),
    "hsdp2x2xcp2": Layout(dp_replicate=2, dp_shard=2, cp=2),
}


FAST = {
    ("fsdp2", "fp32, accumulates"),
    ("fsdp2xtp2", "bf16, recompute"),
    ("hsdp2x2xcp2", "fp32, recompute, accumulates"),
}


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        pytest.param(layout, how, id=f"{name}-{how}", marks=() if (name, how) in FAST else pytest.mark.slow)
        for name, layout in LAYOUTS.items()
        for how in ("fp32", "fp32, accumulates", "bf16, recompute", "fp32, recompute, accumulates")
    ],
)
def test_a_process_takes_other_memory_than_was_measured_without_any(layout: Layout, how: str) -> None:
    """Real tensors in a real allocator, in processes whose messages go nowhere: gloo would copy them a few times."""
    kind, processes = "llama" if layout.cp > 1 else "qwen3", layout.world_size
    setting = replace(
        PLAIN, layout=layout, recompute="recompute" in how, bf16="bf16" in how, accumulates="accumulates" in how
    )
    config = model_config(spec_of(kind), vocab_size=VOCABULARY, seq_len=SEQ)
    real = as_one_of(processes, allocated, 0, processes, kind, setting, True)
    # Products in bf16 take scratch memory on a CPU.
    exact = 0.05 if setting.bf16 else 0.002
    assert peak_of(as_one_of(processes, measure, config, setting)) == pytest.approx(real, rel=exact)


@pytest.mark.parametrize(
    ("kind", "layout", "recompute"),
    [
        ("qwen3", Layout(), False),
        pytest.param("llama4", Layout(), True, marks=pytest.mark.slow),
        ("qwen3", Layout(dp_shard=2), False),
        pytest.param("qwen3", Layout(dp_shard=2), True, marks=pytest.mark.slow),
        pytest.param("gpt2", Layout(dp_shard=2), False, marks=pytest.mark.slow),
        pytest.param("llama", Layout(tp=2), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_processes_that_do_exchange_messages_take_other_memory(kind: str, layout: Layout, recompute: bool) -> None:
    setting = replace(PLAIN, layout=layout, recompute=recompute)
    config = model_config(spec_of(kind), vocab_size=VOCABULARY, seq_len=SEQ)
    real = run_ranks(allocated, layout.world_size, kind, setting, False)
    planned = (
        measure(config, setting) if layout.world_size == 1 else as_one_of(layout.world_size, measure, config, setting)
    )
    # What gloo's threads still hold when they are done differs from rank to rank and from run to run.
    assert peak_of(planned) == pytest.approx(min(real), rel=0.05)


DEEP = {
    "gpt2": Model(preset="tiny-gpt2", overrides={"n_layer": 9}),
    "qwen3": Model(preset="tiny-qwen3", overrides={"num_hidden_layers": 9, "num_key_value_heads": 4}),
    "deepseek": Model(
        preset="671b",
        overrides={
            "num_hidden_layers": 9,
            "first_k_dense_replace": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "n_routed_experts": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
        },
    ),
}


def _both_ways(kind: str, settings: list[Setting]) -> list[tuple[Measured, Measured]]:
    """Each setting with few layers run and continued, and with all of them run."""
    config = model_config(DEEP[kind], vocab_size=512, seq_len=64)
    assert alike_at_the_end(config) == (7 if kind == "deepseek" else 9)
    continued = [measure(config, setting) for setting in settings]
    measuring._FEW = 100
    return list(zip(continued, [measure(config, setting) for setting in settings], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEEP)
def test_a_deep_model_is_not_what_a_shallow_one_says(kind: str) -> None:
    settings = [
        Setting(Layout(**axes), 64, 2, accumulates, recompute, accumulates, True, 64)
        for axes in (
            {"dp_shard": 4},
            {"dp_replicate": 2, "dp_shard": 2},
            {"dp_shard": 2, "tp": 2},
            {"dp_shard": 2, "cp": 2},
        )
        for recompute, accumulates in ((False, True), (True, False))
        if kind == "qwen3" or "dp_replicate" in axes
    ]
    if kind == "deepseek":  # its grouped products are bf16 only, on tensors without memory
        settings = [replace(setting, bf16=True) for setting in settings]
    for continued, whole in as_one_of(4, _both_ways, kind, settings):
        assert [(m.place, m.parts) for m in continued.moments] == [(m.place, m.parts) for m in whole.moments]
        assert continued.held == replace(whole.held, mean=pytest.approx(whole.held.mean))
        assert continued.sent == pytest.approx(whole.sent)
        assert continued.sent_before == pytest.approx(whole.sent_before)


def _in_turn(settings: list[Setting]) -> list[Measured]:
    return [measure(SMALL, setting) for setting in settings]


@pytest.mark.parametrize(
    "layout", [Layout(dp_shard=4), pytest.param(Layout(dp_shard=2, tp=2), marks=pytest.mark.slow)], ids=str
)
def test_what_was_measured_before_changes_what_is_measured(layout: Layout) -> None:
    here = [replace(PLAIN, layout=layout, micro_batch_size=n, accumulates=n < 4) for n in (1, 2, 4, 1)]
    first, *_, again = as_one_of(4, _in_turn, here)
    assert first == again


def _bytes_sent(settings: list[Setting]) -> list[dict[str, float]]:
    config = model_config(DEEP["qwen3"], vocab_size=512, seq_len=64)
    return [dict(measure(config, setting).sent) for setting in settings]


@pytest.mark.slow
def test_messages_are_counted_for_the_wrong_axis_or_not_at_all() -> None:
    plain = Setting(Layout(dp_shard=4), 64, 2, False, False, False, False, 64)
    model = model_facts(DEEP["qwen3"], 512, 64).parameters
    fsdp, ddp, tp, again, cp = as_one_of(
        4,
        _bytes_sent,
        [
            plain,
            replace(plain, layout=Layout(dp_replicate=4)),
            replace(plain, layout=Layout(dp_shard=2, tp=2)),
            replace(plain, layout=Layout(dp_replicate=2, tp=2)),
            replace(plain, layout=Layout(cp=4), recompute=True),
        ],
    )
    layers = model - 512 * 64 - 64  # embedding and final norm stay gathered from forward to backward
    # Gathered twice, the rest once, gradients scattered; of each three of four shards travel. A little padding.
    assert fsdp == {"dp_shard": pytest.approx(3 / 4 * 4 * (2 * layers + (model - layers) + model), rel=0.01)}
    assert ddp == {"dp_replicate": pytest.approx(2 * 3 / 4 * 4 * model, rel=0.01)}
    assert tp.keys() == {"dp_shard", "tp"} and again.keys() == {"dp_replicate", "tp"}
    assert again["tp"] == tp["tp"] > 0
    assert cp.keys() == {"dp_shard_cp", "cp"}


def _fail(how: str) -> None:
    if how == "die":
        raise SystemExit(3)
    raise PreflightError("refused") if how == "refuse" else ValueError("a bug")


def test_a_child_fails_and_nobody_hears_of_it_or_its_processes_stay(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PreflightError, match=r"^refused$"):
        as_one_of(2, _fail, "refuse")
    with pytest.raises(CheaptrainError, match="ValueError: a bug"):
        as_one_of(2, _fail, "bug")
    with pytest.raises(CheaptrainError, match="died"):
        as_one_of(2, _fail, "die")
    assert as_one_of(512, dist.get_world_size) == 512
    assert not dist.is_initialized()


def _measured_beside_a_group(rank: int, size: int, config: Any, setting: Setting) -> Measured | None:
    join(60)
    measured = as_one_of(4, measure, config, setting) if rank == 0 else None
    dist.barrier()
    return measured


@pytest.mark.slow
def test_measuring_disturbs_processes_that_train_or_takes_itself_for_one_of_them() -> None:
    config = model_config(spec_of("qwen3"), vocab_size=VOCABULARY, seq_len=SEQ)
    setting = replace(PLAIN, layout=Layout(dp_shard=4))
    beside, _ = run_ranks(_measured_beside_a_group, 2, config, setting)
    assert beside == as_one_of(4, measure, config, setting)


def _found(processes: int, usable: int, *, micro: int = 1, propose: bool = True) -> Found:
    """What is found for a small model and steps of 64 rows; `usable` in MB."""
    setting = replace(
        PLAIN, layout=Layout(dp_shard=processes), micro_batch_size=micro, accumulates=micro * processes < 64
    )
    wanted = Wanted(usable * 10**6, rows=64, nodes=True, parameters=0, propose=propose)
    return as_one_of(processes, find, SMALL, setting, TRAIN, wanted)


@pytest.mark.slow
def test_what_is_proposed_does_not_fit_or_is_not_the_cheapest() -> None:
    costs = []
    for usable in (100, 60, 45, 20):
        found = _found(16, usable)
        assert found.looked and found.cheapest is not None
        setting = found.cheapest.setting
        assert peak_bytes(as_one_of(16, measure, SMALL, setting), TRAIN) == found.cheapest.peak <= usable * 10**6
        assert setting.accumulates == (setting.micro_batch_size * setting.layout.data_parallel < 64)
        costs.append((setting.layout.tp, setting.recompute, -setting.layout.dp_replicate, -setting.micro_batch_size))
    assert costs[0] == (1, False, -2, -4)  # HSDP over two nodes, the whole step in one micro-batch
    assert costs == sorted(costs) and len(set(costs)) == len(costs) and costs[-1][0] > 1
    assert _found(16, 5).cheapest is None


@pytest.mark.slow
def test_the_mildest_change_that_fits_is_a_harsher_one() -> None:
    one_row = peak_bytes(_found(2, 10**6, propose=False).as_it_is, TRAIN) // 10**6 + 1
    found = _found(2, one_row, propose=False)
    assert found.fits and found.mildest is None and not found.looked
    found = _found(2, one_row, micro=32, propose=False)
    assert not found.fits and found.mildest is not None
    assert (found.mildest.setting.micro_batch_size, found.mildest.setting.recompute) == (1, False)
    assert found.mildest.setting.layout == Layout(dp_shard=2)
    found = _found(2, one_row - 2, micro=32, propose=False)
    assert found.mildest is not None and found.mildest.setting.recompute


def test_candidates_leave_processes_out() -> None:
    assert list(layouts(8, 1, True)) == [Layout(dp_shard=8)]
    assert list(layouts(64, 1, True)) == [Layout(8, 8), Layout(dp_shard=64)]
    assert list(layouts(64, 8, True)) == [Layout(8, 1, 1, 8), Layout(dp_shard=8, tp=8)]
    assert list(layouts(12, 1, True)) == [Layout(dp_shard=12)]
    assert list(layouts(6, 4, True)) == []


def reckoned(loaded: Any, *, gpus: bool = False) -> PlanReport:
    outlook = survey_leniently(loaded, planned_processes(loaded.recipe))
    return plan_report(outlook, device_to_plan_for(loaded.recipe.plan, gpus=gpus))


def shown(report: PlanReport) -> str:
    return " ".join("\n".join(line.plain for line in report_lines(report)).split())


def scaled(folder: Path, *keys: str) -> Any:
    batch = ("train.global_batch_tokens=4096", "train.micro_batch_size=1", "plan.gpu=H100")
    return tiny_recipe(folder, "tokenizer.train.vocab_size=512", "train.steps=2", *batch, *keys)


def test_ways_to_share_that_cost_messages_are_taken_without_need(tmp_path: Path) -> None:
    text = "\n".join(warnings(reckoned(scaled(tmp_path, "plan.gpus=8", "parallel.tp=2"))))
    assert "parallel.tp = 2 is not needed: dp_shard=8, train.micro_batch_size=8" in text
    text = "\n".join(warnings(reckoned(scaled(tmp_path, "plan.gpus=8", "parallel.cp=2"))))
    assert "parallel.cp = 2 is not needed: rows of 64 tokens fit without it" in text
    assert "not needed" not in "\n".join(warnings(reckoned(scaled(tmp_path, "plan.gpus=8"))))


def test_a_layout_that_cannot_be_is_planned_with(tmp_path: Path) -> None:
    loaded = scaled(tmp_path, "plan.gpus=4", "parallel.tp=4")  # 2 key/value heads
    report = reckoned(loaded)
    assert report.memory is None and "parallel.tp = 4 does not divide" in "\n".join(warnings(report))
    with pytest.raises(PreflightError, match=r"parallel\.tp = 4 does not divide"):
        print_plans([loaded], pipe()[0])


def test_rows_of_a_process_are_counted_by_processes_instead_of_readers(tmp_path: Path) -> None:
    report = reckoned(scaled(tmp_path, "plan.gpus=8", "parallel.tp=2", "train.micro_batch_size=16"))
    assert report.memory is not None
    assert "16 x 64 tokens" in {part.name: part.how for part in report.memory.parts}["activations"]
    assert "64 rows = 4 groups of 2 processes x micro-batch 16 x accumulation 1" in shown(report)


def test_memory_of_a_process_is_shown_as_one_sum_that_is_not_its_parts(tmp_path: Path) -> None:
    for keys in (("plan.gpus=1",), ("plan.gpus=8",), ("plan.gpus=8", "parallel.tp=2", "train.optimizer=muon")):
        report = reckoned(scaled(tmp_path, *keys))
        assert report.memory is not None and report.host is not None and report.outlook.facts is not None
        names = [part.name for part in report.memory.parts]
        assert {"weights", "optimizer"} < set(names) and len(names) == len(set(names))
        parameters, held = report.outlook.facts.parameters, report.memory.held.parameters
        assert report.memory.of("optimizer") == 8 * held - (4 * report.memory.held.hidden if "muon" in keys[-1] else 0)
        processes = report.outlook.world_size
        assert parameters / processes <= held == report.memory.held.mean <= 1.05 * parameters / processes
        assert report.host.building == 4 * parameters * processes
        assert report.host.copies == (4 * held + report.memory.of("optimizer")) * processes


@pytest.mark.parametrize(
    ("preset", "vocabulary", "parameters"),
    [
        ("7b", 128_256, 8_030_261_248),
        ("7b", 32_000, 7_241_732_096),
        ("70b", 128_256, 70_553_706_496),
        ("671b", 129_280, 671_026_404_352),
    ],
)
def test_a_preset_on_paper_is_another_model(preset: str, vocabulary: int, parameters: int) -> None:
    assert model_facts(Model(preset=preset), vocabulary, 4096).parameters == parameters


def test_671b_is_not_the_shape_that_transformers_publishes() -> None:
    from transformers import DeepseekV3Config

    ours, theirs = model_config(Model(preset="671b"), vocab_size=129_280, seq_len=4096), DeepseekV3Config()
    shape = [
        name for name in vars(theirs) if name.startswith(("num_", "n_", "hidden_", "moe_", "q_", "kv_", "qk_", "v_"))
    ]
    assert {"num_hidden_layers", "n_routed_experts", "q_lora_rank", "qk_rope_head_dim", "v_head_dim"} <= set(shape)
    shape += ["intermediate_size", "first_k_dense_replace", "vocab_size", "topk_group", "routed_scaling_factor"]
    assert {name: getattr(ours, name) for name in shape} == {name: getattr(theirs, name) for name in shape}


@pytest.mark.slow
def test_671b_is_said_to_be_trainable() -> None:
    report = reckoned(load_recipe("recipes/scale/671b.toml"))
    text = shown(report)
    assert report.memory is not None and report.fits == ""
    assert "needs expert parallelism, which cheaptrain does not have" in text
    # 256 experts over 512 processes: half of them hold one expert of each layer, half none.
    assert report.memory.held.parameters == pytest.approx(1.97 * report.memory.held.mean, rel=0.01)
    assert "it holds 2.59B parameters, the mean is 1.31B" in text


def test_gpus_of_an_unknown_kind_are_planned_for_in_silence(tmp_path: Path) -> None:
    report = reckoned(scaled(tmp_path, "plan.gpus=8", "plan.gpu=unset"), gpus=True)
    assert report.device.gpu == find_gpu("H100") and report.bf16
    assert "missing plan.gpu: reckoned with the H100" in shown(report)


def test_a_model_that_does_not_run_without_memory_cannot_be_planned_at_all(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 4}
    keys = [f"model.overrides.{name}={value}" for name, value in shape.items()]
    loaded = tiny_recipe(tmp_path, "model.preset=671b", "train.precision=fp32", *keys)
    report = reckoned(loaded)  # its grouped products exist in bf16 only
    assert report.memory is None and "memory unknown: RuntimeError: Expected inputs of BF16 type" in shown(report)
    assert "10 steps, 2,560 tokens" in shown(report)


@pytest.mark.parametrize("layout", ["tp", "tp=", "pp=2", "tp=2,tp=4", "dp_shard=8;tp=2", ""])
def test_a_layout_that_is_none_is_taken_for_one(layout: str) -> None:
    with pytest.raises(RecipeError, match=r"--layout|parallel\.(tp|dp_shard)"):
        load_recipe("recipes/phase1.toml", layout_overrides(8, layout))


def test_a_layout_on_the_command_line_leaves_axes_of_the_recipe_on(tmp_path: Path) -> None:
    assert layout_overrides(None, None) == []
    keys = ["parallel.cp=2", "parallel.dp_shard=2", *layout_overrides(64, "dp_replicate=4, tp=8")]
    loaded = tiny_recipe(tmp_path, *keys)
    assert loaded.recipe.plan.gpus == 64
    assert loaded.recipe.parallel.model_dump(include={"dp_replicate", "dp_shard", "cp", "tp"}) == {
        "dp_replicate": 4,
        "dp_shard": "auto",
        "cp": 1,
        "tp": 8,
    }


def test_waiting_for_messages_is_left_out_of_the_time_or_counted_twice() -> None:
    gpu = find_gpu("H100")
    assert gpu is not None
    how: dict[str, Any] = {"flops": 1e18, "mfu": 0.5, "accumulation": 1, "sent_before": {}}
    layout = Layout(dp_shard=8, tp=8)
    compute = 1e18 / (64 * 0.5 * 989e12)
    beside = predicted_step_seconds(layout, gpu, recompute=False, sent={"dp_shard": 1e9}, **how)
    assert (beside.compute, beside.waiting) == (pytest.approx(compute), 0)
    again = predicted_step_seconds(layout, gpu, recompute=True, sent={}, **how)
    assert again.total == pytest.approx(compute * 4 / 3)
    waited = predicted_step_seconds(layout, gpu, recompute=False, sent={"tp": 450e9}, **how)
    assert waited.waiting == pytest.approx(1 / 0.7)
    slow = predicted_step_seconds(layout, gpu, recompute=False, sent={"dp_shard": 5000e9}, **how)
    assert slow.total == pytest.approx(100 / 0.7)  # one network card each: 8 of 64 GPUs in a node hold the same shard
    accumulated = predicted_step_seconds(
        layout, gpu, recompute=False, sent={"tp": 1e9}, **how | {"accumulation": 5, "sent_before": {"tp": 2e9}}
    )
    assert accumulated.waiting == pytest.approx(9e9 / 450e9 / 0.7)


def test_a_ring_over_nodes_is_as_fast_as_one_inside() -> None:
    gpu = find_gpu("H100")
    assert gpu is not None
    reached = {
        axis: link_bytes_per_second(Layout(dp_replicate=4, dp_shard=8), axis, gpu) / 0.7
        for axis in ("dp_shard", "dp_replicate")
    }
    assert reached == pytest.approx({"dp_shard": 450e9, "dp_replicate": 50e9})
    assert link_bytes_per_second(Layout(dp_shard=32), "dp_shard", gpu) / 0.7 == pytest.approx(400e9)
    assert link_bytes_per_second(Layout(dp_shard=2, cp=8), "dp_shard_cp", gpu) / 0.7 == pytest.approx(400e9)
