"""GSM8K in the form `#### 42`: as a chat without examples, and as plain text after eight of our own.

The number after `####` is compared, commas and a trailing point aside; an answer without it is wrong, even where the
number stands in it, because where an answer ends is part of what is asked. The trap is a model that goes on: after its
own `####` it may write the next question and answer that, so the first `####` counts.

Questions: metadata `gsm8k`, a folder with `test.jsonl.gz` or such a file; without it openai/gsm8k of the hub.
"""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from cheaptrain.data.domain import plainly
from cheaptrain.errors import RecipeError

_FINAL = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")

# Written for this task.
_EXAMPLES = (
    (
        "A baker fills 6 trays with 8 rolls each and drops 5 of the rolls. How many rolls are left to sell?",
        "The trays hold 6 * 8 = 48 rolls.\nAfter 5 are dropped, 48 - 5 = 43 are left.",
        43,
    ),
    (
        "Mira reads 12 pages every evening. Her book has 300 pages and she has read 60. How many evenings does she "
        "still need?",
        "There are 300 - 60 = 240 pages left.\nAt 12 pages an evening that takes 240 / 12 = 20 evenings.",
        20,
    ),
    (
        "A bus has 40 seats. At the first stop 17 people get on, at the second 9 more, and 4 get off. How many seats "
        "are free then?",
        "On the bus are 17 + 9 - 4 = 22 people.\nSo 40 - 22 = 18 seats are free.",
        18,
    ),
    (
        "Tickets cost $9 for adults and $5 for children. What do 2 adults and 3 children pay?",
        "The adults pay 2 * 9 = 18 dollars.\nThe children pay 3 * 5 = 15 dollars.\nTogether that is 18 + 15 = 33.",
        33,
    ),
    (
        "Tom has half as many marbles as Ana, and Ana has 10 more than Ben, who has 14. How many marbles do the three "
        "have together?",
        "Ana has 14 + 10 = 24 marbles.\nTom has 24 / 2 = 12.\nTogether they have 24 + 12 + 14 = 50.",
        50,
    ),
    (
        "A tank holds 90 litres and is one third full. Water runs in at 4 litres a minute. How many minutes until it "
        "is full?",
        "One third of 90 is 90 / 3 = 30 litres.\n90 - 30 = 60 litres are missing.\nThat takes 60 / 4 = 15 minutes.",
        15,
    ),
    (
        "A coat of $80 is sold at 25% off, and the buyer pays with a $100 note. How much change is given?",
        "25% of 80 is 80 / 4 = 20 dollars.\nThe coat costs 80 - 20 = 60 dollars.\nThe change is 100 - 60 = 40 dollars.",
        40,
    ),
    (
        "A gardener plants 3 rows of 15 tulips and 2 rows of 20 daffodils. One flower in five does not grow. How "
        "many grow?",
        "There are 3 * 15 = 45 tulips and 2 * 20 = 40 daffodils, 45 + 40 = 85 flowers.\n85 / 5 = 17 do not grow.\n"
        "So 85 - 17 = 68 grow.",
        68,
    ),
)


def questions(gsm8k: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The 1,319 questions of the test set. Raises RecipeError when the files named are not there."""
    if gsm8k is None:
        return {"test": load_dataset("openai/gsm8k", "main", split="test")}
    given = Path(gsm8k)
    places = [given, *(given / f"test.jsonl{end}" for end in (".gz", ""))]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise RecipeError(f"metadata gsm8k = {gsm8k!r}: neither a file nor a folder with test.jsonl.gz")
    return {"test": load_dataset("json", data_files={"test": str(file)}, split="test")}


def examples() -> list[dict[str, str]]:
    """Eight worked examples, as rows of GSM8K."""
    return [{"question": question, "answer": f"{steps}\n#### {result}"} for question, steps, result in _EXAMPLES]


def marked(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the number after the first `####` is the one of the answer."""
    said, wanted = final(plainly(results[0])), final(doc["answer"])
    return {"exact_match": float(said is not None and said == wanted)}


def final(text: str) -> float | None:
    """The number after the first `####`; None where there is none."""
    found = _FINAL.search(text)
    return float(found[1].replace(",", "")) if found else None
