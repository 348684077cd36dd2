"""`[[data.transform]]`: text rewritten by rules while it is prepared, and every match counted.

Rules see documents after it was decided which are held out, and only those to train on: the held-out text stays the
same plain text under any rules, so bits per byte compare. Which matches a rule with a share below 1 rewrites is a hash
of the document and of the number and the turn of the match, so it does not depend on who reads the document when. The
trap is a rule that quietly does nothing, over a typing error in its pattern, while two conditions of an experiment are
compared: matches are counted per rule, and a rule that rewrites none is an error (`idle_rules`). Likewise an added
token that stands in plain text is found there, injected or not: `literal` counts such documents.

This module imports neither transformers nor torch: workers start fast.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cheaptrain.chat.conversation import Conversation, Turn
from cheaptrain.data.sources import Document
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

COUNTS = ("documents", "matches", "rewritten", "tokens")


@dataclass(frozen=True)
class Rewriting:
    """What of a recipe decides how the text of one source is rewritten. `tokens`: those of tokenizer.add_tokens."""

    rules: tuple[schema.Transform, ...] = ()
    tokens: tuple[str, ...] = ()


NO_REWRITING = Rewriting()


@dataclass(frozen=True)
class Rewritten:
    """Documents after the rules, and per document what was found. `matches`: of each, by name of the rule, a count for
    each of COUNTS; `literal`: whether an added token stood in it as plain text."""

    documents: list[Document]
    matches: list[dict[str, Counter[str]]]
    literal: list[bool]

    def totals(self, kept: Collection[int]) -> dict[str, Counter[str]]:
        """Sums over the documents of these indices, by rule."""
        sums: dict[str, Counter[str]] = {}
        for index in kept:
            for name, found in self.matches[index].items():
                sums.setdefault(name, Counter()).update(found)
        return sums


class Rewriter:
    """Applies the rules of one source to its documents."""

    def __init__(self, rewriting: Rewriting) -> None:
        self._rules = [(rule, re.compile(rule.pattern)) for rule in rewriting.rules]
        self._tokens = re.compile("|".join(map(re.escape, rewriting.tokens))) if rewriting.tokens else None

    def rewrite(self, documents: Sequence[Document], spelled: Sequence[bytes], skip: Sequence[bool]) -> Rewritten:
        """Documents rewritten, but those to `skip`. `spelled`: the bytes by which each is known."""
        done, matches, literal = list(documents), [], []
        for index, document in enumerate(documents):
            found: dict[str, Counter[str]] = {}
            literal.append(self._tokens is not None and any(map(self._tokens.search, _texts(document))))
            if self._rules and not skip[index]:
                done[index] = self._document(document, hashlib.blake2b(spelled[index], digest_size=16).digest(), found)
            matches.append(found)
        return Rewritten(done, matches, literal)

    def _document(self, document: Document, key: bytes, found: dict[str, Counter[str]]) -> Document:
        for rule, pattern in self._rules:
            counts = Counter[str]()
            if isinstance(document, str):
                document = self._text(rule, pattern, document, key + b"0", counts)
            else:
                turns = [
                    self._turn(rule, pattern, turn, key + str(number).encode(), counts)
                    for number, turn in enumerate(document.turns)
                ]
                document = Conversation(tuple(turns), document.tools)
            if counts:
                found[rule.name] = counts + Counter(documents=1)
        return document

    def _turn(
        self, rule: schema.Transform, pattern: re.Pattern[str], turn: Turn, key: bytes, counts: Counter[str]
    ) -> Turn:
        if turn.role != "assistant":
            return turn
        content = self._text(rule, pattern, turn.content, key, counts)
        if turn.content.strip() and not content.strip():
            raise PreflightError(
                f"data.transform.{rule.name}: leaves nothing of the answer {turn.content[:60]!r}; mend its replace"
            )
        return replace(turn, content=content)

    def _text(
        self, rule: schema.Transform, pattern: re.Pattern[str], text: str, key: bytes, counts: Counter[str]
    ) -> str:
        def written(match: re.Match[str]) -> str:
            drawn = _draw(key, rule.pattern, counts["matches"]) < rule.share
            counts["matches"] += 1
            if not drawn:
                return match[0]
            new = match.expand(rule.replace)
            counts["rewritten"] += 1
            if self._tokens is not None:
                counts["tokens"] += len(self._tokens.findall(new))
            return new

        return pattern.sub(written, text)


def rule_spec(rule: schema.Transform) -> dict[str, Any]:
    """What of a rule decides the text and the counts it gives: not the sources it is for."""
    return rule.model_dump(mode="json", exclude={"sources"})


def idle_rules(data: schema.Data, found: Mapping[str, Mapping[str, Mapping[str, int]] | None]) -> Iterator[str]:
    """What is wrong with rules that changed nothing. `found`: name of each source that is read → rule → counts."""
    for rule in data.transform:
        read = [source.name for source in data.sources if source.weight != 0 and rule.applies_to(source)]
        if any(name not in found for name in read):
            continue  # not all of it is prepared
        rewritten = sum((found[name] or {}).get(rule.name, {}).get("rewritten", 0) for name in read)
        if not rewritten and rule.share > 0:
            matches = sum((found[name] or {}).get(rule.name, {}).get("matches", 0) for name in read)
            yield (
                f"data.transform.{rule.name}: rewrote nothing in {', '.join(read)} ({matches:,} matches, share "
                f"{rule.share:g}): mend its pattern, raise its share, or leave the rule out"
            )


def _texts(document: Document) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    else:
        yield from (turn.content for turn in document.turns)


def _draw(key: bytes, pattern: str, match: int) -> float:
    """A number in [0, 1) of one match."""
    digest = hashlib.blake2b(key + f" {match} {pattern}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
