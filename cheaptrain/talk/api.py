"""The OpenAI chat-completions interface: what may be asked, and the shapes of what comes back.

The trap is a parameter that is accepted and not honoured: a client that sends `presence_penalty` or `tools` and gets an
answer believes it had an effect. So a request is a closed form: what is not in it is refused by name.
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cheaptrain.talk.answer import Answer, Sampling
from cheaptrain.talk.prompt import Message, PromptError, TooLongError
from cheaptrain.talk.talker import Talker


class ApiError(Exception):
    """A refusal, in OpenAI's form. `param` names what of the request is meant."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON that goes out."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _text_of(content: Any) -> Any:
    """Content may come as a list of text parts."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.keys() == {"type", "text"}]
    if len(parts) < len(content) or any(p["type"] != "text" or not isinstance(p["text"], str) for p in parts):
        raise ValueError("only parts of type text can be read")
    return "".join(part["text"] for part in parts)


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Turn(_Closed):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of)]


class StreamOptions(_Closed):
    """What a stream carries besides text."""

    include_usage: bool = False


class Request(_Closed):
    """A request for a chat completion; null means the default."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Literal[1] | None = None

    def conversation(self) -> list[Message]:
        """The messages as the prompt takes them."""
        return [{"role": turn.role, "content": turn.content} for turn in self.messages]

    def sampling(self, room: int) -> Sampling:
        """How the answer is drawn; without a limit it may fill the `room` tokens there are. Temperature 1 unless given,
        as OpenAI has it."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            max_new_tokens=self.max_tokens or self.max_completion_tokens or room,
            seed=self.seed,
            stop=tuple(stop),
        )


def parse_request(body: bytes) -> Request:
    """The request in `body`. Raises ApiError (400) naming everything that is wrong with it."""
    try:
        request = Request.model_validate_json(body)
    except ValidationError as error:
        problems = [(".".join(_place(e["loc"])), _in_words(e)) for e in error.errors(include_url=False)]
        message = "; ".join(f"{place}: {what}" if place else what for place, what in problems)
        raise ApiError(400, message, param=problems[0][0] or None) from error
    _check(request)
    return request


def _check(request: Request) -> None:
    for number, turn in enumerate(request.messages):
        if turn.role != "assistant" and not turn.content:
            raise ApiError(400, f"messages.{number}.content: is empty", param=f"messages.{number}.content")
        if turn.role == "system" and number:
            raise ApiError(400, f"messages.{number}: a system message comes first or not at all", param="messages")
    if request.messages[-1].role != "user":
        raise ApiError(400, "messages: the last one must be the user's", param="messages")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both", param="max_tokens")
    if request.stop is not None and (not isinstance(request.stop, str) or not request.stop):
        texts = request.stop
        if not texts or len(texts) > 4 or not all(texts):
            raise ApiError(400, "stop: give one to four texts, none of them empty", param="stop")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only together with stream = true", param="stream_options")


def choose(talkers: Sequence[Talker], name: str | None) -> Talker:
    """The model asked for. Raises ApiError: 404 for one that is not here, 400 when it has to be named."""
    there = ", ".join(talker.name for talker in talkers)
    if name is None:
        if len(talkers) > 1:
            raise ApiError(400, f"model: name one of {there}", param="model")
        return talkers[0]
    for talker in talkers:
        if talker.name == name:
            return talker
    raise ApiError(404, f"model: there is no {name}; there is {there}", param="model", code="model_not_found")


def prompt_refused(error: PromptError) -> ApiError:
    """The refusal of a conversation that cannot be given to the model."""
    code = "context_length_exceeded" if isinstance(error, TooLongError) else None
    return ApiError(400, str(error), param="messages", code=code)


def list_models(talkers: Sequence[Talker]) -> dict[str, Any]:
    """What /v1/models answers; `positions` and `chat_template` are ours."""
    return {
        "object": "list",
        "data": [
            {
                "id": talker.name,
                "object": "model",
                "created": 0,
                "owned_by": "cheaptrain",
                "positions": talker.positions,
                "chat_template": talker.has_template,
            }
            for talker in talkers
        ],
    }


@dataclass(frozen=True)
class Completion:
    """One completion: its id and time, in every shape it goes out in."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer)}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage_chunk(self, answer: Answer) -> str:
        """The event that carries the token counts, when they were asked for."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(content: dict[str, Any]) -> str:
    """A server-sent event. JSON in ASCII has no line breaks that could end it early."""
    return f"data: {json.dumps(content)}\n\n"


def finish_reason(answer: Answer) -> str:
    """`stop` when the model or a stop text ended the answer, `length` when a limit did."""
    return "stop" if answer.ending == "stop" else "length"


def usage(answer: Answer) -> dict[str, int]:
    """Tokens read and written; the end token counts."""
    read, written = answer.prompt_tokens, answer.new_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _place(loc: tuple[int | str, ...]) -> list[str]:
    # A union adds the name of its member, which says nothing to who sent the request.
    return [str(part) for part in loc if part not in {"str", "list[str]"}]


def _in_words(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "this parameter is not known here; leave it out"
    if error["type"] == "missing":
        return "is missing"
    return str(error["msg"]).removeprefix("Value error, ")
