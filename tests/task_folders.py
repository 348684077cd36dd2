"""Small task files of lm-eval with their data: multiple choices and their group, text to write, text to weigh."""

import json
from pathlib import Path

CHOICE = """task: stones
dataset_path: json
dataset_kwargs:
  data_files:
    train: data/examples.jsonl
    test: data/stones.jsonl
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
- metric: acc
  aggregation: mean
  higher_is_better: true
- metric: acc_norm
  aggregation: mean
  higher_is_better: true
metadata:
  version: 1.0
"""
WRITING = """task: rivers
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/rivers.jsonl
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
  do_sample: false
metric_list:
- metric: exact_match
  aggregation: mean
  higher_is_better: true
metadata:
  version: 1.0
"""
SAID = """task: springs
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/stones.jsonl
output_type: loglikelihood
test_split: test
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
- metric: perplexity
  aggregation: perplexity
  higher_is_better: false
metadata:
  version: 1.0
"""
GROUP = """group: nature
task: [stones, pebbles]
aggregate_metric_list:
- metric: acc
  aggregation: mean
  weight_by_size: false
metadata:
  version: 1.0
"""
_WORDS = ("river", "stone", "light", "green", "quick", "small", "bright", "slow")


def write_tasks(folder: Path) -> Path:
    """Write `tasks/` and, beside it, `data/`; returns the folder of the tasks."""
    tasks, data = folder / "tasks", folder / "data"
    tasks.mkdir(parents=True)
    data.mkdir()
    for name, count, salt in (("stones", 12, 1), ("pebbles", 7, 3), ("examples", 9, 5)):
        rows = []
        for number in range(count):
            words = [_WORDS[(number * salt + place) % 8] for place in range(3)]
            rows.append({"question": f"the {words[0]} {number} was", "choices": words, "answer": number % 3})
        write_rows(data / f"{name}.jsonl", rows)
    rows = [{"question": f"when the {_WORDS[number % 8]}", "answer": _WORDS[(number + 1) % 8]} for number in range(5)]
    write_rows(data / "rivers.jsonl", rows)
    (tasks / "stones.yaml").write_text(CHOICE, encoding="utf-8")
    (tasks / "pebbles.yaml").write_text(
        CHOICE.replace("task: stones", "task: pebbles").replace("data/stones", "data/pebbles"), encoding="utf-8"
    )
    (tasks / "rivers.yaml").write_text(WRITING, encoding="utf-8")
    (tasks / "springs.yaml").write_text(SAID, encoding="utf-8")
    (tasks / "nature.yaml").write_text(GROUP, encoding="utf-8")
    return tasks


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
