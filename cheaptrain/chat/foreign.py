"""A template that somebody else wrote: rendered by transformers' own Jinja, cut into parts where it says so itself.

`{% generation %}` around what the model must produce is required; without it nobody but the author knows the mask. The
rendered text is split at those marks and at its special tokens, and from there on treated like our own templates. Three
traps: a literal special token inside a message cannot be told from the template's own, so such conversations are
refused; a template that asks for today's date gives other ids tomorrow; `{% generation %}` around the content alone
leaves the stop token without loss, and the model never stops (`problems` says so).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from cheaptrain.chat.conversation import Conversation, Turn
from cheaptrain.chat.templates import Part, joined, said
from cheaptrain.errors import PreflightError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUESTIONS = ("QUESTION-ONE", "QUESTION-TWO")
_ANSWERS = ("ANSWER-ONE", "ANSWER-TWO")


@dataclass(frozen=True)
class ForeignTemplate:
    """`jinja` with `{% generation %}`; `variables`: bos_token and the like; `specials`: all special tokens."""

    jinja: str
    variables: Mapping[str, str]
    specials: tuple[str, ...]
    beginning: str | None

    def parts(self, conversation: Conversation) -> list[Part]:
        """The conversation, rendered. Raises PreflightError when the template cannot."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any
        try:
            rendered = render_jinja_template(
                conversations=[conversation.messages()],
                tools=[dict(tool) for tool in conversation.tools] or None,
                chat_template=self.jinja,
                return_assistant_tokens_mask=True,
                **cast(dict[str, Any], self.variables),
            )
        except Exception as error:  # a template raises what it likes
            raise PreflightError(
                f"chat.template cannot render the conversation that begins {conversation.text[:60]!r}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        (text,), (spans,) = rendered
        return joined(part for stretch in _stretches(text, spans) for part in self._split(*stretch))

    def refusal(self, conversation: Conversation) -> str | None:
        """Why this conversation cannot be rendered: a literal special token in what is said."""
        texts = [said(turn) for turn in conversation.turns] + [str(tool) for tool in conversation.tools]
        literal = next((token for token in self.specials if any(token in text for text in texts)), None)
        return f"it quotes {literal!r}, which a foreign template would make a real special token" if literal else None

    def problems(self) -> list[str]:
        """What is wrong with the template, found by rendering two exchanges."""
        if not _GENERATION.search(self.jinja):
            return ["it has no {% generation %} around what the model must produce"]
        if "strftime_now" in self.jinja:
            return ["it writes today's date, so that tomorrow the same conversations would have other tokens"]
        turns = [Turn(role, text) for pair in zip(_QUESTIONS, _ANSWERS, strict=True) for role, text in
                 zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
        try:
            parts = self.parts(Conversation(tuple(turns)))
        except PreflightError as error:
            return [str(error)]
        problems = []
        produced = "".join(part.text for part in parts if part.supervised)
        given = "".join(part.text for part in parts if not part.supervised)
        if any(answer not in produced for answer in _ANSWERS):
            problems.append("an answer lies outside {% generation %}")
        if any(question in produced for question in _QUESTIONS) or any(q not in given for q in _QUESTIONS):
            problems.append("a question lies inside {% generation %}")
        if not self._ends(parts):
            problems.append("the special token that ends an answer lies outside {% generation %}: the model would "
                            "never learn to stop")  # fmt: skip
        if self.beginning and sum(part.text == self.beginning for part in parts if part.marker) > len(turns):
            problems.append(f"{self.beginning} stands more than once a turn")
        if self.beginning and [part.text for part in parts[:2]] == [self.beginning] * 2:
            problems.append(f"{self.beginning} stands twice at the beginning")
        return problems

    def end_of_turn(self) -> str:
        """The special token that ends an answer."""
        parts = self.parts(Conversation((Turn("user", _QUESTIONS[0]), Turn("assistant", _ANSWERS[0]))))
        return [part.text for part in parts if part.supervised and part.marker][-1]

    def _ends(self, parts: list[Part]) -> bool:
        """Whether every answer is followed by a supervised special token."""
        wanted = 0
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            if any(answer in part.text for answer in _ANSWERS):
                wanted += bool(following and following.marker and following.supervised)
        return wanted == len(_ANSWERS)

    def _split(self, text: str, supervised: bool) -> list[Part]:
        """Parts of rendered text: its special tokens are the template's own."""
        pattern = "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True)))
        pieces = re.split(f"({pattern})", text) if self.specials else [text]
        return [Part(piece, piece in self.specials, supervised) for piece in pieces if piece]


def _stretches(text: str, spans: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    """`text` cut at the ends of the spans; True inside one."""
    stretches, position = [], 0
    for start, stop in spans:
        stretches += [(text[position:start], False), (text[start:stop], True)]
        position = stop
    return [*stretches, (text[position:], False)]
