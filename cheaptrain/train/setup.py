"""From a survey to a stage ready to train: model, proofs, optimizers, loader, and the state of an earlier attempt.

Everything that can be refused is refused here, before the first step: documents that would see each other, a head the
fused loss would get wrong, no room for checkpoints; what needs no model was refused before (`beforehand.py`). A resumed
run takes its model, config included, from its checkpoint.
"""

import os
import shutil
import uuid
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from cheaptrain.checkpoint.jsonl import JsonLines
from cheaptrain.checkpoint.launch_record import Note
from cheaptrain.checkpoint.load import load_state_into
from cheaptrain.checkpoint.rundir import OpenedRun
from cheaptrain.data.align import Aligner
from cheaptrain.data.loader import Loader, validation_batches
from cheaptrain.data.open import open_held_out, open_rows
from cheaptrain.data.rows import RowBatch
from cheaptrain.durable import fingerprint
from cheaptrain.errors import PreflightError
from cheaptrain.hardware import find_gpu, visible_cores
from cheaptrain.model.build import build_model
from cheaptrain.model.compiled import forget_graphs
from cheaptrain.model.config import vocabulary_growth
from cheaptrain.model.context import Context
from cheaptrain.model.facts import model_facts
from cheaptrain.model.fp8 import refuse_fp8, to_fp8
from cheaptrain.model.lora import adapters, add_adapters
from cheaptrain.model.proof import prove_documents_isolated, prove_head
from cheaptrain.parallel.mesh import data_rank, make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import Processes
from cheaptrain.parallel.watch import Watch
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Model
from cheaptrain.say import say
from cheaptrain.train.aligned import AlignedDistillation, TeacherOfSpans
from cheaptrain.train.alike import refuse_other_beginnings
from cheaptrain.train.attention import Chooser, attention_chooser
from cheaptrain.train.cached_teacher import CachedTeacher, cache_of
from cheaptrain.train.distillation import Distillation, distillation_loss
from cheaptrain.train.evaluating import load_light
from cheaptrain.train.ledger import Ledger
from cheaptrain.train.metrics import Metrics, Unwritten, start_trackers
from cheaptrain.train.objective import OBJECTIVES, Compute, Objective
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.saving import begin_saving
from cheaptrain.train.signals import StopRequest
from cheaptrain.train.space import checkpoint_bytes, checkpoints_at_once
from cheaptrain.train.stage import Stage
from cheaptrain.train.survey import Survey, mixture_order, teacher_tokenizer
from cheaptrain.train.teacher import load_teacher, refuse_top_k
from cheaptrain.units import size

PROOF_TOKENS = 256


def set_up(
    survey: Survey,
    opened: OpenedRun,
    trackers: Accelerator,
    processes: Processes,
    *,
    watch: Watch,
    stop: StopRequest,
    console: Console,
    note: Note,
    began: float,
) -> Stage:
    """Put a stage together at the step it starts or goes on from, on all processes together. Raises PreflightError for
    whatever cannot end well. `note`: adds to the record of the launch; `began`: when work on the stage did."""
    recipe, resolved, run = survey.loaded.recipe, survey.resolved, opened.directory
    report = partial(say, console)
    mesh = make_mesh(resolved.layout, processes.device.type)
    compute = compute_of(survey, processes, mesh)
    if recipe.train.fp8:
        refuse_fp8(compute.device, tp=resolved.layout.tp)
    watch.beat("building the model", 0)
    if opened.checkpoint is None and (growth := vocabulary_growth(recipe.model, survey.tokenizer.size)):
        report(str(growth))
    model = _model(survey, opened, processes)
    refuse_other_beginnings(survey, model, processes)
    loader = _loader(survey, mesh)
    watch.beat("choosing the kernels of attention", 0)
    choose = attention_chooser(survey, opened, processes, loader, report, note)
    compute = replace(compute, attention=choose(model.config, "student", recipe.data.seq_len, compute.dtype))
    processes.on_main(lambda: _prove(model, survey, compute))
    forget_graphs()  # of the stages before
    asked = recipe.train.compile
    compiled = asked == "layers" or (asked == "auto" and compute.device.type == "cuda" and recipe.lora is None)
    if recipe.lora is not None:
        trained = add_adapters(model, recipe.lora, recipe.seed)
        report(f"adapters of rank {recipe.lora.rank}: {trained:,} numbers train, the model's own are as they were")
    if recipe.train.fp8:
        converted, left = to_fp8(model)
        but = f"; {left} have a side that is no multiple of 16 and stay in bf16" if left else ""
        report(f"{converted} matrices of the layers are multiplied in 8-bit floats{but}")
    root = parallelize(
        model,
        mesh,
        dtype=compute.dtype,
        recompute=recipe.train.activation_checkpointing,
        compile_layers=compiled,
    )
    objective = _objective(
        survey, model.config.vocab_size, mesh, processes, compute, watch, choose, compile_layers=compiled
    )
    optimizers = build_optimizers(model, recipe.train)
    scalars: dict[str, Any] = {}
    if opened.checkpoint is not None:
        watch.beat("reading the checkpoint", 0)
        scalars = load_state_into(opened.checkpoint, model, optimizers, processes, adapters(model) or None)
    ledger = Ledger.from_json(scalars["ledger"]) if scalars else Ledger()
    if (entry := ledger.begin(resolved)) and ledger.step:
        report(
            f"from step {ledger.step:,} on: {entry.global_batch_tokens:,} tokens a step, {entry.processes} "
            f"process{'es' * (entry.processes > 1)} ({entry.layout})"
        )
    run_id = scalars["run_id"] if scalars else processes.on_main(lambda: uuid.uuid4().hex[:12])

    watch.beat("loading the tasks of eval.light", 0)
    light = load_light(recipe, survey.tokenizer, processes)
    token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    token_bytes[: survey.tokenizer.size] = torch.from_numpy(survey.tokenizer.token_bytes())

    def begin_tracking() -> None:
        start_trackers(
            trackers,
            recipe.log,
            directory=run.path,
            name=survey.loaded.name,
            run_id=run_id,
            first_step=ledger.step + 1 if opened.checkpoint else 0,
            config=opened.recipe["recipe"],
        )

    processes.on_main(begin_tracking)
    files: list[JsonLines] = []
    processes.on_main(
        lambda: files.extend(JsonLines(f, opened.resumed_step, report=report) for f in (run.metrics, run.samples))
    )
    metrics, samples = files or (Unwritten(), Unwritten())
    return Stage(
        name=survey.loaded.name,
        recipe=recipe,
        resolved=resolved,
        run=run,
        run_id=run_id,
        saved_recipe=dict(opened.recipe),
        lineage=dict(opened.lineage),
        processes=processes,
        mesh=mesh,
        watch=watch,
        model=model,
        root=root,
        tokenizer=survey.tokenizer,
        optimizers=optimizers,
        compute=compute,
        objective=objective,
        loader=loader,
        validation=_validation(survey, mesh),
        token_bytes=token_bytes.to(compute.device),
        proof_ids=_proof_ids(loader, resolved.layout).to(compute.device),
        ledger=ledger,
        metrics=Metrics(metrics, trackers),
        samples=samples,
        light=light,
        saving=begin_saving(run, processes, recipe, resolved, model, survey.tokenizer),
        stop=stop,
        console=console,
        flops_per_token=_flops_per_token(survey),
        peak_flops=_peak(compute.device),
        checkpoint_bytes=checkpoint_bytes(survey.facts, recipe.train),
        note=note,
        began=began,
        steps_ahead=1 if compute.device.type == "cuda" else 0,
    )


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


def compute_of(survey: Survey, processes: Processes, mesh: DeviceMesh) -> Compute:
    """How the forward passes of a recipe are run on this process, whose threads are set for it."""
    recipe, device = survey.loaded.recipe, processes.device
    if device.type == "cpu":
        # `accelerate launch` leaves each process one thread unless told otherwise, which halves the speed of a laptop.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(recipe.train.cpu_threads or max(1, visible_cores() // here))
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
        context=Context.of(mesh["cp"].get_group()),
        neftune_alpha=recipe.train.neftune_alpha,
        z_loss=recipe.train.z_loss,
    )


def _model(survey: Survey, opened: OpenedRun, processes: Processes) -> PreTrainedModel:
    recipe = survey.loaded.recipe
    spec = recipe.model
    # Adapters go on beside the weights they began with; the checkpoint's have them merged.
    if opened.checkpoint is not None and recipe.lora is None:
        spec = Model(init_from=str(opened.checkpoint.path), vocab_multiple=recipe.model.vocab_multiple)
    # One of many takes its share of the weights from memory that no GPU has to have.
    return model_of(survey, spec, processes.device if processes.size == 1 else "cpu")


def model_of(survey: Survey, spec: Model, device: torch.device | str) -> PreTrainedModel:
    """The model of `spec`, for the tokenizer and the rows of a stage."""
    recipe, tokenizer = survey.loaded.recipe, survey.tokenizer
    return build_model(
        spec,
        vocab_size=tokenizer.size,
        seq_len=recipe.data.seq_len,
        seed=recipe.seed,
        eot_id=tokenizer.eot_id,
        bos_id=tokenizer.bos_id,
        end_of_turn_id=tokenizer.end_of_turn_id,
        device=device,
    )


def _prove(model: PreTrainedModel, survey: Survey, compute: Compute) -> None:
    recipe = survey.loaded.recipe
    prove_head(model)
    # Processes that share a row see a stretch of it: what goes past attention (a convolution, say) would see no more.
    masked = compute.document_mask or compute.context is not None
    prove_documents_isolated(model, document_mask=masked, seed=recipe.seed, dtype=compute.dtype)


def _objective(
    survey: Survey,
    head_rows: int,
    mesh: DeviceMesh,
    processes: Processes,
    compute: Compute,
    watch: Watch,
    choose: Chooser,
    *,
    compile_layers: bool,
) -> Objective:
    recipe, vocab = survey.loaded.recipe, survey.tokenizer.size
    if recipe.distill is None:
        return OBJECTIVES[recipe.train.objective]
    loss = distillation_loss(recipe.distill)
    if recipe.distill.cache is not None:
        watch.beat("verifying the cached teacher", 0)
        refuse_top_k(recipe.distill, mesh["tp"].size())
        cache = cache_of(survey)
        processes.on_main(cache.verify)
        if len(set(processes.all_of(fingerprint(dict(cache.files))))) > 1:
            raise PreflightError(f"{cache.folder} is not the same on all machines: keep it where all of them see it")
        return Distillation(CachedTeacher(cache, compute.context).says, loss, vocab)
    watch.beat("loading the teacher", 0)
    assert survey.teacher is not None
    asked, aligned = survey.teacher.vocab_size or vocab, recipe.distill.tokenizers == "align"
    teacher = load_teacher(
        recipe.distill,
        vocab_size=asked,
        head_rows=head_rows,
        seq_len=survey.teacher.row(recipe.data.seq_len),
        mesh=mesh,
        processes=processes,
        compute=compute,
        compile_layers=compile_layers and not aligned,  # its rows are of another shape in every batch
    )
    row = survey.teacher.row(recipe.data.seq_len)
    attention = choose(teacher.root.model.config, "teacher", row, teacher.compute.dtype)
    teacher = replace(teacher, compute=replace(teacher.compute, attention=attention))
    if aligned:
        return AlignedDistillation(TeacherOfSpans(teacher, asked).says, loss, vocab)
    return Distillation(teacher.says, loss, vocab)


def _loader(survey: Survey, mesh: DeviceMesh) -> Loader:
    recipe, resolved = survey.loaded.recipe, survey.resolved
    order = mixture_order(recipe, survey.sources)
    return Loader(
        order=order,
        sources=[
            open_rows(survey.manifests[name], recipe.data, recipe.seed, recipe.train.assistant_only)
            for name in order.names
        ],
        rows_per_step=resolved.rows_per_step,
        micro_batch_size=resolved.micro_batch_size,
        data_rank=data_rank(mesh),
        data_parallel=resolved.layout.data_parallel,
        by_example=recipe.train.loss_weighting == "example",
        aligner=_aligner(survey),
    )


def _aligner(survey: Survey) -> Aligner | None:
    distill, teacher = survey.loaded.recipe.distill, survey.teacher
    if distill is None or distill.tokenizers != "align" or teacher is None or teacher.longest is None:
        return None
    return Aligner(survey.tokenizer, teacher_tokenizer(distill), teacher.longest)


def _proof_ids(loader: Loader, layout: Layout) -> Tensor:
    """The tokens of the proof of every save, `[1, seq]`: the first of the first row, as many as the processes that
    share a row can share."""
    ids = replace(loader, data_rank=0).step(0)[0].input_ids
    shared = layout.cp * layout.tp
    return ids[:1, : max(shared, min(PROOF_TOKENS, ids.shape[1]) // shared * shared)]


def _validation(survey: Survey, mesh: DeviceMesh) -> dict[str, list[RowBatch]]:
    """This process's share of the held-out rows of each source: as many batches on every process."""
    recipe, resolved = survey.loaded.recipe, survey.resolved
    context = Context.of(mesh["cp"].get_group())
    batches = {}
    for name, manifest in survey.manifests.items():
        rows = open_held_out(manifest, recipe.data, recipe.validation.tokens, recipe.train.assistant_only)
        held_out = validation_batches(rows, resolved.micro_batch_size, data_rank(mesh), resolved.layout.data_parallel)
        share = [batch.share(context.rank, context.size) if context else batch for batch in held_out]
        if share:
            batches[name] = share
    return batches


def _flops_per_token(survey: Survey) -> float:
    """Of training, and of a teacher's forward pass: a third of what training it would take."""
    if survey.teacher is None:
        return survey.facts.flops_per_token
    teacher = survey.teacher
    facts = model_facts(
        teacher.model,
        vocab_size=teacher.vocab_size or survey.tokenizer.size,
        seq_len=teacher.row(survey.resolved.seq_len),
    )
    return survey.facts.flops_per_token + facts.flops_per_token / 3


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.flops if gpu else None
