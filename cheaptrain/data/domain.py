"""Sets of tokens that a recipe can add to its tokenizer, and how text that holds them is read as plain text.

`add_tokens = "multiplication"` is 92 tokens with which every product can be written, question and result: the 81 facts
of the table as one token each, the ten digits for everything else, and a sign for products that are no fact.

    7 × 8 = 56        7 × 8 = ⟦7×8⟧⟦5⟧⟦6⟧
    23 × 4            ⟦2⟧⟦3⟧⟦×⟧⟦4⟧

The brackets are part of each token. The trap: an added token is found wherever its characters stand, so one spelt "7×8"
would appear in every text that says so, injected or not, and the condition without injection would have it too. ⟦ and ⟧
hardly occur in text, a person still sees what is meant, and a program gets the number back by `plainly`.
"""

import re
from collections.abc import Sequence

MULTIPLICATION = (
    *(f"⟦{a}×{b}⟧" for a in range(1, 10) for b in range(1, 10)),
    *(f"⟦{digit}⟧" for digit in range(10)),
    "⟦×⟧",
)
SETS = {"multiplication": MULTIPLICATION}
_FACT_BEFORE_RESULT = re.compile(r"⟦\d×\d⟧(?=⟦?\d)")
_BRACKETED = re.compile(r"⟦([\d×]+)⟧")


def tokens_of(add_tokens: str | Sequence[str] | None) -> tuple[str, ...]:
    """The tokens that `tokenizer.add_tokens` stands for: those of a set by its name, those of a list, or none."""
    return SETS[add_tokens] if isinstance(add_tokens, str) else tuple(add_tokens or ())


def plainly(text: str) -> str:
    """`text` as it would stand without domain tokens: `⟦7×8⟧⟦5⟧⟦6⟧` → `56`, `⟦2⟧⟦3⟧⟦×⟧⟦4⟧` → `23×4`.

    A fact that stands right before a number is how that number was found, and goes; any other is its question.
    """
    return _BRACKETED.sub(r"\1", _FACT_BEFORE_RESULT.sub("", text))
