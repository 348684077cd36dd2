"""The chat templates: from one description of each, the parts of a conversation and the Jinja text that says the same.

A template frames every turn with markers (special tokens) and a header, and says what ends a turn. From that come two
things which must agree: `parts`, by which training data is made, and `jinja`, which is saved with the checkpoint as
`chat_template.jinja`. What the model must produce, and nothing else, is supervised: the content and the end of turn of
each assistant turn. The trap that parts avoid: rendering to text and tokenising the whole makes a stop token of a
literal `<|im_end|>` that somebody quoted, and lets the header merge with what follows it.

| name | turn | end of turn |
|---|---|---|
| chatml | `<|im_start|>role⏎content<|im_end|>⏎` | `<|im_end|>` |
| smollm2 | as chatml; a system turn of its own where a conversation has none | `<|im_end|>` |
| llama3 | `<|start_header_id|>role<|end_header_id|>⏎⏎content<|eot_id|>`, after one `<|begin_of_text|>` | `<|eot_id|>` |
| plain | `Role: content`, a line each | the tokenizer's end of text, after the assistant's |

Tools are listed in the system turn, after the line `Tools:`, one JSON object a line. A call is written by the assistant
as `<tool_call>`, a line of JSON with name and arguments, `</tool_call>`, each on its own line, after what else it says.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cheaptrain.chat.conversation import Conversation, Turn

TOOLS = "Tools:"
_SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Part(NamedTuple):
    """A stretch of a rendered conversation. `marker`: `text` is one special token; otherwise it is text, whatever it
    looks like. `supervised`: the model must produce it."""

    text: str
    marker: bool
    supervised: bool


@dataclass(frozen=True)
class Template:
    """How turns are framed. `{role}` in `header` is replaced by `roles[role]`; `lead` stands before every content.

    `end` closes the turns of `closed` roles; `between` stands between turns, `after` behind each. `system`: content of
    the system turn of conversations that have none.
    """

    name: str
    header: str
    end: str
    markers: tuple[str, ...]
    roles: Mapping[str, str]
    beginning: str = ""
    lead: str = ""
    between: str = ""
    after: str = ""
    closed: tuple[str, ...] = ("system", "user", "assistant", "tool")
    system: str | None = None

    def parts(self, conversation: Conversation) -> list[Part]:
        """The conversation, rendered: neighbours that are unsupervised text are one part."""
        return joined(self._parts(conversation))

    def refusal(self, conversation: Conversation) -> str | None:
        """Nothing that is said can be taken for a marker, so every conversation can be rendered."""
        return None

    def _parts(self, conversation: Conversation) -> Iterator[Part]:
        if self.beginning:
            yield Part(self.beginning, True, False)
        for number, turn in enumerate(with_system(conversation, self.system)):
            yield from self._split((self.between if number else "") + self.header.format(role=self.roles[turn.role]))
            supervised = turn.role == "assistant"
            yield Part(self.lead + said(turn), False, supervised)
            if turn.role in self.closed:
                yield Part(self.end, True, supervised)
            yield from self._split(self.after)

    def _split(self, text: str) -> Iterator[Part]:
        """Parts of a text of this template's own, in which markers are markers."""
        for piece in re.split(f"({'|'.join(map(re.escape, self.markers))})", text) if self.markers else [text]:
            if piece:
                yield Part(piece, piece in self.markers, False)

    @property
    def jinja(self) -> str:
        """The same as a template of transformers, with `{% generation %}`, tools and add_generation_prompt."""
        before, behind = self.header.split("{role}")
        roles = json.dumps(dict(self.roles))
        others = [role for role in self.closed if role != "assistant"]
        other_end = _literal(self.end if others else "")
        return (
            f"{{%- set roles = {roles} -%}}\n"
            f"{{%- set ns = namespace(system={_literal(self.system or '')}, rest=messages, calls='', first=true) -%}}\n"
            "{%- if messages and messages[0]['role'] == 'system' -%}\n"
            "{%- set ns.system = messages[0]['content'] -%}{%- set ns.rest = messages[1:] -%}\n"
            "{%- endif -%}\n"
            "{%- if tools -%}\n"
            f"{{%- set ns.system = (ns.system + '\\n\\n' if ns.system else '') + {_literal(TOOLS)} -%}}\n"
            "{%- for tool in tools -%}{%- set ns.system = ns.system + '\\n' + (tool | tojson) -%}{%- endfor -%}\n"
            "{%- endif -%}\n"
            f"{{{{- {_literal(self.beginning)} -}}}}\n"
            "{%- if ns.system -%}\n"
            f"{{{{- {_literal(before)} + roles['system'] + {_literal(behind + self.lead)} + ns.system"
            f" + {other_end} + {_literal(self.after)} -}}}}\n"
            "{%- set ns.first = false -%}\n"
            "{%- endif -%}\n"
            "{%- for message in ns.rest -%}\n"
            f"{{{{- ('' if ns.first else {_literal(self.between)}) + {_literal(before)} + roles[message['role']]"
            f" + {_literal(behind)} -}}}}\n"
            "{%- set ns.first = false -%}\n"
            "{%- if message['role'] == 'assistant' -%}\n"
            "{%- set ns.calls = message['content'] or '' -%}\n"
            "{%- for call in message['tool_calls'] or [] -%}\n"
            "{%- set made = call['function'] or call -%}\n"
            "{%- set given = made['arguments'] if made['arguments'] is string else made['arguments'] | tojson -%}\n"
            "{%- set ns.calls = ns.calls + ('\\n' if ns.calls else '') + '<tool_call>\\n{\"name\": ' +"
            " (made['name'] | tojson) + ', \"arguments\": ' + given + '}\\n</tool_call>' -%}\n"
            "{%- endfor -%}\n"
            f"{{%- generation -%}}{{{{- {_literal(self.lead)} + ns.calls + {_literal(self.end)} -}}}}"
            "{%- endgeneration -%}\n"
            "{%- else -%}\n"
            f"{{{{- {_literal(self.lead)} + message['content'] + {other_end} -}}}}\n"
            "{%- endif -%}\n"
            f"{{{{- {_literal(self.after)} -}}}}\n"
            "{%- endfor -%}\n"
            "{%- if add_generation_prompt -%}\n"
            f"{{{{- ('' if ns.first else {_literal(self.between)}) + {_literal(before)} + roles['assistant']"
            f" + {_literal(behind)} -}}}}\n"
            "{%- endif -%}\n"
        )


def find_template(name: str, system: str | None, end_of_text: str) -> Template | None:
    """One of ours, or None. `end_of_text`: the tokenizer's, which ends the turns of `plain`."""
    same = {role: role for role in ("system", "user", "assistant", "tool")}
    if name in ("chatml", "smollm2"):
        if system is None and name == "smollm2":
            system = _SMOLLM2_SYSTEM
        return Template(
            name, "<|im_start|>{role}\n", "<|im_end|>", ("<|im_start|>", "<|im_end|>"), same, after="\n", system=system
        )
    if name == "llama3":
        markers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        header = "<|start_header_id|>{role}<|end_header_id|>\n\n"
        roles = same | {"tool": "ipython"}
        return Template(name, header, "<|eot_id|>", markers, roles, beginning=markers[0], system=system)
    if name == "plain":
        roles = {role: role.capitalize() for role in same}
        return Template(
            name, "{role}:", end_of_text, (), roles, lead=" ", between="\n", closed=("assistant",), system=system
        )
    return None


def with_system(conversation: Conversation, default: str | None) -> list[Turn]:
    """The turns to render: tools written into the system turn, or the default one where there is none.

    An empty system turn stays out, and keeps the default out.
    """
    turns, system = list(conversation.turns), default or ""
    if turns and turns[0].role == "system":
        system = turns.pop(0).content
    if conversation.tools:
        listed = "\n".join([TOOLS, *(_json(tool) for tool in conversation.tools)])
        system = f"{system}\n\n{listed}" if system else listed
    return [Turn("system", system), *turns] if system else turns


def said(turn: Turn) -> str:
    """What a turn says, calls of tools included."""
    texts = [turn.content] if turn.content else []
    for call in turn.tool_calls:
        given = call["arguments"]
        arguments = given if isinstance(given, str) else _json(given)
        texts.append(f'<tool_call>\n{{"name": {_json(call["name"])}, "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(texts)


def joined(parts: Iterator[Part]) -> list[Part]:
    """Neighbours of unsupervised text made one: tokens may merge where nobody has to produce them one by one."""
    result: list[Part] = []
    for part in parts:
        if result and not (part.marker or part.supervised or result[-1].marker or result[-1].supervised):
            result[-1] = Part(result[-1].text + part.text, False, False)
        elif part.text:
            result.append(part)
    return result


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _literal(text: str) -> str:
    """A string in Jinja's notation."""
    return json.dumps(text, ensure_ascii=False)
