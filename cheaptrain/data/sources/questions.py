"""Questions and answers from the docstrings of a manual: what a thing is or does, and what arguments it takes.

The wording of a question is chosen by a hash of what it is about, so the same packages give the same conversations
everywhere. The answer is the first paragraph of the docstring, on one line: what follows it is lists and examples that
answer other questions.
"""

import hashlib
from collections.abc import Iterator, Sequence

from cheaptrain.chat.conversation import Conversation, exchange

_OF_MODULE = ("What is the module {name} for?", "What does the module {name} contain?", "Describe the module {name}.")
_OF_CLASS = ("What is {name}?", "What is the class {name} for?", "Describe the class {name}.")
_OF_FUNCTION = ("What does {name} do?", "What is {name} for?", "Describe the function {name}.")
_ARGUMENTS = (
    "What arguments does {name} take?", "Which arguments does {name} have?", "How is {name} called?",
    "What is the signature of {name}?",
)  # fmt: skip


def about(heading: str, docstring: str) -> Iterator[Conversation]:
    """Conversations about one documented thing. `heading`: `module a.b`, `class a.B` or `a.f(x, *, y)`."""
    kind, _, rest = heading.partition(" ")
    called = kind not in ("module", "class")
    name = heading.partition("(")[0] if called else rest
    wordings = _OF_FUNCTION if called else _OF_MODULE if kind == "module" else _OF_CLASS
    if summary := " ".join(docstring.partition("\n\n")[0].split()):
        yield exchange(_worded(wordings, name), summary)
    if called and not heading.endswith("()"):
        yield exchange(_worded(_ARGUMENTS, name), heading)


def _worded(wordings: Sequence[str], name: str) -> str:
    digest = hashlib.blake2b(f"{len(wordings)} {name}".encode(), digest_size=8).digest()
    return wordings[int.from_bytes(digest, "little") % len(wordings)].format(name=name)
