"""What goes wrong when a plan and its run do not tell the same story."""

import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_recipe import pipe, tiny_recipe
from torch.profiler import ProfilerActivity, profile

from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.build import build_model
from cheaptrain.model.config import model_config
from cheaptrain.model.facts import model_facts
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import join
from cheaptrain.recipe.layout import Layout, planned_processes
from cheaptrain.recipe.load import LoadedRecipe, load_recipe
from cheaptrain.recipe.resolve import resolve
from cheaptrain.recipe.schema import Model, Train
from cheaptrain.report import costs
from cheaptrain.report.advice import warnings
from cheaptrain.report.device import Device, device_to_plan_for
from cheaptrain.report.measure import Setting, measure
from cheaptrain.report.memory import plan_memory
from cheaptrain.report.plan import print_plan, print_plans
from cheaptrain.report.plan_view import WIDTH, report_lines
from cheaptrain.report.reckon import PlanReport, plan_report
from cheaptrain.train.objective import Compute, next_token
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.outlook import survey_leniently
from cheaptrain.train.space import checkpoint_bytes, moment_bytes
from cheaptrain.train.step import train_step
from cheaptrain.train.survey import survey

REPOSITORY = Path(__file__).parent.parent
SHIPPED = sorted(
    path.relative_to(REPOSITORY) for path in REPOSITORY.glob("recipes/**/*.toml") if path.parent.name != "parts"
)
LAPTOP = Device("a laptop", False, None, 16_000_000_000, here=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def reckoned(loaded: LoadedRecipe, device: Device | None = None) -> PlanReport:
    return plan_report(
        survey_leniently(loaded, planned_processes(loaded.recipe)), device or device_to_plan_for(loaded.recipe.plan)
    )


def shown(report: PlanReport) -> str:
    return "\n".join(line.plain for line in report_lines(report))


QUICKLY_PLANNED = {"recipes/phase1.toml", "recipes/quickstart/phase2.toml"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=str(p), marks=() if str(p) in QUICKLY_PLANNED else pytest.mark.slow) for p in SHIPPED],
)
def test_a_shipped_recipe_cannot_be_planned_on_a_fresh_machine(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    tried = no_network(monkeypatch)
    loaded = {other: load_recipe(other, [f"data.dir={tmp_path}/data"]) for other in SHIPPED}
    chain = [loaded[path]]
    while (start := chain[0].recipe.model.init_from) is not None and not Path(start).exists():
        chain.insert(0, next(r for r in loaded.values() if Path(start).is_relative_to(r.recipe.run.dir)))
    console, written = pipe()
    usage = costs.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda _: usage._replace(free=10**15))
    print_plans(chain, console)
    blocks = written.getvalue().split("Plan of ")[1:]
    assert len(blocks) == len(chain)
    assert loaded[path].recipe.run.dir in blocks[-1]
    assert "not prepared: run  cheaptrain prepare" in blocks[-1]
    assert tried == []


def test_plan_and_run_disagree_about_steps_and_tokens(tmp_path: Path) -> None:
    loaded = tiny_recipe(tmp_path, "train.steps=unset", "train.tokens=2500", prepared=True)
    facts = survey(loaded, 1)
    report = reckoned(loaded, LAPTOP)
    assert report.outlook.resolved == facts.resolved == resolve(loaded.recipe, 1, facts.sources, facts.facts)
    assert (facts.resolved.steps, facts.resolved.tokens) == (10, 2560)
    text = shown(report)
    assert "10 steps, 2,560 tokens" in text
    assert "256 tokens a step = 4 rows x 64 tokens" in text
    assert "4 rows = 1 process x micro-batch 2 x accumulation 2" in text
    console, written = pipe()
    print_plan(facts, console)
    assert "10 steps, 2,560 tokens" in written.getvalue()


def test_an_unprepared_recipe_is_refused_instead_of_planned(tmp_path: Path) -> None:
    report = reckoned(tiny_recipe(tmp_path), LAPTOP)
    assert report.outlook.tokenizer is None and not report.outlook.manifests
    assert report.outlook.vocab_size == 340  # what [tokenizer.train] asks for
    text = shown(report)
    assert text.count("not prepared  ") == 2 and f"cheaptrain prepare {tmp_path}/tiny.toml" in text
    (web, drills) = report.sources
    assert web.tokens_estimated == (tmp_path / "web.jsonl").stat().st_size // 4
    assert drills.tokens_estimated == 60 * 200 // 4


def test_a_length_that_data_decides_is_made_up(tmp_path: Path) -> None:
    report = reckoned(tiny_recipe(tmp_path, "train.steps=unset", "train.epochs=1"), LAPTOP)
    assert report.outlook.resolved is None and report.seconds is None
    assert "length    unknown" in shown(report)
    assert "cheaptrain prepare" in report.outlook.open_questions[-1]


def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Cut the network off; the list fills with what somebody tried to reach."""
    tried: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        tried.append(address)  # an error alone would be swallowed by whoever retries
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


def test_plan_waits_for_a_network_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = no_network(monkeypatch)
    loaded = tiny_recipe(
        tmp_path,
        "tokenizer.train=unset",
        "tokenizer.path=nobody/has-this-tokenizer",
        "model.preset=mobilellm-140m",
        "plan.gpu=H200",
    )
    report = reckoned(loaded)
    assert report.outlook.facts is not None and report.outlook.facts.parameters == 140_250_432
    assert any("nobody/has-this-tokenizer" in question for question in report.outlook.open_questions)
    assert any("128,256" in question for question in report.outlook.open_questions)
    assert tried == []


def test_a_tokenizer_nobody_knows_gets_a_made_up_size(tmp_path: Path) -> None:
    report = reckoned(
        tiny_recipe(tmp_path, "tokenizer.train=unset", "tokenizer.path=nobody/has-this-tokenizer"), LAPTOP
    )
    assert report.outlook.facts is None and report.memory is None
    assert "size unknown" in shown(report)


def test_a_stage_that_starts_from_the_one_before_cannot_be_planned(tmp_path: Path) -> None:
    first = tiny_recipe(tmp_path)
    (tmp_path / "two").mkdir()
    second = tiny_recipe(tmp_path / "two", "model.preset=unset", f"model.init_from={tmp_path}/run/final")
    console, written = pipe()
    print_plans([first, second], console)
    assert f"weights from {tmp_path}/run/final (Qwen3ForCausalLM)" in written.getvalue()
    with pytest.raises(RecipeError, match="run/final"):
        print_plans([second], console)


def test_time_is_made_up_when_nothing_is_known(tmp_path: Path) -> None:
    report = reckoned(tiny_recipe(tmp_path), LAPTOP)
    assert report.speed is None and report.seconds is None and report.dollars is None
    assert "time      unknown" in shown(report) and "$" not in shown(report)


def test_time_and_cost_do_not_follow_from_what_was_stated(tmp_path: Path) -> None:
    stated = ("plan.tokens_per_second=2", "plan.gpus=2", "plan.dollars_per_gpu_hour=3")
    report = reckoned(tiny_recipe(tmp_path, *stated), LAPTOP)
    assert report.seconds == 2560 / (2 * 2)
    assert report.dollars == pytest.approx(640 / 3600 * 3 * 2)
    assert "10m 40s at 2 tokens/s x 2 processes" in shown(report)


def test_an_assumed_speed_looks_measured(tmp_path: Path) -> None:
    report = reckoned(tiny_recipe(tmp_path, "plan.gpu=H200", "plan.mfu=0.5"))
    assert report.speed is not None and report.outlook.facts is not None
    assert report.speed.tokens_per_second == pytest.approx(0.5 * 989e12 / report.outlook.facts.flops_per_token)
    assert "assumed: 50%" in shown(report)


def test_speed_of_another_kind_of_machine_counts_as_measured(tmp_path: Path) -> None:
    loaded = tiny_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    metrics = tmp_path / "run" / "metrics.jsonl"
    cpu = [{"step": i, "train/tokens_per_second_per_gpu": speed} for i, speed in enumerate((10.0, 400.0, 500.0))]
    gpu = [{"step": i, "train/tokens_per_second_per_gpu": 9e9, "system/gpu_memory": 1} for i in range(3, 9)]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in cpu + gpu) + '{"torn')
    report = reckoned(loaded, LAPTOP)
    assert report.speed is not None and report.speed.tokens_per_second == 400.0
    assert "measured: median of 3 steps" in shown(report)
    assert reckoned(loaded, Device("another", False, None, 10**12, here=False)).speed is None


def test_an_unknown_gpu_is_planned_for_in_silence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"H9000.*H200"):
        print_plans([tiny_recipe(tmp_path, "plan.gpu=H9000")], pipe()[0])


def test_no_space_is_noticed_after_days_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_recipe(tmp_path)
    usage = costs.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    console, written = pipe()
    with pytest.raises(PreflightError, match=r"10 MB free.*checkpoints") as raised:
        print_plans([loaded], console)
    assert raised.value.exit_code == 3
    assert "10 steps, 2,560 tokens" in written.getvalue()  # the plan is printed all the same
    print_plans([tiny_recipe(tmp_path, "plan.gpu=B200")], console)  # planned for another machine: only a warning
    assert "10 MB free on this machine" in written.getvalue()


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_remedy_for_too_little_memory_does_not_fit_either(tmp_path: Path, checkpointing: bool) -> None:
    keys = ["plan.gpu=L4", "model.preset=mobilellm-950m", "data.seq_len=2048", "train.steps=10"]
    keys += ["train.global_batch_tokens=262144", "train.micro_batch_size=64", "checkpoint.every=10 steps"]
    keys += [f"train.activation_checkpointing={str(checkpointing).lower()}"]
    report = reckoned(tiny_recipe(tmp_path, *keys))
    assert report.memory is not None and report.memory.peak > 24_000_000_000
    assert report.fits and report.fits in "\n".join(warnings(report))
    changes = [change.replace(" = ", "=") for change in report.fits.split(" and ")]
    assert reckoned(tiny_recipe(tmp_path, *keys, *changes)).fits is None


@pytest.mark.parametrize(
    ("preset", "rows", "vocabulary", "changes", "bf16"),
    [
        ("quickstart", 4, 2048, {}, False),
        ("quickstart", 4, 2048, {"activation_checkpointing": True}, False),
        ("quickstart", 1, 2048, {"global_batch_tokens": 512}, True),
        ("quickstart", 2, 16384, {"optimizer": "muon", "loss_chunk_tokens": 256}, True),
        ("tiny-gpt2", 4, 2048, {}, False),
        ("tiny-llama4", 4, 2048, {"global_batch_tokens": 2048}, False),
    ],
)
def test_memory_is_planned_too_low_or_too_high(
    preset: str, rows: int, vocabulary: int, changes: dict[str, object], bf16: bool
) -> None:
    seq_len = 256
    spec = Model.model_validate({"preset": preset})
    train = Train.model_validate(
        {"steps": 1, "global_batch_tokens": rows * seq_len, "micro_batch_size": rows, "lr": 1e-3} | changes
    )
    accumulation = train.global_batch_tokens // (rows * seq_len)
    config = model_config(spec, vocab_size=vocabulary, seq_len=seq_len)
    setting = Setting(
        layout=Layout(),
        seq_len=seq_len,
        micro_batch_size=rows,
        accumulates=accumulation > 1,
        recompute=train.activation_checkpointing,
        bf16=bf16,
        masked=True,
        loss_chunk_tokens=train.loss_chunk_tokens,
    )
    planned = plan_memory(measure(config, setting), train, model_facts(spec, vocabulary, seq_len), config).peak
    (measured,) = run_ranks(measured_peak, 1, spec, train, vocabulary, seq_len, accumulation, bf16)
    assert planned == pytest.approx(measured, rel=0.05)


def measured_peak(
    _: int, __: int, spec: Model, train: Train, vocabulary: int, seq_len: int, accumulation: int, bf16: bool
) -> int:
    """The most that PyTorch's allocator holds in the second optimizer step of a real model, as its profiler saw it."""
    join(60)
    model = build_model(spec, vocab_size=vocabulary, seq_len=seq_len, seed=0, eot_id=0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    mesh = make_mesh(Layout(), "cpu")
    root = parallelize(model, mesh, dtype=dtype, recompute=train.activation_checkpointing)
    optimizers = build_optimizers(model, train)
    compute = Compute(torch.device("cpu"), dtype, document_mask=True, loss_chunk_tokens=train.loss_chunk_tokens)
    batches = [two_documents(train.micro_batch_size, seq_len, vocabulary) for _ in range(accumulation)]

    def step() -> None:
        train_step(
            root,
            optimizers,
            batches,
            mesh=mesh,
            objective=next_token,
            compute=compute,
            sources=1,
            learning_rate_factor=1.0,
            grad_clip=1.0,
        ).result()

    step()
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *states) if torch.is_tensor(tensor))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return held + int(np.cumsum(events).max())


def two_documents(rows: int, seq_len: int, vocabulary: int) -> RowBatch:
    ids = torch.randint(0, vocabulary, (rows, seq_len))
    documents = torch.zeros(rows, seq_len, dtype=torch.int32)
    documents[:, seq_len // 2 :] = 1
    positions = torch.arange(seq_len).remainder(seq_len // 2).expand(rows, seq_len).clone()
    return RowBatch(ids, ids.clone(), positions, documents, np.zeros(rows, np.int64), rows * seq_len)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_larger_than_planned(optimizer: str) -> None:
    spec = Model.model_validate({"preset": "tiny-qwen3"})
    train = Train.model_validate({"steps": 1, "global_batch_tokens": 64, "lr": 1e-3, "optimizer": optimizer})
    model = build_model(spec, vocab_size=512, seq_len=64, seed=0, eot_id=0)
    optimizers = build_optimizers(model, train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for each in optimizers:
        each.step()
    states = [value for each in optimizers for state in each.state.values() for value in state.values()]
    moments = sum(tensor.nbytes for tensor in states if torch.is_tensor(tensor) and tensor.dim() > 0)
    facts = model_facts(spec, 512, 64)
    assert moment_bytes(facts, train) == moments
    assert checkpoint_bytes(facts, train) > moments + 4 * facts.parameters


def test_a_source_is_repeated_without_a_word(tmp_path: Path) -> None:
    keys = ("train.steps=60", "data.sources.drills.max_epochs=9", "data.sources.web.max_epochs=9")
    report = reckoned(tiny_recipe(tmp_path, *keys, prepared=True), LAPTOP)
    repeated = [source.name for source in report.sources if source.epochs is not None and source.epochs > 1]
    assert repeated
    for name in repeated:
        assert any(re.match(rf"{name} is read \d+\.\d\d times \(allowed: 9\)", text) for text in warnings(report))


def test_too_many_epochs_pass_while_another_source_is_missing(tmp_path: Path) -> None:
    tiny_recipe(tmp_path, prepared=True)
    keys = ("data.sources.drills.drills.seed=1", "train.steps=2000", "data.sources.drills.weight=0.01")
    with pytest.raises(RecipeError, match=r"data\.sources\.web.*epochs"):
        reckoned(tiny_recipe(tmp_path, *keys), LAPTOP)


def test_a_careless_recipe_gets_no_warning(tmp_path: Path) -> None:
    keys = ("train.warmup=20%", "data.validation=0.0", "model.vocab_multiple=1024", "plan.tokens_per_second=0.1")
    text = "\n".join(warnings(reckoned(tiny_recipe(tmp_path, *keys, prepared=True), LAPTOP)))
    assert "warm-up takes 20% of the run" in text
    assert "nothing is held out" in text
    assert re.search(r"\d+% of the vocabulary of 1,024 is never used", text)
    assert "less than 1, against 20" in text
    assert "a crash can cost" in text


def test_a_line_is_folded_where_nobody_sees_a_terminal(tmp_path: Path) -> None:
    loaded = tiny_recipe(tmp_path, "train.schedule=wsd", "train.optimizer=muon", prepared=True)
    console, written = pipe()
    print_plans([loaded], console)
    lines = written.getvalue().splitlines()
    assert "\x1b" not in written.getvalue()
    assert [line for line in lines if len(line) > WIDTH and str(tmp_path) not in line] == []
    assert lines == shown(reckoned(loaded)).splitlines()


@pytest.mark.parametrize(("hidden", "heads", "kv_heads", "ffn"), [(64, 4, 2, 128), (128, 8, 2, 192), (64, 8, 4, 512)])
def test_the_documented_formula_is_not_what_a_layer_keeps(hidden: int, heads: int, kv_heads: int, ffn: int) -> None:
    shape = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    overrides = shape | {"intermediate_size": ffn}
    seq_len, a, k = 128, heads * 16, kv_heads * 16

    def of_a_token(bf16: bool, mask: bool) -> float:
        """What one layer more keeps at the loss."""
        setting = Setting(Layout(), seq_len, 1, False, False, bf16, mask, 64)
        kept = []
        for layers in (2, 3):
            config = model_config(
                Model.model_validate({"preset": "tiny-qwen3", "overrides": {**overrides, "num_hidden_layers": layers}}),
                vocab_size=300,
                seq_len=seq_len,
            )
            (loss,) = (moment for moment in measure(config, setting).moments if moment.place == "loss")
            kept.append(loss.parts["activations"])
        return (kept[1] - kept[0]) / seq_len

    statistics = 4 * (2 + 2 * heads + kv_heads)  # of the norms and of attention, fp32
    assert of_a_token(bf16=False, mask=False) == 24 * hidden + 16 * a + 16 * k + 16 * ffn + statistics
    assert of_a_token(bf16=True, mask=False) == 26 * hidden + 10 * a + 10 * k + 8 * ffn + statistics
    assert of_a_token(bf16=False, mask=True) == of_a_token(bf16=False, mask=False) + 4 * seq_len
