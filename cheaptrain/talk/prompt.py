"""From a conversation to the ids the model reads.

With a template, it is rendered by transformers; text that merely looks like a special token (`<|im_end|>` typed by
somebody, or written by a model) stays text, as in training. Without one the contents, one below the other, are a text
that the model goes on with. The trap is a template that leaves a turn out without a word (many know no system turn):
every turn of a user or the system must be found in what was rendered, or the conversation is refused.
"""

from collections.abc import Sequence
from typing import Any

import transformers
from jinja2.exceptions import TemplateError
from packaging.version import Version

from cheaptrain.errors import CheaptrainError
from cheaptrain.talk.talker import Talker

Message = dict[str, str]  # role (system, user or assistant) and content

_KEEPS_TEXT = Version(transformers.__version__) >= Version("5.20")  # older ones ignore `sanitize_control_tokens`


class PromptError(CheaptrainError):
    """A conversation that this checkpoint cannot be given."""


class TooLongError(PromptError):
    """A conversation that leaves the model no position for an answer."""


def encode(talker: Talker, messages: Sequence[Message]) -> list[int]:
    """Ids of the conversation up to where the answer begins.

    Raises PromptError saying why it cannot be given, TooLongError when the model has no position left for an answer.
    """
    ids = _rendered(talker, messages) if talker.has_template else _continued(talker, messages)
    if not ids:
        raise PromptError("the conversation is empty: there is no token to go on from")
    if talker.positions is not None and len(ids) >= talker.positions:
        raise TooLongError(
            f"the conversation has {len(ids):,} tokens and {talker.name} has {talker.positions:,} positions, answer "
            "included: shorten it"
        )
    return ids


def encode_fitting(talker: Talker, messages: Sequence[Message], room: int) -> tuple[list[int], list[Message]]:
    """Ids of as much of the conversation as leaves `room` tokens for an answer, and the messages that were left in.

    The oldest exchanges go first; the system turn and the last message stay. At most a quarter of the positions is
    cleared for an answer, so that a long limit does not cost the whole history. Raises as `encode`.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    rest = list(messages[len(head) :])
    positions = talker.positions
    while True:
        nothing_left = len(rest) == 1
        try:
            ids = encode(talker, head + rest)
            if nothing_left or positions is None or len(ids) + min(room, max(1, positions // 4)) <= positions:
                return ids, head + rest
        except TooLongError:
            if nothing_left:
                raise
        turn = next((at for at, message in enumerate(rest) if at > 0 and message["role"] == "user"), len(rest) - 1)
        rest = rest[turn:]


def _continued(talker: Talker, messages: Sequence[Message]) -> list[int]:
    tokenizer: Any = talker.tokenizer
    return list(
        tokenizer("\n".join(message["content"] for message in messages), split_special_tokens=True)["input_ids"]
    )


def _rendered(talker: Talker, messages: Sequence[Message]) -> list[int]:
    tokenizer: Any = talker.tokenizer
    turns = list(messages)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    literal = next((token for token in special if any(token in turn["content"] for turn in turns)), None)
    if literal is not None and not _KEEPS_TEXT:
        raise PromptError(
            f"transformers {transformers.__version__} would take the {literal!r} of this conversation for the special "
            "token; install 5.20 or newer, or leave it out"
        )
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        as_text = {"sanitize_control_tokens": True} if _KEEPS_TEXT else {}
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **as_text)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise PromptError(f"the chat template of {talker.name} refuses this conversation: {error}") from error
    left_out = {m["role"] for m in turns if m["role"] != "assistant" and m["content"].strip() not in text}
    if left_out:
        raise PromptError(
            f"the chat template of {talker.name} leaves out what the {' and the '.join(sorted(left_out))} said; "
            "leave that turn out yourself"
        )
    return list(ids)
