"""Processes that begin with other weights or other tokens train something that nobody asked for, and nothing fails."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_helpers import build
from ranks import run_ranks

from cheaptrain.errors import PreflightError
from cheaptrain.parallel.processes import join
from cheaptrain.train.alike import refuse_other_beginnings


def _begin(rank: int, size: int, other: str) -> str:
    processes = join(60)
    model = build(seed=1)
    differs = rank == size - 1
    if other == "weights" and differs:
        with torch.no_grad():
            model.get_input_embeddings().weight[7, 3] += 1e-6
    survey: Any = SimpleNamespace(
        loaded=SimpleNamespace(
            recipe=SimpleNamespace(model_dump=lambda mode: {"seed": int(other == "recipe" and differs)})
        ),
        tokenizer=SimpleNamespace(fingerprint="other" if other == "tokenizer" and differs else "same"),
        manifests={"web": SimpleNamespace(fingerprint="other" if other == "data" and differs else "same")},
        resolved=SimpleNamespace(steps=10, tokens=100),
    )
    try:
        refuse_other_beginnings(survey, model, processes)
    except PreflightError as error:
        return str(error)
    return "alike"


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("weights", "the starting weights"),
        ("data", "the prepared data of web"),
        ("tokenizer", "the tokenizer"),
        ("recipe", "the recipe"),
    ],
)
def test_a_process_begins_with_something_else(other: str, named: str) -> None:
    for said in run_ranks(_begin, 3, other):
        assert said.startswith(f"{named} is not the same on rank 2 as on rank 0")


def test_processes_that_are_alike_are_refused() -> None:
    assert run_ranks(_begin, 2, "") == ["alike", "alike"]
