"""A kernel is chosen because it is right, then because it is fast; and a run that goes on takes the one it had.

The kernels are stand-ins on a CPU with a known duration each; the clock reads that.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, Qwen3Config

from cheaptrain.checkpoint.launch_record import recorded_launch
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.errors import PreflightError
from cheaptrain.model.attention import DEFAULT, AttentionChoice
from cheaptrain.model.attention import choice as attention_choice
from cheaptrain.model.attention import kernels as attention_kernels
from cheaptrain.model.attention import libraries as attention_libraries
from cheaptrain.model.attention.check import written_out
from cheaptrain.model.attention.choice import AttentionShape, Trial, attention_shape, sample_documents, try_attention
from cheaptrain.model.attention.packing import packing_of
from cheaptrain.train import attention
from cheaptrain.train.attention import RECORD, choose_attention, recorded_choices

torch.set_num_threads(1)

CPU = torch.device("cpu")
SHAPE = AttentionShape(rows=1, seq=64, heads=4, kv_heads=2, head_dim=8)


def _right(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scaling: float | None) -> Tensor:
    heads = (x.float() for x in (query, key, value))
    return written_out(*heads, documents, scaling).transpose(1, 2).to(query.dtype)


def _leaky(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scaling: float | None) -> Tensor:
    """Documents see each other."""
    return _right(query, key, value, torch.zeros_like(documents), scaling)


def _unscaled(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scaling: float | None) -> Tensor:
    return _right(query, key, value, documents, None)


class _SpoiltBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (torch.arange(gradient.shape[2]) != 0)[:, None]  # the first token of each row is forgotten


def _spoilt(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scaling: float | None) -> Tensor:
    return _right(query, key, _SpoiltBackward.apply(value), documents, scaling)


def _not_a_number(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scaling: float | None) -> Tensor:
    return _right(query, key, value, documents, scaling) * float("nan")


def _too_large(query: Tensor, *others: Any) -> Tensor:
    if query.shape[2] == SHAPE.seq:  # not at the size of the proof
        raise torch.OutOfMemoryError("CUDA out of memory")
    return _right(query, *others)


def _unable(*inputs: Any) -> Tensor:
    raise RuntimeError("No available kernel. Aborting execution.\nC++ trace")


Attend = Callable[..., Tensor]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, tuple[Attend, float]]], None]:
    """Gives kernels by name something else to do, and a duration in milliseconds. The others are not there."""

    def install(given: Mapping[str, tuple[Attend, float]]) -> None:
        spent = [0.0]

        def run(name: str, query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scaling: Any) -> Tensor:
            attend, spent[0] = given.get(name, (_unable, 0.0))
            return attend(query, key, value, documents, scaling)

        def alone(name: str, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
            whole = torch.zeros(query.shape[0], query.shape[2])
            return run(name, query, key, value, whole, scaling)

        def packed(
            name: str, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, dropout: float, scaling: Any
        ) -> Tensor:
            rows, _, seq, _ = query.shape
            documents = torch.searchsorted(boundaries, torch.arange(rows * seq, dtype=torch.int32), right=True)
            return run(name, query, key, value, documents.view(rows, seq), scaling)

        def clock(work: Callable[[], None]) -> float:
            work()
            return spent[0]

        monkeypatch.setattr(attention_kernels, "sdpa_alone", alone)
        monkeypatch.setattr(attention_kernels, "packed", packed)
        monkeypatch.setattr(attention_kernels, "causal", lambda n, q, k, v, dropout, s: alone(n, q, k, v, s))
        monkeypatch.setattr(attention_choice, "_cpu_clock", clock)
        there = partial(given.__contains__)
        monkeypatch.setattr(attention_libraries, "why_not", lambda name: None if there(name) else "not installed")
        # A stand-in is looked into by the compiler, where a kernel is not; what it breaks has a test of its own.
        monkeypatch.setattr(attention_choice.torch, "compile", lambda function, **settings: function)

    return install


def test_the_fastest_is_not_taken(stand_in: Any) -> None:
    stand_in({"cudnn": (_right, 2.274), "flash": (_right, 3.56), "flash3": (_right, 2.5)})
    trial = try_attention(SHAPE, CPU)
    assert trial.milliseconds == {"cudnn": 2.274, "flash": 3.56, "flash3": 2.5} and trial.fastest == "cudnn"
    assert str(trial) == (
        "cuDNN 2.27 ms a layer (flash-attn 3 2.50, flash 3.56, efficient does not do this shape here, "
        "flash-attn 2 not installed, flash-attn 4 not installed)"
    )


@pytest.mark.parametrize("wrong", [_leaky, _unscaled, _spoilt, _not_a_number])
def test_a_kernel_that_is_fast_and_wrong_is_chosen(stand_in: Any, wrong: Attend) -> None:
    stand_in({"varlen": (_right, 5.0), "flash2": (wrong, 0.1)})
    trial = try_attention(SHAPE, CPU, sample_documents(1, 64))
    assert trial.fastest == "varlen" and list(trial.milliseconds) == ["varlen"]
    assert trial.refused["flash2"].startswith("is wrong by")


def test_a_kernel_that_runs_out_of_memory_ends_the_run(stand_in: Any) -> None:
    stand_in({"cudnn": (_too_large, 0.1), "flash": (_right, 3.0)})
    trial = try_attention(SHAPE, CPU)
    assert trial.fastest == "flash" and trial.refused["cudnn"] == "does not fit in memory at this shape"


def test_a_library_that_a_compiled_layer_cannot_hold_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def launches(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        torch._dynamo.graph_break()
        return _right(*(x.transpose(1, 2) for x in (query, key, value)), torch.zeros(query.shape[:2]), None)

    monkeypatch.setattr(attention_libraries, "_CAUSAL", {"flash3": launches})
    trial = try_attention(SHAPE, CPU, names=["flash3"])
    assert trial.refused == {"flash3": "breaks the graph of a compiled layer"}


def test_a_library_is_refused_after_some_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each compiles, and torch gives up on a function that was compiled too often."""

    def attends(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None, causal: bool) -> Tensor:
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return _right(*heads, torch.zeros(query.shape[:2]), softmax_scale)

    torch._dynamo.reset()
    monkeypatch.setattr(attention_choice, "_milliseconds", lambda run, device: 1.0)
    monkeypatch.setattr(attention_libraries, "_CAUSAL", {"flash3": attends, "flash4": attends})
    with torch._dynamo.config.patch(recompile_limit=2):  # monkeypatch would leave the setting deleted
        for number, name in enumerate(["flash3", "flash4", "flash3", "flash4"]):
            shape = AttentionShape(rows=1, seq=64, heads=4 + 2 * number, kv_heads=2 + number, head_dim=8)
            assert try_attention(shape, CPU, names=[name]).milliseconds == {name: 1.0}


def test_a_kernel_without_dropout_is_chosen_for_a_model_that_has_some(stand_in: Any) -> None:
    stand_in({"flash": (_right, 3.0), "flash3": (_right, 1.0)})
    trial = try_attention(AttentionShape(1, 64, 4, 2, 8, dropout=0.1), CPU)
    assert trial.fastest == "flash" and trial.refused["flash3"] == "has no attention dropout"


def test_trying_draws_random_numbers(stand_in: Any) -> None:
    stand_in({"cudnn": (_right, 1.0)})
    before = torch.get_rng_state()
    try_attention(SHAPE, CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_packed_rows_to_time_with_are_one_document_each() -> None:
    for rows, seq in ((2, 2048), (1, 32768), (3, 7), (1, 2)):
        documents = sample_documents(rows, seq)
        packing = packing_of(documents, True)
        assert documents.shape == (rows, seq) and packing.boundaries is not None
        lengths = packing.boundaries.diff()
        assert int(lengths.sum()) == rows * seq
    assert 350 < int(packing_of(sample_documents(1, 32768), True).boundaries.diff()[:60].float().mean()) < 650


def test_heads_of_the_model_are_not_those_that_are_tried() -> None:
    qwen = Qwen3Config(num_attention_heads=24, num_key_value_heads=6, head_dim=64, hidden_size=1024)
    assert attention_shape(qwen, 16, 2048) == AttentionShape(16, 2048, 24, 6, 64)
    assert attention_shape(qwen, 16, 2048, processes=2) == AttentionShape(16, 2048, 12, 3, 64)
    assert attention_shape(GPT2Config(n_head=12, n_embd=768), 4, 512) == AttentionShape(4, 512, 12, 12, 64, 0.1)
    assert attention_shape(SimpleNamespace(num_attention_heads=4, v_head_dim=128), 1, 8) is None


# What a stage does with it. The device is a GPU in name; the trials are given.

QWEN = Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
TRIALS = {
    False: Trial({"cudnn": 2.0, "flash": 3.0}, {"flash3": "not installed"}),
    True: Trial({"varlen": 1.5, "flash2": 1.2}, {"flash3": "not installed"}),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What was tried and said on a GPU, and `choose`, for a student unless told otherwise."""
    machine = SimpleNamespace(name="H200", tried=[], said=[])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: machine.name)

    def trial(shape: AttentionShape, device: Any, documents: Tensor | None, names: tuple[str, ...]) -> Trial:
        whole = TRIALS[documents is not None]
        machine.tried.append((shape, documents, names))
        return Trial(
            {name: ms for name, ms in whole.milliseconds.items() if name in names},
            {name: reason for name, reason in whole.refused.items() if name in names},
        )

    monkeypatch.setattr(attention, "try_attention", trial)
    monkeypatch.setattr(attention_libraries, "why_not", lambda name: None)
    processes = SimpleNamespace(
        device=torch.device("cuda"), on_main=lambda work: work(), all_of=lambda value: [value], rank=0
    )

    def choose(config: Any = QWEN, **changed: Any) -> tuple[AttentionChoice, dict[str, Any]]:
        settings = {
            "whose": "student", "asked": "auto", "rows": 2, "seq_len": 64, "shared_by": 1, "dtype": torch.bfloat16,
            "document_mask": True, "documents": lambda: sample_documents(2, 64), "processes": processes, "earlier": {},
            "report": machine.said.append,
        }  # fmt: skip
        return choose_attention(config, **settings | changed)

    machine.choose, machine.processes = choose, processes
    return machine


def test_the_fastest_of_each_situation_is_not_what_the_run_takes(gpu: SimpleNamespace) -> None:
    choice, record = gpu.choose()
    assert choice == AttentionChoice("cudnn", "flash2")
    assert record["choice"] == {"causal": "cudnn", "packed": "flash2"}
    assert record["trials"]["packed"]["milliseconds"] == {"varlen": 1.5, "flash2": 1.2}
    assert gpu.said == [
        "attention: cuDNN 2.00 ms a layer (flash 3.00, flash-attn 3 not installed)",
        "attention, packed documents: flash-attn 2 1.20 ms a layer (varlen 1.50, flash-attn 3 not installed)",
    ]
    assert gpu.choose(document_mask=False)[0] == AttentionChoice("cudnn", DEFAULT.packed)
    assert gpu.tried[-1][1] is None  # nothing packed was timed


def test_rows_of_the_run_are_not_those_it_is_timed_with(gpu: SimpleNamespace) -> None:
    own = sample_documents(2, 64, mean=7)
    gpu.choose(documents=lambda: own)
    assert torch.equal(gpu.tried[1][1], own)
    gpu.choose(documents=lambda: torch.zeros(2, 64))  # one document each: packed ones are made up
    assert packing_of(gpu.tried[3][1], True).boundaries is not None


def test_a_kernel_that_was_asked_for_and_cannot_be_had_is_replaced(gpu: SimpleNamespace) -> None:
    with pytest.raises(PreflightError, match=r'train\.attention = "flash3": flash-attn 3 not installed'):
        gpu.choose(asked="flash3")
    with pytest.raises(PreflightError, match="document_mask = false"):
        gpu.choose(asked="varlen", document_mask=False)
    with pytest.raises(PreflightError, match="in bf16, and this is fp32"):
        gpu.choose(asked="cudnn", dtype=torch.float32)
    gpu.processes.device = CPU
    with pytest.raises(PreflightError, match="this is a CPU"):
        gpu.choose(asked="flash2")
    assert gpu.choose() == (DEFAULT, {}) and gpu.choose(dtype=torch.float32) == (DEFAULT, {})


def test_a_kernel_that_was_asked_for_is_dropped_without_a_word(gpu: SimpleNamespace) -> None:
    assert gpu.choose(asked="flash")[0] == AttentionChoice("flash", "flash2")
    assert gpu.said[-1].endswith("(train.attention = flash is no kernel for packed documents)")
    assert gpu.choose(asked="varlen")[0] == AttentionChoice("cudnn", "varlen")


def test_a_resumed_run_measures_again_and_takes_another_kernel(
    gpu: SimpleNamespace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    assert recorded_choices(run) == {}
    first, record = gpu.choose()
    with recorded_launch(run, {"name": "a"}, print) as note:
        note({RECORD: {"student": record}})
    tried = len(gpu.tried)
    monkeypatch.setitem(TRIALS, True, Trial({"varlen": 1.0, "flash2": 1.2}))  # the other one is faster today
    with recorded_launch(run, {"name": "a"}, print):
        earlier = recorded_choices(run)
        again, kept = gpu.choose(earlier=earlier)
    assert again == first == AttentionChoice("cudnn", "flash2") and len(gpu.tried) == tried
    assert kept == record and gpu.said[-1] == "attention: as before, cuDNN, flash-attn 2 for packed documents"
    for change in ({"rows": 4}, {"asked": "varlen"}, {"document_mask": False}):
        gpu.choose(earlier=earlier, **change)
        assert any("measured again" in line for line in gpu.said[-3:]), change
    gpu.name = "B200"
    assert gpu.choose(earlier=earlier)[0] == AttentionChoice("cudnn", "varlen")
    with recorded_launch(run, {"name": "a"}, print):  # a launch that chose nothing hides none before it
        assert recorded_choices(run) == {"student": record}


def test_a_machine_without_the_chosen_library_finds_out_in_the_first_step(gpu: SimpleNamespace) -> None:
    gpu.processes.all_of = lambda reasons: [reasons, {"flash2": "not installed"}]
    with pytest.raises(PreflightError, match=r"flash-attn 2 was chosen .* not installed where rank 1 does"):
        gpu.choose()


def test_other_processes_measure_for_themselves(gpu: SimpleNamespace) -> None:
    """One of two that is not the main one: it takes what it is told."""
    told = iter([{"anything": 1}, {"causal": Trial({"flash": 1.0}), "packed": Trial({"varlen": 1.0})}])
    gpu.processes.on_main = lambda work: next(told)
    assert gpu.choose()[0] == AttentionChoice("flash", "varlen")
    assert gpu.tried == []


def test_a_teacher_takes_the_kernels_of_its_student(gpu: SimpleNamespace) -> None:
    _, student = gpu.choose()
    gpu.choose(Qwen3Config(num_attention_heads=8, num_key_value_heads=8, head_dim=16), whose="teacher",
               earlier={"student": student})  # fmt: skip
    assert gpu.tried[-1][0] == AttentionShape(2, 64, 8, 8, 16)
    assert gpu.said[-1].startswith("attention of the teacher, packed documents: flash-attn 2")
    assert gpu.choose(whose="teacher", asked="cudnn", dtype=torch.float32) == (DEFAULT, {})
    assert "fp32" in gpu.said[-1]


def test_heads_of_several_sizes_are_proven_as_one(gpu: SimpleNamespace) -> None:
    odd = SimpleNamespace(num_attention_heads=4, v_head_dim=128)
    assert gpu.choose(odd) == (DEFAULT, {}) and "not all of one size" in gpu.said[-1] and not gpu.tried
    with pytest.raises(PreflightError, match="not all of one size"):
        gpu.choose(odd, asked="cudnn")


def test_no_kernel_at_all_ends_the_run(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRIALS, False, Trial({}, {"cudnn": "does not do this shape here"}))
    choice, record = gpu.choose()
    assert choice.causal == DEFAULT.causal and asdict(choice) == record["choice"]
    assert gpu.said[0] == "attention: cuDNN does not do this shape here; none was chosen, torch takes what it can"
