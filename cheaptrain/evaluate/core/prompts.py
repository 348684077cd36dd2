"""What a model reads for one question of CORE: its examples, then the question, once for each thing compared.

    multiple_choice   EXAMPLES query delimiter choice            one prompt a choice: they differ at the end
    schema            EXAMPLES option delimiter continuation     one prompt an option: they differ before the end
    language_modeling EXAMPLES context delimiter [continuation]  without and with what has to be said

An example is rendered like its question, with the right answer, and followed by a blank line. Examples are drawn from
the other questions of the task by a generator that depends on the place of the question alone: the same on every
machine, for every model. The trap is the end of the prompt without continuation: a space left there becomes a token of
its own, which is no prefix of the whole, so it is cut; it is the first of what has to be said.
"""

import random
from collections.abc import Sequence
from typing import Any

from cheaptrain.evaluate.core.bundle import CoreTask, Question

_DRAW = 1234


def prompts(task: CoreTask, question: Question, among: Sequence[Question]) -> list[str]:
    """The prompts of a question; `among`: all questions of the task that examples may be drawn from."""
    row, delimiter = question.row, task.delimiter
    before = "".join(f"{_example(task, shot.row)}\n\n" for shot in examples(question.index, task.shots, among))
    if task.kind == "multiple_choice":
        return [f"{before}{row['query']}{delimiter}{choice}" for choice in row["choices"]]
    if task.kind == "schema":
        return [f"{before}{option}{delimiter}{row['continuation']}" for option in row["context_options"]]
    context = f"{before}{row['context'].strip()}{delimiter}"
    return [context.rstrip(), context + row["continuation"]]


def examples(index: int, count: int, among: Sequence[Question]) -> list[Question]:
    """The `count` examples of question `index`: never the question itself."""
    # A sample depends on how many there are, not on what they are: this is one of the list without the question.
    places = random.Random(_DRAW + index).sample(range(len(among) - 1), count)
    return [among[place + (place >= index)] for place in places]


def _example(task: CoreTask, row: dict[str, Any]) -> str:
    if task.kind == "multiple_choice":
        return f"{row['query']}{task.delimiter}{row['choices'][row['gold']]}"
    if task.kind == "schema":
        return f"{row['context_options'][row['gold']]}{task.delimiter}{row['continuation']}"
    return f"{row['context'].strip()}{task.delimiter}{row['continuation']}"
