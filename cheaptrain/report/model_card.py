"""README.md of a checkpoint: what it is, what it was made of, what was measured of it, for people and for the hub.

The card is written while the checkpoint is, because nothing is ever written into one that stands; so it knows what the
run knew at that step and no more, and says where the report of the whole run lies. The traps: a card with the time of
day in it makes two equal checkpoints differ, so nothing is in it that another run of the same recipe would not say; and
a score of other weights under a model's name is an untruth. None can be of this checkpoint, which is not there to be
scored yet: told are those of the step before it that was scored last, under that step, and none go into the front
matter, which is about these weights.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import cheaptrain
from cheaptrain.checkpoint.jsonl import newest_record
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.verify import MANIFEST, RECIPE
from cheaptrain.errors import CheaptrainError
from cheaptrain.evaluate.results import Evaluation, TaskResult, holding_evaluations
from cheaptrain.recipe.schema import Recipe
from cheaptrain.report.ways import way_of

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MOST_ANCESTORS = 50
_OBJECTIVES = {"next_token": "next token", "distill": "distillation", "assistant_only": "what the assistant says"}


@dataclass(frozen=True)
class CardFacts:
    """The checkpoint that is being written. `kind`: the model's class; `parameters`: numbers it holds."""

    name: str
    recipe: Recipe
    run: RunDirectory
    step: int
    steps: int
    tokens: int
    supervised_tokens: int
    source_tokens: Mapping[str, int]
    kind: str
    parameters: int
    positions: int
    vocabulary: int


def model_card(facts: CardFacts) -> str:
    """The whole file. Reads the metrics, the scores and the ancestors' recipes; what is not there is left out."""
    ancestors, base = _ancestors(facts.recipe)
    held_out = newest_record(facts.run.metrics, "val/loss")
    front = ModelCardData(
        model_name=facts.name,
        license=facts.recipe.card.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        tags=["cheaptrain", *facts.recipe.card.tags],
        datasets=_datasets([*ancestors, facts.recipe.model_dump(mode="json")]),
    ).to_yaml()
    parts = [
        f"---\n{front}\n---",
        f"# {facts.name}, step {facts.step:,}",
        _summary(facts, ancestors, base),
        *_life(facts, ancestors),
        *_held_out(held_out),
        *_table_of_scores(_scores(facts)),
        _use(facts),
        _more(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(facts: CardFacts, ancestors: Sequence[Mapping[str, Any]], base: str | None) -> str:
    start = facts.recipe.model.init_from
    made = f"from the weights of {_code(start)}" if start else "from fresh weights"
    whole = "" if facts.step == facts.steps else ", which has not come to its end"
    lines = [
        f"A {facts.kind} of {facts.parameters:,} parameters with {facts.positions:,} positions and a vocabulary "
        f"of {facts.vocabulary:,}, trained with cheaptrain {cheaptrain.__version__}, {made}.",
        f"This is step {facts.step:,} of {facts.steps:,} of the stage{whole}: {facts.tokens:,} tokens read, "
        f"{facts.supervised_tokens:,} of them targets.",
    ]
    if ancestors:
        told = [tokens for ancestor in ancestors if (tokens := ancestor["tokens_seen"]) is not None]
        total = sum(told) + facts.tokens
        from_base = f" since {_code(base)}" if base else ""
        lines.append(f"With the {len(ancestors)} stage{'s' * (len(ancestors) > 1)} before it: {total:,}{from_base}.")
    if facts.recipe.distill is not None:
        lines.append(f"Its teacher was {_code(facts.recipe.distill.teacher)}.")
    return "\n".join(lines)


def _life(facts: CardFacts, ancestors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## How it was made"
    lines = [
        "| stage | learned from | tokens | peak rate | data (share of the tokens read) |",
        "|---|---|---:|---:|---|",
    ]
    for ancestor in ancestors:
        train = ancestor.get("train") or {}
        weights = {source["name"]: source.get("weight") for source in _sources(ancestor)}
        lines.append(
            _row(
                Path((ancestor.get("run") or {}).get("dir", "?")).name,
                _OBJECTIVES.get(str(train.get("objective")), str(train.get("objective"))),
                "?" if ancestor["tokens_seen"] is None else f"{ancestor['tokens_seen']:,}",
                train.get("lr"),
                ", ".join(f"{_code(name)} (weight {weight})" for name, weight in weights.items()),
            )
        )
    train_now = facts.recipe.train
    # In the recipe's order: that of the counts is another after a resume.
    counts = {source.name: facts.source_tokens.get(source.name) for source in facts.recipe.data.sources}
    read = ", ".join(f"{_code(name)} {count / max(1, facts.tokens):.1%}" for name, count in counts.items() if count)
    objective = _OBJECTIVES.get(train_now.objective, train_now.objective)
    lines.append(_row(facts.name, objective, f"{facts.tokens:,}", train_now.lr, read))
    yield "\n".join(lines)


def _held_out(record: Mapping[str, Any] | None) -> Iterator[str]:
    if record is None:
        return
    yield f"## On held-out text, at step {record['step']:,}"
    names = [
        key.split("/")[1] for key in record if key.startswith("val/") and key.endswith("/loss") and key != "val/loss"
    ]
    lines = ["| source | loss (nats a token) | bits a byte |", "|---|---:|---:|"]
    for label, prefix in [*((_code(name), f"val/{name}/") for name in names), ("all", "val/")]:
        lines.append(_row(label, _figure(record.get(f"{prefix}loss")), _figure(record.get(f"{prefix}bpb"))))
    yield "\n".join(lines)


def _scores(facts: CardFacts) -> Evaluation | None:
    """The last of the steps before this one that has scores; None without any, or where they cannot be read."""
    try:
        holding, _ = holding_evaluations(facts.run)
    except CheaptrainError:
        return None  # the report names it; a checkpoint is not the place
    before = [evaluation for evaluation in holding if (evaluation.checkpoint.step or 0) < facts.step]
    return next((evaluation for evaluation in reversed(before) if _main_results(evaluation)), None)


def _main_results(evaluation: Evaluation) -> list[TaskResult]:
    return [result for result in evaluation.newest().values() if result.metrics and not result.shown]


def _table_of_scores(scored: Evaluation | None) -> Iterator[str]:
    if scored is None:
        return
    yield f"## Scores, at step {scored.checkpoint.step or 0:,}"
    lines = [
        "| task | metric | value | standard error | items | shots | limit | scored by |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    for result in _main_results(scored):
        metric, way = result.metrics[0], way_of(result)
        error = "–" if metric.stderr is None else f"{metric.stderr:.4f}"
        shots = "–" if way.shots is None else way.shots
        limit = way.limited or "none"
        lines.append(
            _row(result.task, metric.name, f"{metric.value:.4f}", error, f"{result.n:,}", shots, limit, result.harness)
        )
    yield "\n".join(lines)


def _use(facts: CardFacts) -> str:
    talks = "" if facts.recipe.chat is None else "\ncheaptrain chat FOLDER            # or: cheaptrain serve FOLDER"
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("FOLDER") for kind in (AutoModelForCausalLM, AutoTokenizer))
```

```bash
lm_eval --model hf --model_args pretrained=FOLDER --tasks arc_easy{talks}
```"""


def _more(facts: CardFacts) -> str:
    report = _code(f"{facts.run.path}/report/report.html")
    return (
        f"`{RECIPE}` beside this file is the whole recipe, with where each value was written; `{MANIFEST}` has the "
        "hash of every file, of the data, of the tokenizer and of the weights this stage began with. The report of the "
        f"run, with curves, data read, environment and what was odd, lies at {report} on the machine that trained it, "
        "and `cheaptrain report RUN` writes it anew."
    )


def _ancestors(recipe: Recipe) -> tuple[list[dict[str, Any]], str | None]:
    """Recipes of the stages before this one, oldest first, each with the tokens it read; and the hub id in which the
    line begins, if it is one."""
    found: list[dict[str, Any]] = []
    start = recipe.model.init_from
    while start is not None and len(found) < _MOST_ANCESTORS:
        try:
            told = json.loads((Path(start) / RECIPE).read_text(encoding="utf-8"))["recipe"]
            tokens = json.loads((Path(start) / MANIFEST).read_text(encoding="utf-8"))["tokens_seen"]
            start = told["model"]["init_from"]
        except (OSError, ValueError, KeyError, TypeError):
            return found, start if _HUB_ID.fullmatch(start) and not Path(start).exists() else None
        found.insert(0, told | {"tokens_seen": tokens})
    return found, None


def _datasets(recipes: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Hub names of everything that was read, each once."""
    names = [source["hub"] for recipe in recipes for source in _sources(recipe) if source.get("hub")]
    return list(dict.fromkeys(names)) or None


def _sources(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [source for source in (recipe.get("data") or {}).get("sources") or [] if source.get("weight")]


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.4f}"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _code(text: Any) -> str:
    """In code marks, whatever it contains: names of sources and folders are anybody's."""
    shown = " ".join(str(text).split())
    mark = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{mark}{shown}{mark}" if len(mark) == 1 else f"{mark} {shown} {mark}"
