"""Problems of a recipe: each says where, which key, and what to do; all of them are shown at once.

A recipe with five mistakes should cost one attempt, not five. The reading code therefore collects problems and raises
them together, in the order of the files' lines.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from cheaptrain.errors import RecipeError


@dataclass(frozen=True, order=True)
class Origin:
    """Where a value was written."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


_LONGEST_KEY = 160  # of a key in a message; some files are no recipes at all
COMMAND_LINE = Origin("command line", 0)


@dataclass(frozen=True)
class Problem:
    """One mistake. `key` is dotted; empty when the mistake is not about a key."""

    origin: Origin
    key: str
    message: str

    def __str__(self) -> str:
        key = self.key if len(self.key) <= _LONGEST_KEY else f"{self.key[:_LONGEST_KEY]}..."
        return ": ".join(filter(None, (str(self.origin), key, self.message)))


class RecipeProblems(RecipeError):
    """Everything wrong with one recipe. Exit code 2."""

    def __init__(self, recipe: str, problems: Iterable[Problem]) -> None:
        self.recipe = recipe
        self.problems = tuple(sorted(dict.fromkeys(problems), key=lambda problem: problem.origin))
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [str(problem).replace("\n", "\n      ") for problem in self.problems]
        return "\n  ".join([f"{self.recipe}: {len(lines)} problems", *lines])
