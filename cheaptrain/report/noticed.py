"""What somebody should look at in a stage before believing it, a sentence each: what, how much, and what to do.

Looked for are spikes, steps that were skipped, stalls, data read more often than once or not in the shares asked,
interruptions, changes of the batch, failed saves, validation that got worse again, memory that grew, code that is in no
commit. Nothing here is an error: the run stands as it is, and this is what is odd about it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cheaptrain.errors import EXIT_DONE
from cheaptrain.report.account import GPU_MEMORY, HOST_MEMORY, Account
from cheaptrain.report.data_read import data_read
from cheaptrain.report.incidents import SPREADS, TIMES, WINDOW, growth, spikes, stalls
from cheaptrain.units import duration, human

_SHARE_OFF = 0.01  # of all tokens, between share asked and share read
_WORSE = 0.02  # of the lowest validation loss
_GREW = 0.1
_TOLD = 3  # spikes told one by one


def noticed(accounts: Sequence[Account]) -> list[dict[str, Any]]:
    """All of it: `{"stages", "kind", "text"}`, what is the same of several stages once."""
    stages: dict[tuple[str, str], list[str]] = {}
    for account in accounts:
        for entry in _of_stage(account):
            stages.setdefault(entry, []).append(account.name)
    # What was said before the start comes last: it was known.
    order = sorted(stages, key=lambda entry: entry[0] == "plan")
    return [{"stages": stages[kind, text], "kind": kind, "text": text} for kind, text in order]


def _of_stage(account: Account) -> list[tuple[str, str]]:
    return [
        *(("state", note) for note in account.notes),
        *_interruptions(account),
        *_skipped(account),
        *_spikes(account),
        *_stalls(account),
        *_batches(account),
        *_repeats(account),
        *_validation(account),
        *_memory(account),
        *_code(account),
        *(("plan", f"said before the start: {text}") for text in account.planned.get("warnings", ())),
    ]


def _interruptions(account: Account) -> Iterator[tuple[str, str]]:
    for before, after in zip(account.launches, account.launches[1:], strict=False):
        step = after.get("from_step")
        where = f"at step {step:,}" if step is not None else "later"
        if "exit_code" not in before:
            how = "was killed, or the machine went down: it wrote no end"
        elif before["exit_code"] == EXIT_DONE:
            continue
        else:
            how = f"ended with exit code {before['exit_code']}: {before.get('reason', 'no reason given')}"
        apart = after.get("began", 0) - before["ended"] if "ended" in before else None
        pause = f", {duration(apart)} later" if apart is not None else ""
        yield "interruption", f"a launch {how.rstrip('.')}. It was gone on with {where}{pause}"
    processes = [launch.get("processes") for launch in account.launches]
    if len(set(processes)) > 1:
        yield "interruption", f"launches had different numbers of processes: {', '.join(map(str, processes))}"


def _skipped(account: Account) -> Iterator[tuple[str, str]]:
    loss = account.metrics["train/loss"]
    lost = loss.steps[~np.isfinite(loss.values)]
    if len(lost):
        shown = ", ".join(f"{int(step):,}" for step in lost[:_TOLD])
        more = f" and {len(lost) - _TOLD} more" if len(lost) > _TOLD else ""
        yield "skipped", f"{_steps(len(lost))} not finite and skipped: the weights were not touched at {shown}{more}"
    failed = account.metrics["checkpoint/failed"]
    if len(failed):
        last = int(failed.values[-1])
        yield "checkpoint", f"{last} save{'s' * (last > 1)} failed, the last at step {int(failed.steps[-1]):,}"


def _spikes(account: Account) -> Iterator[tuple[str, str]]:
    found = spikes(account.metrics["train/loss"])
    for spike in sorted(found, key=lambda each: each.usual - each.value)[:_TOLD]:
        over = "" if spike.first == spike.last else f" (steps {spike.first:,} to {spike.last:,})"
        yield (
            "spike",
            f"loss {spike.value:.3f} at step {spike.step:,}{over}, where {spike.usual:.3f} was usual: more than "
            f"{SPREADS:g} spreads above the median of the {WINDOW} logged steps before",
        )
    if len(found) > _TOLD:
        yield "spike", f"and {len(found) - _TOLD} more spikes, not as high"


def _stalls(account: Account) -> Iterator[tuple[str, str]]:
    starts = [launch.get("from_step", 0) for launch in account.launches] or [0]
    found = stalls(account.metrics["train/step_seconds"], starts)
    if found is not None:
        yield (
            "stall",
            f"{_steps(found.count)} more than {TIMES:g} times as long as usual ({found.usual_seconds:.3g} s): "
            f"{duration(found.lost_seconds)} lost, the longest {duration(found.longest_seconds)} at step "
            f"{found.longest_step:,}",
        )


def _batches(account: Account) -> Iterator[tuple[str, str]]:
    entries = account.ledger.get("batches") or []
    for entry in entries[1:]:
        yield (
            "batch",
            f"from step {entry['step']:,} on ({human(entry['tokens'])} tokens read): {entry['global_batch_tokens']:,} "
            f"tokens a step on {entry['layout']}",
        )


def _repeats(account: Account) -> Iterator[tuple[str, str]]:
    for source in data_read(account):
        if source["epochs"] is not None and source["epochs"] > 1:
            allowed = source["max_epochs"]
            yield (
                "repeats",
                f"{source['name']} was read {source['epochs']:.2f} times"
                + (f" ({allowed:g} allowed)" if allowed is not None else ""),
            )
        asked, read = source["share_asked"], source["share_read"]
        if asked is not None and abs(asked - read) > max(_SHARE_OFF, _order_allows(account)):
            yield "shares", f"{source['name']} is {read:.1%} of what was read, and {asked:.1%} were asked for"


def _order_allows(account: Account) -> float:
    """The order of the data follows the weights to within a row for each source."""
    data = account.recipe.get("data") or {}
    rows = account.tokens / (data.get("seq_len") or 1)
    return len(data.get("sources") or ()) / rows if rows else 1.0


def _validation(account: Account) -> Iterator[tuple[str, str]]:
    losses = account.metrics["val/loss"].finite
    if len(losses) < 3:
        return
    best = int(losses.values.argmin())
    lowest, last = losses.values[best], losses.values[-1]
    if last > lowest + _WORSE * abs(lowest):
        yield (
            "validation",
            f"validation loss was lowest at step {int(losses.steps[best]):,} ({lowest:.4f}) and ends at {last:.4f}: "
            "what came after made it worse",
        )


def _memory(account: Account) -> Iterator[tuple[str, str]]:
    for name, what in ((GPU_MEMORY, "the GPU"), (HOST_MEMORY, "the main process")):
        grew = growth(account.metrics[name])
        if grew is not None and grew > _GREW:
            yield "memory", f"memory of {what} grew by {grew:.0%} from the second quarter of the run to the last"


def _code(account: Account) -> Iterator[tuple[str, str]]:
    states = [(launch.get("environment") or {}).get("code") for launch in account.launches]
    known = [state for state in states if state]
    if any(state["dirty"] for state in known):
        yield "code", "files of cheaptrain were changed and in no commit when it ran: the commit alone does not give it"
    if len({state["commit"] for state in known}) > 1:
        yield "code", f"launches ran different commits: {', '.join(state['commit'][:12] for state in known)}"


def _steps(count: int) -> str:
    return f"{count:,} steps were" if count > 1 else "1 step was"
