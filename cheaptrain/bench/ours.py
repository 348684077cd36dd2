"""cheaptrain's own variants: the functions a run trains with, put together without a recipe's data and folders.

The only place here that knows the inside of cheaptrain.train. Nothing of the step is written again: model, layout,
objective, optimizers and step are those of `setup.py` and `loop.py`, and as in the loop the figures of a step are read
when the next one was handed over.
"""

import atexit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from cheaptrain.bench.experiments import before_step, compile_experiment, refuse_experiment
from cheaptrain.bench.rows import DISTINCT, step_rows
from cheaptrain.bench.trial import (
    BETAS,
    CLIP,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Figures,
    Trial,
    Unavailable,
    fill,
    repeated,
    spec_of,
)
from cheaptrain.bench.works import EXPERIMENTS, FP8, PLAIN, Shape, Work
from cheaptrain.data.rows import RowBatch
from cheaptrain.model.build import build_model
from cheaptrain.model.fp8 import refuse_fp8, to_fp8
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import Processes, join, leave
from cheaptrain.parallel.root import Root
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Distill, Train
from cheaptrain.train.attention import AUTO, choose_attention
from cheaptrain.train.distillation import Distillation, distillation_loss
from cheaptrain.train.objective import OBJECTIVES, Compute, Objective
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.step import StartedStep, train_step
from cheaptrain.train.teacher import Teacher


def cheaptrain_trial(work: Work, variant: str, device: torch.device, micro_rows: int) -> Trial:
    """The variants whose name begins with "cheaptrain". Raises PreflightError for a precision that cannot be had."""
    refuse_experiment(work, variant, device, micro_rows)
    train = _train(work, variant, micro_rows)
    processes = _joined()
    mesh = make_mesh(Layout(), device.type)
    compiled = device.type == "cuda" and variant not in (PLAIN, *EXPERIMENTS)
    model = _model(work, work.model, device)
    compute = _compute(train, device)
    notes = ["layers compiled" if compiled else "not compiled"]
    if variant in EXPERIMENTS:
        notes = [compile_experiment(model, variant)]
    choose = partial(_with_attention, work, micro_rows, processes, notes)
    compute = choose(compute, model, "student")
    if train.fp8:
        refuse_fp8(device, tp=1)
        converted, left = to_fp8(model)
        notes.append(f"{converted} matrices in fp8, {left} not")
    root = parallelize(model, mesh, dtype=compute.dtype, compile_layers=compiled)
    root.train()
    objective = OBJECTIVES["next_token"]
    if work.teacher is not None:
        teacher = _model(work, work.teacher, device, compute.dtype)
        teacher.requires_grad_(False).eval()
        of_teacher = choose(compute, teacher, "teacher")
        objective = _distillation(
            work, parallelize(teacher, mesh, dtype=compute.dtype, compile_layers=compiled), of_teacher
        )
    optimizers = build_optimizers(model, train)
    behind: list[StartedStep] = []
    batches = [_batches(work, number, micro_rows, device) for number in range(DISTINCT)]

    def step(number: int) -> Callable[[], Figures]:
        while len(behind) > 1:
            behind.pop(0).result()
        before_step(variant, number)
        here = _batches(work, number, micro_rows, device) if work.loss_steps else batches[number % DISTINCT]
        started = train_step(
            root,
            optimizers,
            here,
            mesh=mesh,
            objective=objective,
            compute=compute,
            sources=1,
            learning_rate_factor=1.0,
            grad_clip=CLIP,
        )
        behind.append(started)

        def figures() -> Figures:
            result = started.result()
            if not result.applied:
                raise Unavailable(f"a step was not finite: loss {result.loss}, gradient norm {result.grad_norm}")
            return Figures(result.loss, result.grad_norm)

        return figures

    return Trial(repeated(step), "; ".join(notes))


def _train(work: Work, variant: str, micro_rows: int) -> Train:
    given: dict[str, Any] = {
        "steps": 1,
        "global_batch_tokens": work.tokens,
        "micro_batch_size": micro_rows,
        "lr": LEARNING_RATE,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "grad_clip": CLIP,
    }
    return Train(**given, fp8=variant == FP8)


def _compute(train: Train, device: torch.device) -> Compute:
    return Compute(
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        document_mask=True,
        loss_chunk_tokens=train.loss_chunk_tokens,
    )


def _model(work: Work, shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with device:  # drawn there: on the CPU a billion weights take ten seconds
        model = build_model(
            spec_of(shape),
            vocab_size=work.vocab,
            seq_len=work.seq_len,
            seed=0,
            eot_id=0,
            dtype=dtype,
            device=device,
        )
    fill(model)
    return model


def _with_attention(
    work: Work,
    micro_rows: int,
    processes: Processes,
    notes: list[str],
    compute: Compute,
    model: PreTrainedModel,
    whose: str,
) -> Compute:
    """`compute` with the attention kernels that a run would choose here, by measuring."""
    choice, _ = choose_attention(
        model.config,
        whose=whose,
        asked=AUTO,
        rows=micro_rows,
        seq_len=work.seq_len,
        shared_by=1,
        dtype=compute.dtype,
        document_mask=compute.document_mask,
        documents=lambda: step_rows(work, 0, micro_rows)[0].document_ids,
        processes=processes,
        earlier={},
        report=lambda text: None,
    )
    if compute.device.type == "cuda":
        notes.append(f"{whose}'s attention {choice.causal if work.documents is None else choice.packed}")
    return replace(compute, attention=choice)


def _distillation(work: Work, teacher: Root, compute: Compute) -> Objective:
    teacher.requires_grad_(False)
    says = Teacher(teacher.eval(), compute, None).says
    return Distillation(says, distillation_loss(Distill(teacher="given", divergence="jsd")), work.vocab)


def _batches(work: Work, number: int, micro_rows: int, device: torch.device) -> list[RowBatch]:
    batches = [rows.batch() for rows in step_rows(work, number, micro_rows)]
    return [batch.pinned() for batch in batches] if device.type == "cuda" else batches


def _joined() -> Processes:
    atexit.register(leave)
    return join(600.0)
