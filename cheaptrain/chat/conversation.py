"""One typed form for every conversation, and the ways people write them down.

Rows hold `messages` (role, content), `conversations` (ShareGPT: from, value), or a `prompt` and its `completion`, each
perhaps with a `system` turn and `tools`; which column is which is detected and printed (`choose_columns`). The trap: a
reader that is generous with malformed rows trains a model on them. Two questions in a row, an empty answer, a role
nobody knows, a flag that says a turn is not to be learned: each is `Malformed`, with where and why, and the recipe's
`on_bad_line` decides.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cheaptrain.errors import PreflightError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
# Keys of a turn that would change what is learned and have no place here. Others (ids, dates) change nothing.
_NOT_READ = ("weight", "train", "loss", "mask", "reasoning_content", "reasoning", "thinking", "images", "audio")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"))


class Malformed(ValueError):
    """A conversation that cannot be learned from; the message says why."""


@dataclass(frozen=True)
class Turn:
    """What one side says. `tool_calls`: {"name", "arguments"} each, arguments as given (an object, or text)."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the tools the assistant may call, as JSON-like objects."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=())

    def messages(self) -> list[dict[str, Any]]:
        """As transformers' `apply_chat_template` takes it."""
        messages = []
        for turn in self.turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.tool_calls:
                message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in turn.tool_calls]
            messages.append(message)
        return messages

    def canonical(self) -> bytes:
        """One spelling of the content: the same conversation gives the same bytes, in whatever columns it came."""
        content = {"messages": self.messages(), "tools": list(self.tools)}
        return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()

    @property
    def text(self) -> str:
        """All that is said, for training a tokenizer."""
        return "\n".join(turn.content for turn in self.turns)


def exchange(question: str, answer: str) -> Conversation:
    """One question and its answer."""
    return Conversation((Turn("user", question), Turn("assistant", answer)))


def choose_columns(there: Iterable[str], given: Mapping[str, str] | None, where: str, source: str) -> dict[str, str]:
    """{what it is: name of the column} for the columns `there`. `given`: the recipe's `columns`.

    Raises PreflightError naming the columns there are when it cannot be told, or one that was named is missing.
    """
    names = list(there)
    listed = f"{where} has {', '.join(names)}"
    chosen = dict(given or {})
    for role, name in chosen.items():
        if name not in names:
            raise PreflightError(f"source {source!r}: columns.{role}: there is no column {name!r}; {listed}")
    if not {"messages", "conversations", "prompt", "completion"} & set(chosen):
        pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
        if "messages" in names or "conversations" in names:
            name = "messages" if "messages" in names else "conversations"
            chosen[name] = name
        elif pair is not None:
            chosen |= {"prompt": pair[0], "completion": pair[1]}
            if pair[0] == "instruction" and "input" in names:
                chosen["input"] = "input"
    single = sum(key in chosen for key in ("messages", "conversations"))
    paired = sum(key in chosen for key in ("prompt", "completion"))
    if (single, paired) not in ((1, 0), (0, 2)):
        raise PreflightError(
            f"source {source!r}: which columns hold the conversations? {listed}: set columns, e.g. "
            '{ messages = "..." } or { prompt = "...", completion = "..." }'
        )
    for name in ("system", "tools"):
        if name not in chosen and name in names:
            chosen[name] = name
    return chosen


def from_row(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """The conversation of a row. Raises Malformed."""
    for name in ("system", "tools"):  # the first rows of a jsonl file decide its columns
        if name not in columns and row.get(name):
            raise Malformed(f"it has a column {name!r}, which the first rows lack: name it in columns")
    try:
        turns = list(_turns(row, columns))
        tools = tuple(_tools(row.get(columns["tools"]))) if "tools" in columns else ()
    except (KeyError, TypeError, AttributeError) as error:
        raise Malformed(f"not in the form of a conversation ({type(error).__name__}: {error})") from error
    system = row.get(columns["system"]) if "system" in columns else None
    if system is not None and system != "":
        if not isinstance(system, str):
            raise Malformed(f"the system column holds a {type(system).__name__}, not text")
        if turns and turns[0].role == "system":
            raise Malformed("a system turn, and another in the column for it")
        turns.insert(0, Turn("system", _text(system, "the system column")))
    conversation = Conversation(tuple(turns), tools)
    _check(conversation)
    return conversation


def _turns(row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterable[Turn]:
    if "messages" in columns or "conversations" in columns:
        column = columns.get("messages") or columns["conversations"]
        yield from _listed(row.get(column), column)
        return
    prompt, completion = row.get(columns["prompt"]), row.get(columns["completion"])
    if isinstance(prompt, list):
        yield from _listed(prompt, columns["prompt"])
    else:
        question = _text(prompt, f"column {columns['prompt']!r}")
        more = row.get(columns["input"]) if "input" in columns else None
        yield Turn("user", f"{question}\n\n{_text(more, 'column input')}" if more else question)
    if isinstance(completion, list):
        yield from _listed(completion, columns["completion"])
    else:
        yield Turn("assistant", _text(completion, f"column {columns['completion']!r}"))


def _listed(value: Any, column: str) -> Iterable[Turn]:
    if isinstance(value, str):
        value = _json(value, f"column {column!r}")
    if not isinstance(value, list):
        raise Malformed(f"column {column!r} holds {_kind(value)}, not a list of turns")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise Malformed(f"turn {number} is {_kind(turn)}, not an object")
        yield _turn(turn, f"turn {number}")


def _turn(turn: Mapping[str, Any], where: str) -> Turn:
    given = {key: value for key, value in turn.items() if value is not None}
    if unread := [key for key in _NOT_READ if key in given]:
        raise Malformed(f"{where} says {unread[0]!r}, which would change what is learned and is not supported")
    name = given.get("role", given.get("from"))
    if name not in ROLES:
        raise Malformed(f"{where} has the role {name!r}; there are {', '.join(ROLES)}")
    role, content = ROLES[name], given.get("content", given.get("value"))
    calls = tuple(_call(call, where) for call in given.get("tool_calls") or ())
    if (called := given.get("function_call")) is not None:
        calls += (_call(called, where),)
    if name == "function_call" and isinstance(content, str):
        try:
            called = json.loads(content)
        except ValueError:
            called = None
        if isinstance(called, Mapping) and "name" in called:
            return Turn(role, "", (_call(called, where),))
    if isinstance(content, Mapping) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    return Turn(role, "" if content is None and calls else _text(content, where), calls)


def _call(call: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    call = call.get("function") or call
    if not isinstance(call.get("name"), str):
        raise Malformed(f"{where} calls a tool without a name")
    arguments = call.get("arguments")
    return _as_json({"name": call["name"], "arguments": {} if arguments is None else arguments}, f"{where}: a call")


def _tools(value: Any) -> Iterable[Mapping[str, Any]]:
    if value is None or value == "":
        return
    listed = _json(value, "the tools column") if isinstance(value, str) else value
    for tool in [listed] if isinstance(listed, Mapping) else listed:
        tool = _json(tool, "the tools column") if isinstance(tool, str) else tool
        if not isinstance(tool, Mapping):
            raise Malformed(f"a tool is {_kind(tool)}, not an object")
        yield _as_json(tool, "a tool")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Malformed(f"{where} is not JSON ({error})") from error


def _as_json(value: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`value`, which can be written as JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise Malformed(f"{where} cannot be written as JSON ({error})") from error
    return value


def _text(value: Any, where: str) -> str:
    """Text that can be written, of a string or of the text parts of a list."""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        value = "".join(_text(part.get("text"), where) for part in value)
    if not isinstance(value, str):
        raise Malformed(f"{where} holds {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"{where}: half a surrogate pair at character {error.start}") from error
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _check(conversation: Conversation) -> None:
    """The order of turns that templates and models understand. Raises Malformed."""
    before = None
    for number, turn in enumerate(conversation.turns, 1):
        if turn.role == "system" and number > 1:
            raise Malformed(f"turn {number}: a system turn that is not the first")
        if turn.role == before and turn.role != "tool":
            raise Malformed(f"turn {number}: two {turn.role} turns in a row")
        if turn.tool_calls and turn.role != "assistant":
            raise Malformed(f"turn {number}: the {turn.role} calls a tool")
        if turn.role == "tool" and before not in ("assistant", "tool"):
            raise Malformed(f"turn {number}: a tool answers that no assistant called")
        if turn.role == "assistant" and not turn.content.strip() and not turn.tool_calls:
            raise Malformed(f"turn {number}: the assistant says nothing")
        before = turn.role
    if not any(turn.role == "assistant" for turn in conversation.turns):
        raise Malformed("no assistant turn: there is nothing to learn from it")
