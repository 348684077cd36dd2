"""A conversation with one checkpoint, or the same questions to two: each keeps the history of its own answers.

What is kept is what was said, whole; what a model can no longer read is left out of its prompt only, and counted. Every
answer notes how it was drawn (seed, temperature), so a saved conversation can be had again.
"""

import json
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cheaptrain.errors import RecipeError
from cheaptrain.talk.answer import Answer, Sampling, answer
from cheaptrain.talk.prompt import Message, PromptError, encode_fitting
from cheaptrain.talk.talker import Talker

_TICK_SECONDS = 0.05


@dataclass
class Side:
    """One checkpoint and its own history; `answers` says how each of the assistant's turns was drawn and ended."""

    talker: Talker
    turns: list[Message] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Reply:
    """What one side makes of a question: text as it comes, then the answer, or why there is none."""

    talker: Talker
    said: str = ""
    left_out: int = 0
    answer: Answer | None = None
    error: str | None = None

    def note(self) -> str:
        """How it ended, for the reader; empty while it goes on."""
        if self.error is not None:
            return self.error
        if self.answer is None:
            return ""
        left_out = f" · the {self.left_out} oldest turns no longer fit and were left out" if self.left_out else ""
        return self.answer.how_it_ended() + left_out


@dataclass
class Session:
    """All sides, what they are asked with, and the files written so far."""

    sides: list[Side]
    sampling: Sampling
    system: str | None = None
    asked: int = 0
    written: set[Path] = field(default_factory=set)

    def ask(self, question: str, show: Callable[[Sequence[Reply]], None]) -> list[Reply]:
        """Put `question` to all sides at once. `show` is called again and again with what there is so far, and once at
        the end. Ctrl-C ends the answers, which are kept as far as they came; a side that cannot be asked keeps its
        history as it was."""
        sampling = self._next_sampling()
        replies = [Reply(side.talker) for side in self.sides]
        cancelled = threading.Event()
        with ThreadPoolExecutor(len(self.sides)) as pool:
            running = [
                pool.submit(self._answer, side, reply, question, sampling, cancelled)
                for side, reply in zip(self.sides, replies, strict=True)
            ]
            _watch(running, lambda: show(replies), cancelled)
        for side, reply, future in zip(self.sides, replies, running, strict=True):
            future.result()  # a bug keeps its traceback
            if reply.answer is None:
                continue
            side.turns += [_message("user", question), _message("assistant", reply.answer.text)]
            how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
            told = {"ending": reply.answer.ending, "new_tokens": reply.answer.new_tokens, "left_out": reply.left_out}
            side.answers.append({**told, **how, "system": self.system})
        show(replies)
        return replies

    def take_back(self) -> str | None:
        """Forget the last exchange on all sides; returns its question, None when there is none."""
        questions = [side.turns[-2]["content"] for side in self.sides if side.turns]
        if not questions:
            return None
        # A side that could not be asked the last question still ends with the one before, which it keeps.
        longest = max(len(side.turns) for side in self.sides)
        question = next(side.turns[-2]["content"] for side in self.sides if len(side.turns) == longest)
        for side in self.sides:
            if len(side.turns) == longest:
                del side.turns[-2:], side.answers[-1:]
        return question

    def reset(self) -> None:
        """Begin a new conversation with the same settings."""
        for side in self.sides:
            side.turns.clear()
            side.answers.clear()

    def save(self, path: Path) -> None:
        """Write the conversation as JSON. Raises RecipeError for a file that was there before, or cannot be written."""
        if path.exists() and path not in self.written:
            raise RecipeError(f"{path} exists already and is left as it is; choose another name")
        conversations = [
            {
                "checkpoint": side.talker.name,
                "messages": [*self._system_turn(), *side.turns],
                "answers": side.answers,
            }
            for side in self.sides
        ]
        try:
            path.write_text(json.dumps({"conversations": conversations}, ensure_ascii=False, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise RecipeError(f"{path} cannot be written: {error.strerror}") from error
        self.written.add(path)

    def _answer(self, side: Side, reply: Reply, question: str, sampling: Sampling, cancelled: threading.Event) -> None:
        turns = [*self._system_turn(), *side.turns, _message("user", question)]
        try:
            ids, kept = encode_fitting(side.talker, turns, sampling.max_new_tokens)
        except PromptError as error:
            reply.error = str(error)
            return
        reply.left_out = len(turns) - len(kept)

        def give(piece: str) -> None:
            reply.said += piece

        try:
            reply.answer = answer(side.talker, ids, sampling, give, cancelled)
        except torch.OutOfMemoryError as error:
            reply.error = "the GPU has no memory for this: " + str(error).partition("\n")[0]

    def _system_turn(self) -> list[Message]:
        return [_message("system", self.system)] if self.system else []

    def _next_sampling(self) -> Sampling:
        """Each answer has a seed of its own, so asking again gives another one; all follow from the one given."""
        seed = secrets.randbelow(2**31) if self.sampling.seed is None else self.sampling.seed + self.asked
        self.asked += 1
        return Sampling(**{**asdict(self.sampling), "seed": seed})


def _watch(running: Sequence[Future[None]], show: Callable[[], None], cancelled: threading.Event) -> None:
    while True:
        try:
            if not wait(running, timeout=_TICK_SECONDS).not_done:
                return
            show()
        except KeyboardInterrupt:
            cancelled.set()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
