"""The last held-out loss of the runs, side against side.

Loss per token depends on the tokenizer: one with longer tokens has a higher loss and may know the text better. So with
different tokenizers the held-out text is compared by bits per byte, which no tokenizer changes. A loss is one number of
a run: of two runs nobody knows how much of their difference is the seed, so there is an interval over seeds only.
"""

import json
from collections.abc import Sequence

from cheaptrain.compare.logged import Logged
from cheaptrain.compare.sides import Member, Side
from cheaptrain.compare.tasks import NOT_COMPARED, Comparison, as_far_as_the_others, by_runs

_OTHER_TOKENIZER = "the tokenizers differ, so losses per token say nothing: bits per byte instead"
_OTHER_TEXT = "sources, or the share that is held out, differ: it may not be the same text"


def one_tokenizer(sides: Sequence[Side]) -> bool:
    """Whether all runs count the same tokens, as far as is known."""
    hashes = {(m.kept or {}).get("inputs", {}).get("tokenizer") for side in sides for m in side.members}
    return len(hashes - {None}) <= 1


def compare_held_out(first: Side, second: Side, logged: Sequence[Sequence[Logged]]) -> list[Comparison]:
    """All sources together, and each that both have. `logged`: what the two have logged."""
    same = one_tokenizer((first, second))
    metric, unit = ("loss", "nats a token") if same else ("bpb", "bits a byte")
    odd = ((_OTHER_TOKENIZER, not same), (_OTHER_TEXT, _held_out(first) != _held_out(second)))
    notes = tuple(note for note, holds in odd if holds)
    found = []
    for name in _names(logged, metric):
        sides, behind = list[list[tuple[Member, float]]](), list[str]()
        for side, runs in zip((first, second), logged, strict=True):
            columns = [(run.member, run.metrics[name].finite) for run in runs]
            ends = [(member, column) for member, column in columns if len(column)]
            abreast, note = as_far_as_the_others(side, ends, [column.steps[-1] for _, column in ends])
            sides.append([(member, float(column.values[-1])) for member, column in abreast])
            behind += note
        if all(sides):
            source = "" if name == f"val/{metric}" else f", {name.split('/')[1]}"
            known = (*notes, *behind)
            one = Comparison(
                f"held-out text{source}", metric, NOT_COMPARED, unit=unit, higher_is_better=False, notes=known
            )
            found.append(by_runs(one, sides[0], sides[1], second.name))
    return found


def _names(logged: Sequence[Sequence[Logged]], metric: str) -> list[str]:
    """`val/loss` and `val/<source>/loss`; a lone source is the whole."""
    names = dict.fromkeys(name for side in logged for run in side for name in run.metrics.columns)
    sources = [
        name for name in names if name.startswith("val/") and name.count("/") == 2 and name.endswith(f"/{metric}")
    ]
    return [f"val/{metric}", *(sources if len(sources) > 1 else ())]


def _held_out(side: Side) -> set[str]:
    """What says which text is held out."""
    return {json.dumps(_choice(member), sort_keys=True) for member in side.members if member.kept}


def _choice(member: Member) -> dict[str, object]:
    data = (member.kept or {}).get("identity", {}).get("data", {})
    sources = [{key: source.get(key) for key in ("name", "files", "hub")} for source in data.get("sources", [])]
    return {"validation": data.get("validation"), "unit_bytes": data.get("unit_bytes"), "sources": sources}
