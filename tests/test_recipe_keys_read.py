"""A key that is accepted and read by nothing is the worst kind of silence: every key must be read by something."""

import ast
import json
from pathlib import Path
from typing import Any

from small_runs import prepare, recipe_table, run_child, write_recipe, write_texts
from task_folders import write_tasks

import cheaptrain
from cheaptrain.recipe import schema

# Read in the processes that prepare, where the spy of this test does not reach: looked for in the source instead.
READ_WHILE_PREPARING = (schema.Source, schema.Drills, schema.TokenizerTrain, schema.Tokenizer, schema.Transform)
# While preparing, for a hub id only, or only when a step is not finite (tested with the runs).
READ_ELSEWHERE = {
    *("Data.unit_bytes", "Data.workers", "Data.validation", "Model.revision", "Model.config"),
    *("Train.on_nonfinite", "Train.max_skipped_steps", "Distill.revision", "Distill.cache"),
}


def _fields() -> dict[str, type[schema.Section]]:
    sections = [kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, schema.Section)]
    return {f"{kind.__name__}.{name}": kind for kind in sections for name in kind.model_fields}


def _spied(paths: list[str], again: str, note: Path) -> Any:
    """Work for a child: plan, inspect and train the recipes, then `again`, which changes the batch of a finished one,
    noting every key that is read after the recipe is loaded."""

    def work() -> None:
        from rich.console import Console

        from cheaptrain.launching import recipe_environment
        from cheaptrain.recipe import load
        from cheaptrain.report.inspect import print_rows
        from cheaptrain.report.plan import print_plans
        from cheaptrain.train import chain

        console = Console()
        loaded = [load.load_recipe(path) for path in [*paths, again]]
        read: set[str] = set()
        plain = schema.Section.__getattribute__

        def spy(self: schema.Section, name: str) -> Any:
            if name in type(self).model_fields:
                read.add(f"{type(self).__name__}.{name}")
            return plain(self, name)

        # Loading, resolving where values came from, and the identity read every key; they must not count.
        chain.load_recipe = lambda path, overrides: next(recipe for recipe in loaded if str(recipe.path) == path)
        chain.identity = _unseen(chain.identity, plain, spy)
        schema.Section.__getattribute__ = spy  # type: ignore[method-assign]
        recipe_environment(loaded)  # what launch/run.py asks before anything else
        print_plans(loaded[:-1], console)
        for recipe in loaded:
            print_rows(recipe, console, first_row=0, count=1)
        chain.run_chain(paths, ())
        chain.run_chain([again], ())
        schema.Section.__getattribute__ = plain  # type: ignore[method-assign]
        note.write_text("\n".join(sorted(read)))

    return work


def _unseen(function: Any, plain: Any, spy: Any) -> Any:
    def wrapped(*arguments: Any) -> Any:
        schema.Section.__getattribute__ = plain  # type: ignore[method-assign]
        try:
            return function(*arguments)
        finally:
            schema.Section.__getattribute__ = spy  # type: ignore[method-assign]

    return wrapped


def test_every_recipe_key_is_read_by_something(tmp_path: Path) -> None:
    write_texts(tmp_path, documents=200)
    examined = {"task_folder": str(write_tasks(tmp_path)), "tasks": ["stones"], "light": ["stones"], "light_limit": 2}
    turns = [{"prompt": f"{number}?", "completion": f"yes {number}"} for number in range(300)]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    chats = {
        "name": "turns",
        "files": str(tmp_path / "turns.jsonl"),
        "format": "chat",
        "weight": "size",
        "max_epochs": 9.0,
    }
    sums = {"documents": 9, "digits": 1, "held_out": 0.5}
    asked = {"name": "sums", "drills": sums, "format": "chat", "weight": 0}
    paths = []
    plain = {"train": {"steps": None, "tokens": 1024}, "env": {"CHEAP": "1"}, "eval": examined}
    for name, changes in {
        "plain": plain,
        "muon": {
            "train": {"optimizer": "muon", "muon_lr": 0.01, "muon_momentum": 0.9, "schedule": "wsd", "decay": "50%"},
            "samples": {"prompts": ["notes 1:"], "max_new_tokens": 2, "temperature": 0.5},
            "log": {"trackers": ["tensorboard"]},
            "plan": {"tokens_per_second": 1000.0, "dollars_per_gpu_hour": 2.0, "gpu": "H200"},
        },
        "epochs": {"train": {"steps": None, "epochs": 0.3, "on_nonfinite": "skip"}},
        "flops": {"train": {"steps": None, "flops": 1e9}, "plan": {"gpu": "H200"}},
        "ratio": {"train": {"steps": None, "tokens_per_parameter": 0.01}},
        "second": {"model": {"preset": None, "init_from": str(tmp_path / "plain" / "final")}},
        "chat": {
            "model": {"preset": None, "init_from": str(tmp_path / "plain" / "final")},
            "data": {
                "sources": [
                    chats,
                    asked,
                    *({**source, "weight": 0} for source in recipe_table(tmp_path)["data"]["sources"]),
                ]
            },
            "chat": {"template": "plain", "system": "short", "max_cut": 1.0, "max_dropped": 1.0},
            "train": {"objective": "assistant_only", "loss_weighting": "example", "neftune_alpha": 1.0},
            "probe": {"source": "sums", "questions": 2, "max_new_tokens": 2},
            "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["q_proj"]},
        },
        "distill": {
            "train": {"objective": "distill"},
            "distill": {"teacher": str(tmp_path / "plain" / "final"), "divergence": "jsd", "jsd_beta": 0.4},
        },
        "again": {
            "run": {"dir": str(tmp_path / "plain"), "allow_batch_change": True},
            "train": plain["train"] | {"global_batch_tokens": 512},
        },
    }.items():
        table = recipe_table(tmp_path, name)
        table["train"]["steps"] = 4
        table["train"]["warmup"] = "10%"
        for section, values in changes.items():
            merged = table.get(section, {}) | values
            table[section] = {key: value for key, value in merged.items() if value is not None}
        paths.append(write_recipe(tmp_path / f"{name}.toml", table))
    for name in ("plain", "chat"):
        prepare(str(tmp_path / f"{name}.toml"))
    log, note = tmp_path / "log", tmp_path / "read"
    assert run_child(_spied(paths[:-1], paths[-1], note), log) == 0, log.read_text()[-3000:]
    read = set(note.read_text().split())

    attributes = {
        node.attr
        for file in Path(cheaptrain.__file__).parent.rglob("*.py")
        if file.parent.name != "recipe"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = []
    for key, kind in _fields().items():
        name = key.partition(".")[2]
        elsewhere = kind in READ_WHILE_PREPARING or key in READ_ELSEWHERE
        if key not in read and not (elsewhere and name in attributes):
            unread.append(key)
    assert unread == []
