"""Distillation as it is done otherwise: whole logits of both models, or liger's chunked loss.

Whole logits: fp32 log-probabilities of student and teacher, and the Jensen-Shannon divergence of them. liger: its
fused linear JSD with a chunk of 1,024 tokens, and its patches for the layers of both. The teacher is frozen and in
bf16 on a GPU; both divergences are those of `DistillationLoss("jsd")`, summed over supervised positions.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from cheaptrain.bench.rows import Rows
from cheaptrain.bench.theirs import loop_trial, patch_with_liger
from cheaptrain.bench.trial import Trial, plain_model
from cheaptrain.bench.works import LIGER_JSD, Work
from cheaptrain.data.rows import IGNORED
from cheaptrain.model.parts import decoder, head

CHUNK = 1024
BETA = 0.5


def distilling_trial(work: Work, variant: str, device: torch.device, micro_rows: int) -> Trial:
    """ "full logits" or "liger JSD". Raises Unavailable without liger, or without a GPU for it."""
    assert work.teacher is not None
    if variant == LIGER_JSD:
        for shape in (work.model, work.teacher):
            patch_with_liger(shape, device, fused_loss=False)
    student = plain_model(work, work.model, device)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = plain_model(work, work.teacher, device, dtype=half).requires_grad_(False).eval()
    if variant == LIGER_JSD:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        fused = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, ignore_index=IGNORED, chunk_size=CHUNK
        )

        def chunked(rows: Rows) -> Tensor:
            with torch.no_grad():
                said = decoder(teacher)(input_ids=rows.input_ids, use_cache=False).last_hidden_state
            hidden = decoder(student)(input_ids=rows.input_ids, use_cache=False).last_hidden_state
            divergence: Tensor = fused(
                hidden.flatten(0, 1).to(half),
                head(student).weight.to(half),
                said.flatten(0, 1).to(half),
                head(teacher).weight,
                rows.labels.flatten(),
            )
            return divergence * rows.supervised  # it is a mean over the positions that have a target

        return loop_trial(work, device, micro_rows, student, chunked, f"chunks of {CHUNK:,}, liger's layers")

    def whole(rows: Rows) -> Tensor:
        with torch.no_grad():
            said = teacher(input_ids=rows.input_ids, use_cache=False).logits.float().log_softmax(-1)
        logits = student(input_ids=rows.input_ids, use_cache=False).logits.float().log_softmax(-1)
        return jensen_shannon(logits, said)[rows.labels != IGNORED].sum()

    return loop_trial(work, device, micro_rows, student, whole)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """Of log-probabilities `[..., vocab]`: half of KL from each to the mean of both, `[...]`."""
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return BETA * sum(
        (functional.kl_div(middle, each, reduction="none", log_target=True).sum(-1) for each in (teacher, student)),
        start=torch.zeros((), device=student.device),
    )
