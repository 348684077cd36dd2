"""TRL's own trainers, as they come, on the rows of a work.

Supervised fine-tuning: SFTTrainer with packing and liger's layer kernels. The rows are packed before (TRL's collator is
told the lengths of their documents), so that all variants read the same ones. It asks for a flash-attn that knows
document boundaries; where none is installed it runs on SDPA with a mask, or, as a second variant, on FlexAttention.

Distillation: DistillationTrainer, whose student writes the text it learns from. Here the text is given, so that the
writing, which would be most of the time, is left out: what is measured is its step with its chunked divergence.

Both recompute layers unless told not to; here they are told not to, as long as memory suffices.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback

from cheaptrain.bench.rows import DISTINCT, Rows, step_rows
from cheaptrain.bench.theirs import refuse_without
from cheaptrain.bench.trial import (
    BETAS,
    CLIP,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Clock,
    Figures,
    Trial,
    plain_model,
)
from cheaptrain.bench.works import TRL_FLEX, Work
from cheaptrain.data.rows import IGNORED


def trl_trial(work: Work, variant: str, device: torch.device, micro_rows: int) -> Trial:
    """SFT or distillation with TRL; `micro_rows` 0: one row at once, layers recomputed. Raises Unavailable without
    TRL, or on a GPU without liger."""
    refuse_without("trl", "trl")
    on_gpu = device.type == "cuda"
    if on_gpu:
        refuse_without("liger_kernel", "liger-kernel")
    build = _sft if work.kind == "sft" else _distillation
    attention = _attention(variant, on_gpu) if work.kind == "sft" else "sdpa"
    at_once = max(1, micro_rows)
    given = {
        "output_dir": str(Path(tempfile.gettempdir()) / "cheaptrain-bench-trl"),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": work.rows // at_once,
        "gradient_checkpointing": micro_rows == 0,
        "learning_rate": LEARNING_RATE,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_steps": 100_000,  # the clock ends it
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "use_liger_kernel": on_gpu,
        "liger_kernel_config": {"fused_linear_cross_entropy": False} if on_gpu else None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = build(work, given, device, attention)
    words = [attention.replace("_", " "), "liger's layers" if on_gpu else "", "recomputing" if micro_rows == 0 else ""]
    return Trial(lambda clock: _run(trainer, clock), ", ".join(word for word in words if word))


def _run(trainer: Any, clock: Clock) -> None:
    losses: list[Tensor] = []
    norms: list[Any] = []
    step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

    def training_step(*arguments: Any, **named: Any) -> Tensor:
        loss: Tensor = step(*arguments, **named)
        losses.append(loss.detach())
        return loss

    def clip_grad_norm_(*arguments: Any, **named: Any) -> Any:
        norms.append(clip(*arguments, **named))
        return norms[-1]

    trainer.training_step, trainer.accelerator.clip_grad_norm_ = training_step, clip_grad_norm_

    class Ticking(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            of_step, norm = list(losses), norms[-1]
            losses.clear()
            norms.clear()
            if not clock(lambda: Figures(float(sum(of_step)), float(norm))):
                control.should_training_stop = True

    trainer.add_callback(Ticking())
    trainer.train()


def _sft(work: Work, given: dict[str, Any], device: torch.device, attention: str) -> Any:
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**given, packing=True, max_length=work.seq_len, dataset_kwargs={"skip_prepare_dataset": True})

    class InOrder(SFTTrainer):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, *arguments: Any, **named: Any) -> SequentialSampler:
            rows: Any = self.train_dataset
            return SequentialSampler(rows)

    return InOrder(
        model=plain_model(work, work.model, device, attention=attention),
        args=config,
        train_dataset=Dataset.from_list(_packed(_all_rows(work))),
        processing_class=_tokenizer(work),
    )


def _distillation(work: Work, given: dict[str, Any], device: torch.device, attention: str) -> Any:
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    assert work.teacher is not None
    rows = [ids.to(device) for each in _all_rows(work) for ids in each.input_ids]

    class OnGivenText(DistillationTrainer):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
            return _steps_repeated(len(rows), work.rows, given["gradient_accumulation_steps"])

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            ids = torch.stack([rows[each["row"]] for each in inputs])
            ones = torch.ones_like(ids)
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": ones[:, :1],
                "completion_ids": ids[:, 1:],
                "completion_mask": ones[:, 1:],
                "num_items_in_batch": ones[:, 1:].sum(),
            }

    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    return OnGivenText(
        model=plain_model(work, work.model, device, attention=attention),
        teacher_model=plain_model(work, work.teacher, device, dtype=half).requires_grad_(False).eval(),
        args=DistillationConfig(**given, beta=0.5, temperature=1.0, max_completion_length=work.seq_len),
        train_dataset=Dataset.from_list([{"prompt": "", "row": row} for row in range(len(rows))]),
        processing_class=_tokenizer(work),
    )


def _steps_repeated(rows: int, of_step: int, times: int) -> list[int]:
    """The trainer reads a step's rows once for each of its micro-batches and takes its share of them."""
    return [row for first in range(0, rows, of_step) for _ in range(times) for row in range(first, first + of_step)]


def _all_rows(work: Work) -> list[Rows]:
    return [rows for number in range(DISTINCT) for rows in step_rows(work, number, work.rows)]


def _packed(every: list[Rows]) -> list[dict[str, list[int]]]:
    """Rows as TRL has them after packing: labels not shifted, the first token of a document without one."""
    examples = []
    for rows in every:
        for ids, labels, lengths in zip(rows.input_ids, rows.labels, rows.lengths, strict=True):
            unshifted = torch.cat([labels.new_tensor([IGNORED]), labels[:-1]])
            examples.append({"input_ids": ids.tolist(), "labels": unshifted.tolist(), "seq_lengths": lengths})
    return examples


def _attention(variant: str, on_gpu: bool) -> str:
    if variant == TRL_FLEX:
        return "flex_attention"
    if on_gpu:
        from transformers.utils import import_utils

        for number in (3, 2):
            available: Callable[[], bool] = getattr(import_utils, f"is_flash_attn_{number}_available", lambda: False)
            if available():
                return f"flash_attention_{number}"
    return "sdpa"


def _tokenizer(work: Work) -> PreTrainedTokenizerFast:
    """The trainers insist on one; it only says which token pads and ends."""
    words = models.WordLevel({"<end>": 0, "<other>": 1}, unk_token="<other>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>", pad_token="<end>")
