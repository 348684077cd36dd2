"""Whole runs on conversations: every one as often as asked, resumed anywhere, beside text, and the model learns."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runs import (
    final_state,
    final_weights,
    ledger_of,
    note_rows,
    prepare,
    read_lines,
    recipe_table,
    rows_of_steps,
    run_child,
    tail,
    train,
    train_together,
    train_until,
    write_recipe,
    write_texts,
)

from cheaptrain.data.open import open_documents
from cheaptrain.errors import RecipeError
from cheaptrain.recipe.load import load_recipe
from cheaptrain.report.plan import print_plan
from cheaptrain.train.survey import Survey, survey

SEQ = 128
COLOURS = ["red", "green", "blue", "white", "black", "yellow"]


def write_chats(folder: Path, name: str, count: int, words: int) -> None:
    """Conversations of one or two exchanges; all are different."""
    lines = []
    for number in range(count):
        turns = [
            {"role": "user", "content": f"{name} {number}: what colour?" + " please" * (number % words)},
            {"role": "assistant", "content": COLOURS[number % 6]},
        ]
        if number % 3 == 0:
            turns += [
                {"role": "user", "content": "sure?"},
                {"role": "assistant", "content": "yes, " + COLOURS[number % 6]},
            ]
        lines.append(json.dumps({"messages": turns}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def chat_table(folder: Path, run: str, **train_keys: Any) -> dict[str, Any]:
    """Two epochs over two sources of conversations, in steps of 4 rows."""
    table = recipe_table(folder, run)
    table["data"]["seq_len"] = SEQ
    table["tokenizer"] = {"train": {"vocab_size": 400, "sources": ["prose", "notes"]}}
    table["data"]["sources"] = [
        {"name": "long", "files": str(folder / "long.jsonl"), "weight": "size", "format": "chat"},
        {"name": "short", "files": str(folder / "short.jsonl"), "weight": "size", "format": "chat"},
        *({**source, "weight": 0} for source in table["data"]["sources"]),
    ]
    table["chat"] = {"template": "plain"}
    table["train"] = {
        "objective": "assistant_only", "epochs": 2, "global_batch_tokens": 4 * SEQ, "micro_batch_size": 2, "lr": 3e-3,
        "warmup": "4 steps", "cpu_threads": 1,
    } | train_keys  # fmt: skip
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sft")
    write_texts(path)
    write_chats(path, "long", 150, 12)
    write_chats(path, "short", 90, 2)
    recipe = write_recipe(path / "straight.toml", chat_table(path, "straight", neftune_alpha=5.0))
    prepare(recipe)

    def noted() -> None:
        note_rows(path / "straight.rows")
        train(recipe)()

    assert run_child(noted, path / "straight.log") == 0, tail(path / "straight.log")
    return path


def surveyed(folder: Path, recipe: str = "straight.toml") -> Survey:
    return survey(load_recipe(str(folder / recipe)), 1)


def test_two_epochs_read_a_conversation_more_or_less_than_twice(folder: Path) -> None:
    found = surveyed(folder)
    rows = [row for _, step in sorted(rows_of_steps(folder / "straight.rows").items()) for row in step]
    whole = sum(facts.rows(SEQ) for facts in found.sources.values())
    assert len(rows) == found.resolved.rows == 2 * whole + found.resolved.filled_up
    assert found.resolved.filled_up == -2 * whole % 4
    for first in (0, whole):
        read = Counter(tuple(row) for row in rows[first : first + whole])
        assert set(read.values()) == {1}
        for name, manifest in found.manifests.items():
            documents = open_documents(manifest, "train")
            for index in range(len(documents.lengths)):
                ids = documents.read(index)[0][:-1].tolist()
                held = sum(_holds(row, ids) for row in read)
                assert held == 1, (name, index)
    assert {tuple(row) for row in rows[:whole]} == {tuple(row) for row in rows[whole : 2 * whole]}
    assert rows[:whole] != rows[whole : 2 * whole]


def _holds(row: tuple[int, ...], ids: list[int]) -> bool:
    return any(list(row[at : at + len(ids)]) == ids for at in range(len(row) - len(ids) + 1) if row[at] == ids[0])


def test_plan_keeps_filled_up_rows_and_padding_to_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = surveyed(folder)
    print_plan(found, Console(width=200, soft_wrap=True))
    printed = capsys.readouterr().out
    if found.resolved.filled_up:
        assert f"filled up with {found.resolved.filled_up} row" in printed
    for name, manifest in found.manifests.items():
        useful = (manifest.train.tokens - manifest.train.documents) / (found.sources[name].rows(SEQ) * SEQ)
        assert f"{name} {useful:.2%}" in printed


def test_the_model_learns_nothing_from_what_assistants_say(folder: Path) -> None:
    records = read_lines(folder / "straight" / "metrics.jsonl")
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    scores = [record["val/loss"] for record in records if "val/loss" in record]
    assert losses[-1] < 0.5 * losses[0] and scores[-1] < 0.5 * scores[0]
    found, ledger = surveyed(folder), ledger_of(folder / "straight" / "final")
    taught = sum(int(open_documents(manifest, "train").supervised().sum()) for manifest in found.manifests.values())
    assert ledger["supervised_tokens"] >= 2 * taught
    assert found.resolved.filled_up or ledger["supervised_tokens"] == 2 * taught
    assert ledger["tokens_seen"] == found.resolved.rows * SEQ


@pytest.mark.slow
def test_stopped_in_an_epoch_a_run_goes_on_otherwise(folder: Path) -> None:
    """With noise on the embeddings (NEFTune), drawn anew in every step."""
    recipe = write_recipe(folder / "broken.toml", chat_table(folder, "broken", neftune_alpha=5.0))

    assert run_child(train_until(recipe, 7), folder / "broken.log") == 75, tail(folder / "broken.log")
    assert run_child(train(recipe), folder / "broken.log") == 0, tail(folder / "broken.log")
    for ours, theirs in (
        (final_weights(folder / "straight"), final_weights(folder / "broken")),
        (final_state(folder / "straight"), final_state(folder / "broken")),
    ):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_more_processes_read_other_conversations(folder: Path) -> None:
    recipe = write_recipe(folder / "two.toml", chat_table(folder, "two", loss_weighting="example"))
    alone = write_recipe(folder / "one.toml", chat_table(folder, "one", loss_weighting="example"))
    ended = train_together(2, [recipe], folder / "two.log", lambda rank: note_rows(folder / "two.rows"))
    assert ended == {0: 0, 1: 0}, tail(folder / "two.log")
    assert rows_of_steps(folder / "two.rows") == rows_of_steps(folder / "straight.rows")
    assert run_child(train(alone), folder / "one.log") == 0, tail(folder / "one.log")
    ours, theirs = (
        [record["train/loss"] for record in read_lines(folder / run / "metrics.jsonl") if "train/loss" in record]
        for run in ("one", "two")
    )
    assert np.allclose(ours, theirs, rtol=1e-3) and len(ours) > 10


def test_text_and_conversations_are_not_read_in_their_shares(folder: Path) -> None:
    table = chat_table(folder, "mixed", objective="next_token", steps=10)
    del table["train"]["epochs"]
    for source, weight in zip(table["data"]["sources"], (40, 30, 30, 0), strict=True):
        source["weight"] = weight
        source["max_epochs"] = 9.0
    recipe = write_recipe(folder / "mixed.toml", table)
    prepare(recipe)
    assert run_child(train(recipe), folder / "mixed.log") == 0, tail(folder / "mixed.log")
    ledger = ledger_of(folder / "mixed" / "final")
    shares = {name: tokens / ledger["tokens_seen"] for name, tokens in ledger["source_tokens"].items()}
    assert shares == pytest.approx({"long": 0.4, "short": 0.3, "prose": 0.3}, abs=3 / 40)
    # Under next_token all of a conversation is learned, not only what the assistant says.
    assert ledger["supervised_tokens"] > 0.8 * ledger["tokens_seen"]


def test_text_is_learned_as_if_an_assistant_said_it(folder: Path) -> None:
    table = chat_table(folder, "refused")
    table["data"]["sources"][2]["weight"] = "size"
    with pytest.raises(RecipeError, match="source 'prose' is text, which has no assistant"):
        load_recipe(write_recipe(folder / "refused.toml", table))
    table = chat_table(folder, "refused")
    table["data"]["sources"][1]["weight"] = 1.0
    with pytest.raises(RecipeError, match='weight = "size" is for all sources'):
        load_recipe(write_recipe(folder / "refused.toml", table))
