"""Which attention kernels a stage runs with: asked for, as before, or measured by the main process for all of them.

Measuring is for a GPU in bf16; elsewhere there is nothing to choose from. What was chosen, with every figure and every
reason, goes into the record of the launch. The trap: two kernels that are both right round differently, so a run that
went on with another one than it began with would not be the same run. A resumed run therefore takes what its record
says, as long as machine, versions and shapes are those it was measured for; where they are not, it measures again and
says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cheaptrain.checkpoint.launch_record import Note, launches, read_launch
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.rundir import OpenedRun
from cheaptrain.data.loader import Loader
from cheaptrain.environment import versions_of
from cheaptrain.errors import PreflightError
from cheaptrain.model.attention import DEFAULT, AttentionChoice, kernels, libraries
from cheaptrain.model.attention.choice import (
    CAUSAL,
    PACKED,
    AttentionShape,
    Trial,
    attention_shape,
    sample_documents,
    try_attention,
)
from cheaptrain.parallel.processes import Processes
from cheaptrain.train.survey import Survey

AUTO = "auto"
RECORD = "attention"  # key of the launch record: what was chosen, by model ("student", "teacher")

_CANDIDATES = {CAUSAL: kernels.CAUSAL_KERNELS, PACKED: kernels.PACKED_KERNELS}
_PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")


# (config, whose: "student" or "teacher", tokens of a row, what it computes in)
Chooser = Callable[[PreTrainedConfig, str, int, torch.dtype], AttentionChoice]


def attention_chooser(
    survey: Survey,
    opened: OpenedRun,
    processes: Processes,
    loader: Loader,
    report: Callable[[str], None],
    note: Note,
) -> Chooser:
    """Chooses the kernels for a model of a config, and has the record of the launch say which."""
    recipe, layout = survey.loaded.recipe, survey.resolved.layout
    resumed = opened.checkpoint is not None
    earlier = processes.on_main(lambda: recorded_choices(opened.directory) if resumed else {})
    records: dict[str, Any] = {}

    def choose(config: PreTrainedConfig, whose: str, seq_len: int, dtype: torch.dtype) -> AttentionChoice:
        choice, records[whose] = choose_attention(
            config,
            whose=whose,
            asked=recipe.train.attention,
            rows=survey.resolved.micro_batch_size,
            seq_len=seq_len,
            shared_by=layout.cp * layout.tp,
            dtype=dtype,
            document_mask=recipe.data.document_mask,
            documents=lambda: loader.step(0)[0].document_ids,
            processes=processes,
            earlier=earlier,
            report=report,
        )
        if records[whose]:
            note({RECORD: dict(records)})
        return choice

    return choose


def choose_attention(
    config: PreTrainedConfig,
    *,
    whose: str,
    asked: str,
    rows: int,
    seq_len: int,
    shared_by: int,
    dtype: torch.dtype,
    document_mask: bool,
    documents: Callable[[], Tensor],
    processes: Processes,
    earlier: Mapping[str, Any],
    report: Callable[[str], None],
) -> tuple[AttentionChoice, dict[str, Any]]:
    """The kernels for a model of `config` with `rows` of `seq_len` tokens, its heads `shared_by` processes, and what
    the launch record says of them (empty where there was nothing to choose). All processes together.

    `whose`: "student" or "teacher"; `asked`: train.attention; `documents`: ids of packed rows of this run, `[rows,
    seq]`, asked of the main process alone; `earlier`: what `recorded_choices` says of the launch before. Raises
    PreflightError when a kernel that was asked for cannot be had.
    """
    device = processes.device
    title = "attention" if whose == "student" else f"attention of the {whose}"
    if device.type != "cuda" or dtype != torch.bfloat16:
        if device.type == "cuda" and whose == "teacher":
            report(f"{title}: not measured, because it computes in fp32; torch takes what it can")
        elif asked != AUTO:
            raise PreflightError(
                f'train.attention = "{asked}" chooses among the kernels of a GPU in bf16, and this is '
                f'{"fp32" if device.type == "cuda" else "a CPU"}: set "auto"'
            )
        return DEFAULT, {}
    situations = (CAUSAL, PACKED) if document_mask else (CAUSAL,)
    if asked != AUTO and not any(asked in _CANDIDATES[situation] for situation in situations):
        raise PreflightError(
            f'train.attention = "{asked}" is a kernel for packed documents, and with data.document_mask = false there '
            'are none: set "auto", or another'
        )
    shape = attention_shape(config, rows, seq_len, shared_by)
    if shape is None:
        if asked != AUTO:
            raise PreflightError(
                f'train.attention = "{asked}": the heads of the {whose}\'s attention are not all of one size, so no '
                'kernel can be proven for them: set "auto"'
            )
        report(f"{title}: not measured, because its heads are not all of one size; {_in_words(DEFAULT, situations)}")
        return DEFAULT, {}
    made_for = processes.on_main(lambda: _made_for(shape, situations, asked, device))
    if earlier.get(whose, {}).get("for") == made_for:
        record = dict(earlier[whose])
        choice = AttentionChoice(**record["choice"])
        report(f"{title}: as before, {_in_words(choice, situations)}")
    else:
        if whose in earlier:
            report(f"{title}: measured again, because machine, versions or shapes are not those of the launch before")
        trials = processes.on_main(lambda: _trials(shape, situations, asked, device, documents))
        choice = _decide(trials, asked, title, report)
        record = {
            "for": made_for,
            "choice": asdict(choice),
            "trials": {situation: asdict(trial) for situation, trial in trials.items()},
        }
    _refuse_missing(choice, situations, processes)
    return choice, record


def recorded_choices(run: RunDirectory) -> dict[str, Any]:
    """What the newest launch that chose says of its choices; empty when none does. Call before this launch notes its
    own."""
    try:
        record = read_launch(run)
    except (OSError, ValueError):
        return {}  # a record that is lost was spoken of when it was opened (`recorded_launch`)
    return next((dict(launch[RECORD]) for launch in reversed(launches(record)) if launch.get(RECORD)), {})


def _trials(
    shape: AttentionShape,
    situations: tuple[str, ...],
    asked: str,
    device: torch.device,
    documents: Callable[[], Tensor],
) -> dict[str, Trial]:
    trials = {}
    for situation in situations:
        ids = None
        if situation == PACKED:
            ids = documents()[: shape.rows, : shape.seq]
            if ids.shape != (shape.rows, shape.seq) or not bool((ids[:, 1:] != ids[:, :-1]).any()):
                ids = sample_documents(shape.rows, shape.seq)
        names = (asked,) if asked in _CANDIDATES[situation] else _CANDIDATES[situation]
        trials[situation] = try_attention(shape, device, ids, names)
    return trials


def _decide(trials: Mapping[str, Trial], asked: str, title: str, report: Callable[[str], None]) -> AttentionChoice:
    """The fastest of each trial, printed. Raises PreflightError where what was asked for is not among them."""
    chosen = asdict(DEFAULT)
    for situation, trial in trials.items():
        if asked in trial.refused:
            raise PreflightError(
                f'train.attention = "{asked}": {kernels.LABELS[asked]} {trial.refused[asked]} ({title}, '
                f'{_ROWS[situation]}); set "auto", or another'
            )
        line = f"{title}: {trial}" if situation == CAUSAL else f"{title}, packed documents: {trial}"
        if trial.fastest is None:
            report(f"{line}; none was chosen, torch takes what it can")
            continue
        chosen[situation] = trial.fastest
        if asked not in (AUTO, trial.fastest):
            line += f" (train.attention = {asked} is no kernel for {_ROWS[situation]})"
        report(line)
    return AttentionChoice(**chosen)


_ROWS = {CAUSAL: "rows of one document", PACKED: "packed documents"}


def _refuse_missing(choice: AttentionChoice, situations: tuple[str, ...], processes: Processes) -> None:
    """Load what was chosen, on every process: what the main one has, another machine may lack."""
    chosen = {getattr(choice, situation) for situation in situations} & set(libraries.NAMES)
    reasons = {name: reason for name in sorted(chosen) if (reason := libraries.why_not(name)) is not None}
    for rank, missing in enumerate(processes.all_of(reasons)):
        for name, reason in missing.items():
            raise PreflightError(
                f"{kernels.LABELS[name]} was chosen for attention where rank 0 runs, and {reason} where rank {rank} "
                "does: make the machines alike, or set train.attention to a kernel that all have"
            )


def _made_for(shape: AttentionShape, situations: tuple[str, ...], asked: str, device: torch.device) -> dict[str, Any]:
    """What a measurement holds for: plain JSON values."""
    return {
        **asdict(shape),
        "situations": list(situations),
        "asked": asked,
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": versions_of(_PACKAGES),
    }


def _in_words(choice: AttentionChoice, situations: tuple[str, ...]) -> str:
    packed = f", {kernels.LABELS[choice.packed]} for packed documents" if PACKED in situations else ""
    return kernels.LABELS[choice.causal] + packed
