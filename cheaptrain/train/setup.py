"""From a survey to a stage ready to train: model, proofs, optimizers, loader, and the state of an earlier attempt.

Everything that can be refused is refused here, before the first step: documents that would see each other, a head the
fused loss would get wrong, no room for checkpoints; what needs no model was refused before (`beforehand.py`). A resumed
run takes its model, config included, from its checkpoint.
"""

import os
import shutil
import uuid
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from cheaptrain.checkpoint.jsonl import JsonLines
from cheaptrain.checkpoint.rundir import OpenedRun
from cheaptrain.checkpoint.state import load_optimizer_tensors, restore_rng
from cheaptrain.data.loader import Loader, validation_batches
from cheaptrain.data.open import open_stream
from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import PreflightError
from cheaptrain.hardware import find_gpu
from cheaptrain.model.build import build_model
from cheaptrain.model.parts import decoder_layers
from cheaptrain.model.proof import prove_documents_isolated, prove_head
from cheaptrain.recipe.schema import Model
from cheaptrain.say import say
from cheaptrain.train.ledger import Ledger
from cheaptrain.train.metrics import Metrics, start_trackers
from cheaptrain.train.objective import Compute
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.signals import StopRequest
from cheaptrain.train.space import checkpoint_bytes, checkpoints_at_once
from cheaptrain.train.stage import Stage
from cheaptrain.train.survey import Survey, mixture_order
from cheaptrain.units import size

PROOF_TOKENS = 256


def set_up(
    survey: Survey,
    opened: OpenedRun,
    accelerator: Accelerator,
    *,
    stop: StopRequest,
    console: Console,
) -> Stage:
    """Put a stage together at the step it starts or goes on from. Raises PreflightError for whatever cannot end
    well."""
    recipe, resolved, run = survey.loaded.recipe, survey.resolved, opened.directory
    report = partial(say, console)
    compute = _compute(survey, accelerator)
    model = _model(survey, opened, compute)
    _prove(model, survey, compute)

    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    if opened.checkpoint is not None:
        tensors, scalars = opened.checkpoint.load_state()
    ledger = Ledger.from_json(scalars["ledger"]) if scalars else Ledger()
    run_id = scalars["run_id"] if scalars else uuid.uuid4().hex[:12]

    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.train.compile == "layers" or (recipe.train.compile == "auto" and compute.device.type == "cuda"):
        for layer in decoder_layers(model):
            layer.compile()
    optimizers = build_optimizers(model, recipe.train)
    loader = _loader(survey)
    token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    token_bytes[: survey.tokenizer.size] = torch.from_numpy(survey.tokenizer.token_bytes())

    start_trackers(
        accelerator,
        recipe.log,
        directory=run.path,
        name=survey.loaded.name,
        run_id=run_id,
        first_step=ledger.step + 1 if opened.checkpoint else 0,
        config=opened.recipe["recipe"],
    )
    stage = Stage(
        name=survey.loaded.name,
        recipe=recipe,
        resolved=resolved,
        run=run,
        run_id=run_id,
        saved_recipe=dict(opened.recipe),
        lineage=dict(opened.lineage),
        model=model,
        tokenizer=survey.tokenizer,
        optimizers=optimizers,
        compute=compute,
        loader=loader,
        validation=_validation(survey),
        token_bytes=token_bytes.to(compute.device),
        proof_ids=loader.step(0)[0].input_ids[:1, :PROOF_TOKENS].to(compute.device),
        ledger=ledger,
        metrics=Metrics(JsonLines(run.metrics, opened.resumed_step, report=report), accelerator),
        samples=JsonLines(run.samples, opened.resumed_step, report=report),
        stop=stop,
        console=console,
        flops_per_token=survey.facts.flops_per_token,
        peak_flops=_peak(compute.device),
        checkpoint_bytes=checkpoint_bytes(survey.facts, recipe.train),
    )
    if scalars:
        names = {parameter: name for name, parameter in model.named_parameters()}
        load_optimizer_tensors(optimizers, names, tensors, scalars["optimizer"])
        # Last: building a model draws random numbers.
        for name in restore_rng(tensors):
            report(f"{name} of the checkpoint has no place on this machine: from here on its random numbers are others")
    else:
        set_seed(recipe.seed)
    return stage


def refuse_without_space(survey: Survey, opened: OpenedRun) -> None:
    """Room for every checkpoint kept at once, and the new one that is written before the oldest goes.

    Raises PreflightError with what there is and what it takes.
    """
    recipe = survey.loaded.recipe
    each = checkpoint_bytes(survey.facts, recipe.train)
    count = max(1, checkpoints_at_once(survey.resolved, recipe.checkpoint) - len(opened.directory.steps()))
    needed = each * count
    free = shutil.disk_usage(opened.directory.path).free
    if free < needed:
        raise PreflightError(
            f"{opened.directory.path}: {size(free)} free, and the checkpoints of this run take {size(needed)} "
            f"({count} of {size(each)}). Free space, give another run.dir, or keep fewer "
            "(checkpoint.keep_last, checkpoint.keep_every)"
        )


def _compute(survey: Survey, accelerator: Accelerator) -> Compute:
    recipe, device = survey.loaded.recipe, accelerator.device
    if device.type == "cpu":
        # `accelerate launch` leaves each process one thread unless told otherwise, which halves the speed of a laptop.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(recipe.train.cpu_threads or max(1, cores // accelerator.num_processes))
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise PreflightError(f'{torch.cuda.get_device_name(device)} has no bf16: set train.precision = "fp32"')
    return Compute(
        device=device,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        document_mask=recipe.data.document_mask,
        loss_chunk_tokens=recipe.train.loss_chunk_tokens,
    )


def _model(survey: Survey, opened: OpenedRun, compute: Compute) -> PreTrainedModel:
    recipe, tokenizer = survey.loaded.recipe, survey.tokenizer
    spec = recipe.model
    if opened.checkpoint is not None:
        spec = Model(init_from=str(opened.checkpoint.path), vocab_multiple=recipe.model.vocab_multiple)
    return build_model(
        spec,
        vocab_size=tokenizer.size,
        seq_len=recipe.data.seq_len,
        seed=recipe.seed,
        eot_id=tokenizer.eot_id,
        bos_id=tokenizer.bos_id,
        device=compute.device,
    )


def _prove(model: PreTrainedModel, survey: Survey, compute: Compute) -> None:
    recipe = survey.loaded.recipe
    prove_head(model)
    prove_documents_isolated(model, document_mask=compute.document_mask, seed=recipe.seed, dtype=compute.dtype)


def _loader(survey: Survey) -> Loader:
    recipe, resolved = survey.loaded.recipe, survey.resolved
    order = mixture_order(recipe, survey.sources)
    return Loader(
        order=order,
        streams=[open_stream(survey.manifests[name], "train") for name in order.names],
        seq_len=resolved.seq_len,
        rows_per_step=resolved.rows_per_step,
        micro_batch_size=resolved.micro_batch_size,
        rank=0,
        world_size=resolved.world_size,
        document_mask=recipe.data.document_mask,
    )


def _validation(survey: Survey) -> dict[str, list[RowBatch]]:
    recipe, resolved = survey.loaded.recipe, survey.resolved
    batches = {}
    for name, manifest in survey.manifests.items():
        if manifest.facts().val_tokens < 2:
            continue
        held_out = list(
            validation_batches(
                open_stream(manifest, "val"),
                resolved.seq_len,
                resolved.micro_batch_size,
                recipe.validation.tokens,
                recipe.data.document_mask,
            )
        )
        if any(batch.supervised for batch in held_out):
            batches[name] = held_out
    return batches


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.flops if gpu else None
