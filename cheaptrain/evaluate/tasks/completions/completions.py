"""Beginnings of sentences for a person to see how a model goes on: grammar, everyday sense, knowledge of the world.

Shown, not scored: there is no one right end of a sentence. lm-eval wants a metric, so the number of words is counted,
and the task says of itself that it is shown (`metadata.shown`), which keeps it out of tables and comparisons.
"""

from typing import Any

from datasets import Dataset

_PROMPTS = {
    "sentence": (
        "The door was open, so",
        "She put the kettle on because",
        "Although it had rained all night,",
        "The children laughed when the dog",
        "If you leave ice in the sun, it",
        "He looked for his keys everywhere, but",
        "Once upon a time, in a village by the sea,",
        "The most important thing about learning to swim is",
        "My grandmother used to say that",
        "First wash the vegetables, then",
        "The teacher asked the class to be quiet, and",
        "After a long day at work, I like to",
    ),
    "world": (
        "The capital of France is",
        "Water is made of hydrogen and",
        "The planet closest to the sun is",
        "In winter the days are shorter because",
        "The opposite of hot is",
        "A year has twelve",
        "Plants need light, water and",
        "The largest ocean on Earth is the",
        "Shakespeare wrote plays such as",
        "The chemical symbol of gold is",
        "If yesterday was Friday, then tomorrow is",
        "The heart pumps blood through the",
    ),
}


def prompts(**_: Any) -> dict[str, Dataset]:
    """24 beginnings, twelve of each kind."""
    rows = [{"kind": kind, "prompt": prompt} for kind, each in _PROMPTS.items() for prompt in each]
    return {"test": Dataset.from_list(rows)}


def counted(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """How many words came."""
    return {"words": float(len(results[0].split()))}
