"""What a teacher takes, as the plan has it: held against a real one, and against common sense."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cheaptrain_kernels import DistillationLoss

from cheaptrain.model.config import model_config
from cheaptrain.model.facts import model_facts
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Model, Train
from cheaptrain.report.lesson import Lesson
from cheaptrain.report.measure import Measured, Setting, measure
from cheaptrain.report.memory import host_memory, plan_memory
from cheaptrain.report.pretend import as_one_of
from cheaptrain.report.tracker import LOSS, TEACHER

torch.set_num_threads(1)
SEQ, VOCAB, ALONE = 128, 3000, Layout()
STUDENT = Model(preset="tiny-qwen3", overrides={"num_key_value_heads": 2})
TRAIN = Train(steps=1, global_batch_tokens=4 * SEQ, lr=1e-3)


def _spec(layers: int) -> Model:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers}
    return Model(preset="tiny-llama", overrides=shape | {"num_attention_heads": 4, "num_key_value_heads": 4})


def _lesson(layers: int = 8, **changes: Any) -> Lesson:
    spec = _spec(layers)
    config, facts = (of(spec, vocab_size=VOCAB, seq_len=SEQ) for of in (model_config, model_facts))
    lesson = Lesson(config, facts, torch.bfloat16, DistillationLoss(), VOCAB, None, False)
    return replace(lesson, **changes)


def _measured(lesson: Lesson | None, layout: Layout = ALONE, rows: int = 4) -> Measured:
    setting = Setting(layout, SEQ, rows, False, False, False, True, 64, lesson)
    config = model_config(STUDENT, vocab_size=VOCAB, seq_len=SEQ)
    if layout.world_size == 1:
        return measure(config, setting)
    return as_one_of(layout.world_size, measure, config, setting)


def _weights(lesson: Lesson) -> int:
    assert lesson.facts is not None
    return lesson.facts.parameters * lesson.dtype.itemsize


def test_a_teacher_is_counted_once_all_the_time_and_with_its_own_pass() -> None:
    lesson = _lesson()
    alone, taught = _measured(None), _measured(lesson)
    assert 0 <= taught.teacher - _weights(lesson) < 10_000  # and buffers of positions
    assert taught.held == alone.held, "the teacher is none of the student's parameters"
    assert {moment.place for moment in taught.moments} == {moment.place for moment in alone.moments} | {"teacher"}
    by_place = {moment.place: moment for moment in taught.moments}
    # Its pass takes the activations of about one layer: [tokens, 512] twice in bf16, and a mask.
    assert 0 < by_place["teacher"].parts[TEACHER] - taught.teacher < 30 * 4 * SEQ * 512
    for moment in alone.moments:
        assert by_place[moment.place].parts[TEACHER] == taught.teacher
    facts = model_facts(STUDENT, vocab_size=VOCAB, seq_len=SEQ)
    config = model_config(STUDENT, vocab_size=VOCAB, seq_len=SEQ)
    plan = plan_memory(taught, TRAIN, facts, config)
    assert plan.of(TEACHER) in (taught.teacher, by_place["teacher"].parts[TEACHER])
    assert plan.peak >= plan_memory(alone, TRAIN, facts, config).peak + taught.teacher


def test_a_deep_teacher_measured_on_few_layers_is_what_all_its_layers_take() -> None:
    from cheaptrain.report import measure as module

    for layout in (Layout(), Layout(dp_shard=4)):
        few = _measured(_lesson(12), layout)
        try:
            module._FEW = 99  # then every layer is run
            every = _measured(_lesson(12), layout)
        finally:
            module._FEW = 3
        assert few.teacher == every.teacher
        assert [m.parts for m in few.moments if m.place == "teacher"] == [
            m.parts for m in every.moments if m.place == "teacher"
        ]
        assert few.sent == pytest.approx(every.sent) and few.sent_before == pytest.approx(every.sent_before)


def test_layers_of_a_teacher_are_sharded_and_its_head_is_not() -> None:
    lesson = _lesson(16)
    assert lesson.facts is not None
    embedding = lesson.facts.embedding_parameters * 2
    layers = _weights(lesson) - embedding
    for layout in (Layout(dp_shard=4), Layout(dp_shard=2, tp=2)):
        sharded = _measured(lesson, layout)
        rows = 1 / layout.tp
        # The shard of embedding and head stays beside what was gathered of them.
        assert sharded.teacher == pytest.approx(layers / 4 + embedding * rows + embedding / 4, rel=0.05)
        assert sum(sharded.sent.values()) > sum(_measured(None, layout).sent.values()) + 0.5 * layers


def test_a_cached_teacher_takes_nothing_and_an_int8_one_half_of_bf16() -> None:
    cached = _measured(_lesson(config=None, facts=None, top_k=8))
    assert cached.teacher == 0 and "teacher" not in {moment.place for moment in cached.moments}
    whole, halved = _measured(_lesson()), _measured(_lesson(quantised=True))
    facts = _lesson().facts
    assert facts is not None
    layers = facts.by_part["attention"] + facts.by_part["mlp"]
    assert whole.teacher - halved.teacher == pytest.approx(layers, rel=0.02)


def test_a_teacher_of_spans_is_planned_with_a_loss_of_its_own() -> None:
    tokens, spans = _measured(_lesson()), _measured(_lesson(aligned=True))
    assert spans.teacher == tokens.teacher
    of_loss = [max(moment.parts.get(LOSS, 0) for moment in found.moments) for found in (_measured(None), spans, tokens)]
    assert of_loss[0] <= of_loss[1] < of_loss[2], "one model's logits at once, not two"


def test_a_machine_holds_the_larger_of_student_and_teacher_while_they_are_read() -> None:
    facts = model_facts(STUDENT, vocab_size=VOCAB, seq_len=SEQ)
    from cheaptrain.recipe.schema import Checkpoint

    lesson = _lesson(40)
    assert _weights(lesson) > 4 * facts.parameters
    assert host_memory(_measured(lesson), TRAIN, facts, Checkpoint(), 3).building == 3 * _weights(lesson)
    assert host_memory(_measured(None), TRAIN, facts, Checkpoint(), 3).building == 3 * 4 * facts.parameters
