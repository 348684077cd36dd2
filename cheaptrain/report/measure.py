"""The memory of one process of many, measured on a laptop: the real model, layout and loss, on tensors without memory.

The model is built on meta, laid out by `parallelize` over a mesh of processes that do not exist (`pretend.py`), and run
forward and backward on fake tensors, while every storage is counted (`tracker.py`). So what FSDP gathers and keeps,
what tensor parallelism sends, and what a layer is recomputed from are not reckoned by a formula that would have to
be kept true. What the optimizer keeps is added in `memory.py`.

Layers that are alike cost alike, so of a long stack only three and four are run, and each moment of the pass is
continued along the line through both. That is exact, because between one layer more and the next nothing else
happens; the trap would be to continue the peak alone, which may lie elsewhere in a deep model than in a shallow one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from cheaptrain_kernels import Backend, use_backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.build import meta_model
from cheaptrain.model.context import Context, check_context
from cheaptrain.model.lora import add_adapters
from cheaptrain.model.parts import decoder_layers, hidden_matrices
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.root import Root, last_micro_batch
from cheaptrain.parallel.tensor import check_tensor_parallel
from cheaptrain.recipe.layout import AXES, Layout
from cheaptrain.recipe.schema import Lora
from cheaptrain.report.depth import alike_at_the_end, shortened
from cheaptrain.report.lesson import Lesson
from cheaptrain.report.tracker import ACTIVATIONS, BATCH, GRADIENTS, LOSS, TEACHER, WEIGHTS, Tracker
from cheaptrain.train.objective import Compute, Objective, hidden_states, next_token

_Sent = Mapping[tuple[str, bool], float]

_FEW = 3  # layers of a kind that a short stack has at least: a first, a last, and one between others


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a process besides the model. `accumulates`: a step has several micro-batches;
    `masked`: documents are kept apart by a mask, as on a CPU; `backend`: of the loss."""

    layout: Layout
    seq_len: int
    micro_batch_size: int
    accumulates: bool
    recompute: bool
    bf16: bool
    masked: bool
    loss_chunk_tokens: int
    lesson: Lesson | None = None
    lora: Lora | None = None
    backend: Backend = "torch"


@dataclass(frozen=True)
class Moment:
    """The fullest moment at one place of a micro-batch: bytes alive, by kind."""

    place: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Held:
    """Numbers (not bytes) of parameters that the largest process holds: all, those of hidden matrices, `trained` ones.
    `mean`: over all processes that hold a share. `largest_matrix`: of the whole model."""

    parameters: int
    hidden: int
    trained: int
    mean: float
    largest_matrix: int


@dataclass(frozen=True)
class Measured:
    """One process, the first: shards are never larger elsewhere. Without what the optimizer keeps.

    `sent`: bytes that it sends along each axis of the mesh, "dp_shard_cp" among them, in the last micro-batch of a
    step; `sent_before`: in each earlier one. `teacher`: bytes that a teacher takes all the time.
    """

    setting: Setting
    moments: tuple[Moment, ...]
    held: Held
    sent: Mapping[str, float]
    sent_before: Mapping[str, float]
    teacher: int = 0


def measure(config: PreTrainedConfig, setting: Setting) -> Measured:
    """Measure `config` under `setting`. With more than one process it must run in a child with pretended ones.

    Raises PreflightError for a model that cannot be laid out so.
    """
    layout = setting.layout
    check_tensor_parallel(config, layout.tp)
    check_context(config, seq_len=setting.seq_len, cp=layout.cp, tp=layout.tp)
    mesh = _mesh(layout) if layout.world_size > 1 else cast(DeviceMesh, _Alone())
    if setting.lesson is not None and layout.tp > 1:
        setting = replace(setting, lesson=setting.lesson.of_head_rows(config.vocab_size))
    student = _student(config, setting, mesh)
    if setting.lesson is None or setting.lesson.config is None:
        return student
    return _with_teacher(student, setting.lesson, setting.lesson.config, mesh)


def _student(config: PreTrainedConfig, setting: Setting, mesh: DeviceMesh) -> Measured:
    layout = setting.layout
    alike, layers = alike_at_the_end(config), config.num_hidden_layers
    unlike = layers - alike
    if layout.tp > 1:
        # What DTensor does with a shape it first tries on whole tensors, once; and there nobody can tell the two apart.
        _run(shortened(config, min(layers, unlike + _FEW - 1)), setting, mesh, unlike)
    if alike <= _FEW + 1:
        return _run(config, setting, mesh, unlike)
    short, longer = (_run(shortened(config, unlike + n), setting, mesh, unlike) for n in (_FEW, _FEW + 1))
    return _continued(short, longer, alike - _FEW - 1)


def _continued(short: Measured, longer: Measured, more: int) -> Measured:
    """`longer` with `more` layers more, each of which adds what the last one of it added to `short`."""

    def on(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        return {key: after[key] + (after[key] - before.get(key, 0)) * more for key in after}

    def numbers(held: Held) -> dict[str, Any]:
        return vars(held)

    before = {moment.place: moment.parts for moment in short.moments}
    grown = Held(**on(numbers(short.held), numbers(longer.held)))
    return replace(
        longer,
        moments=tuple(Moment(m.place, on(before[m.place], m.parts)) for m in longer.moments),
        held=replace(grown, largest_matrix=longer.held.largest_matrix),
        sent=on(short.sent, longer.sent),
        sent_before=on(short.sent_before, longer.sent_before),
    )


def _with_teacher(student: Measured, lesson: Lesson, config: PreTrainedConfig, mesh: DeviceMesh) -> Measured:
    """`student` with what its teacher takes beside it at each moment, and a moment for the teacher's own pass."""
    alike, layers = alike_at_the_end(config), config.num_hidden_layers
    more = max(0, alike - _FEW - 1)
    depths = [layers] if more == 0 else [layers - alike + _FEW, layers - alike + _FEW + 1]
    found = [_teaching(shortened(config, depth), lesson, student.setting, mesh) for depth in depths]
    held, fullest, sent = found[-1]
    if more:
        held += (held - found[0][0]) * more
        fullest += (fullest - found[0][1]) * more
        sent = {axis: nbytes + (nbytes - found[0][2].get(axis, 0.0)) * more for axis, nbytes in sent.items()}
    start = next((moment.parts for moment in student.moments if moment.place == "start"), {})
    moments = [Moment(m.place, {**m.parts, TEACHER: held}) for m in student.moments]
    moments.append(Moment("teacher", {**start, TEACHER: fullest}))

    def with_sent(before: Mapping[str, float]) -> dict[str, float]:
        return {axis: before.get(axis, 0.0) + sent.get(axis, 0.0) for axis in {**before, **sent}}

    return replace(
        student,
        moments=tuple(moments),
        sent=with_sent(student.sent),
        sent_before=with_sent(student.sent_before),
        teacher=held,
    )


def _teaching(
    config: PreTrainedConfig, lesson: Lesson, setting: Setting, mesh: DeviceMesh
) -> tuple[int, int, dict[str, float]]:
    """Bytes that the teacher takes all the time, and at its fullest; and what its pass over a micro-batch sends."""
    with torch.random.fork_rng(devices=[]):
        model = meta_model(config, lesson.dtype).requires_grad_(False)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    saved = 0
    if lesson.quantised:
        saved = sum(p.numel() * (p.itemsize - 1) for p in decoder_layers(model).parameters() if p.dim() > 1)
        root = Root(model)
    else:
        root = parallelize(model, mesh, dtype=lesson.dtype)
    root.requires_grad_(False).eval()
    alone = setting.layout.world_size == 1
    context = None if alone else Context.of(mesh["cp"].get_group())
    compute = Compute(torch.device("cpu"), lesson.dtype, setting.masked, setting.loss_chunk_tokens, context)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        root.to_empty(device="cpu")
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        tracker = Tracker(fake)
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.note(tensor, WEIGHTS)
        batch = _batch(setting, Tracker(fake))
        with tracker:
            for place in ("setting up", "pass"):
                tracker.place = place
                tracker.sent.clear()
                root(hidden_states, batch, compute)
            tracker.place = "after"
            _ = torch.empty(1)
    held, fullest = tracker.peaks["after"][0], tracker.peaks["pass"][0]
    sent = _by_axis(dict(tracker.sent), {} if alone else _axis_names(mesh))
    return held - saved, fullest - saved, sent


class _Alone:
    """The mesh of one process, which needs no process group."""

    def __getitem__(self, _: str) -> "_Alone":
        return self

    def size(self) -> int:
        return 1


def _run(config: PreTrainedConfig, setting: Setting, mesh: DeviceMesh, unlike: int) -> Measured:
    """Run all layers of `config`, of which the first `unlike` are of other kinds than the rest."""
    with torch.random.fork_rng(devices=[]):
        model = meta_model(config).train()
    if setting.lora is not None:
        add_adapters(model, setting.lora, seed=0)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    root = parallelize(model, mesh, dtype=dtype, recompute=setting.recompute)
    alone = setting.layout.world_size == 1
    context = None if alone else Context.of(mesh["cp"].get_group())
    compute = Compute(torch.device("cpu"), dtype, setting.masked, setting.loss_chunk_tokens, context)
    # Meshes are cut with real index tensors, on the CPU, while fake tensors are about.
    with use_backend(setting.backend), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        root.to_empty(device="cpu")
        if tied:
            head.weight = embedding.weight
        tracker = Tracker(fake)
        _write_down(model, tracker)
        _watch_places(model, tracker, unlike)
        batch = _batch(setting, tracker)
        lesson = setting.lesson
        objective = next_token if lesson is None else lesson.stub(setting.layout.tp)
        first, last = _steps(
            root, objective, batch, compute, setting, tracker, passes=1 if alone and not setting.accumulates else 2
        )
    names = {} if alone else _axis_names(mesh)
    return Measured(
        setting=setting,
        moments=tuple(
            Moment(place, {k: b for k, b in parts.items() if b}) for place, (_, parts) in tracker.peaks.items()
        ),
        held=_held(model),
        sent=_by_axis(last, names),
        sent_before=_by_axis(first, names),
    )


def _steps(
    root: Root,
    objective: Objective,
    batch: RowBatch,
    compute: Compute,
    setting: Setting,
    tracker: Tracker,
    passes: int,
) -> tuple[_Sent, _Sent]:
    """Two micro-batches; only the second stays in the tracker's peaks. With accumulation they are the last two of a
    step, else of two steps, of which FSDP needs the first to set itself up. Returns what each of them sent."""
    sent: list[_Sent] = []
    with tracker:
        for number in range(1, passes + 1):
            tracker.peaks.clear()
            tracker.sent.clear()
            tracker.place = "start"
            last_micro_batch(root, number == passes or not setting.accumulates)
            sums = root(objective, batch, compute)
            tracker.making = ACTIVATIONS
            (sums.loss / batch.supervised).backward()
            del sums
            tracker.place = "end"
            sent.append(dict(tracker.sent))
            if number < passes:
                if setting.accumulates:
                    tracker.what_stays_is(GRADIENTS)
                else:
                    root.zero_grad(set_to_none=True)
    return sent[0], sent[-1]


def _write_down(model: PreTrainedModel, tracker: Tracker) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.note(tensor, WEIGHTS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.relabel(cast(Tensor, p.grad), GRADIENTS))


def _watch_places(model: PreTrainedModel, tracker: Tracker, unlike: int) -> None:
    """Tell the tracker which layer runs: those at the start by number, of the ones alike the first, the last, and any
    between them."""
    layers = decoder_layers(model)

    def name(i: int) -> str:
        if i < unlike:
            return str(i)
        return "last" if i == len(layers) - 1 else "first" if i == unlike else "middle"

    def enter(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            tracker.place = f"forward {name(i)}"

        return hook

    def leave(i: int) -> Callable[..., None]:
        def backward(_: Tensor) -> None:
            tracker.place = f"backward {name(i)}"

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            (output[0] if isinstance(output, tuple) else output).register_hook(backward)
            if i == len(layers) - 1:
                tracker.place, tracker.making = "loss", LOSS

        return hook

    # Recomputing is inside of a layer's forward (see parallelize.py): these hooks are not called again by it.
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(i))
        layer.register_forward_hook(leave(i))


def _batch(setting: Setting, tracker: Tracker) -> RowBatch:
    """This process's tokens of one micro-batch. Only their shapes matter."""
    rows, seq = setting.micro_batch_size, setting.seq_len
    here = seq // setting.layout.cp
    ids, labels, positions = (torch.zeros(rows, here, dtype=torch.int64) for _ in range(3))
    documents = torch.zeros(rows, seq, dtype=torch.int32)
    for tensor in (ids, labels, positions, documents):
        tracker.note(tensor, BATCH)
    return RowBatch(ids, labels, positions, documents, np.zeros(rows, np.int64), rows * here)


def _held(model: PreTrainedModel) -> Held:
    hidden = {id(parameter) for parameter in hidden_matrices(model)}
    local: Counter[bool] = Counter()
    trained, mean, largest = 0, 0.0, 0
    for parameter in model.parameters():
        share = 1.0
        here = parameter.numel()
        if isinstance(parameter, DTensor):
            here = parameter.to_local().numel()
            for axis, placement in enumerate(parameter.placements):
                share /= parameter.device_mesh.size(axis) if not placement.is_replicate() else 1
        local[id(parameter) in hidden] += here
        trained += here if parameter.requires_grad else 0
        mean += parameter.numel() * share
        if id(parameter) in hidden:
            largest = max(largest, parameter.numel())
    return Held(local[True] + local[False], local[True], trained, mean, largest)


def _by_axis(sent: _Sent, names: Mapping[str, str]) -> dict[str, float]:
    """Several groups may be of one axis: see `_axis_names`. One group may be of two, where both are all processes; then
    what is exchanged is of context parallelism."""
    total: defaultdict[str, float] = defaultdict(float)
    for (group, exchanged), nbytes in sent.items():
        total["cp" if exchanged else names[group]] += nbytes
    return dict(total)


@lru_cache
def _mesh(layout: Layout) -> DeviceMesh:
    return make_mesh(layout, "cpu")


_groups: dict[str, str] = {}


def _axis_names(mesh: DeviceMesh) -> dict[str, str]:
    """The axis of each process group. Of all meshes so far: DTensor remembers how it did something before, with the
    group of the mesh it did it in, and takes an equal mesh for the same."""
    _groups.update({mesh[axis].get_group().group_name: axis for axis in AXES})
    if mesh["cp"].size() > 1:
        _groups[mesh["dp_shard_cp"].get_group().group_name] = "dp_shard_cp"
    return _groups
