"""The tables of a recipe that say what is read: tokenizer, sources, rows, and how conversations are rendered."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from cheaptrain.recipe.quantities import Bytes
from cheaptrain.recipe.section import Clash, Positive, PositiveCount, Section, Share, location, operational


class TokenizerTrain(Section):
    """A byte-level BPE tokenizer trained on sources of this recipe."""

    vocab_size: Annotated[int, Field(ge=320)] = Field(
        description="tokens in all, special ones included", examples=[32_768]
    )
    sources: list[str] = Field(
        min_length=1, description="names of the [[data.sources]] to train on", examples=[["web"]]
    )
    max_bytes: Bytes = Field(50_000_000, description="bytes of text to read, spread evenly over the sources")


class Tokenizer(Section):
    """Text to token ids. Exactly one of `path` and `train`."""

    path: str | None = location("hub id, local folder, or checkpoint")
    revision: str | None = Field(None, description="hub revision; a commit hash pins it")
    train: TokenizerTrain | None = Field(None, description="train one on sources of this recipe instead")
    end_of_text: str | None = Field(None, description="token that ends a document; default: the tokenizer's own")
    add_tokens: Literal["multiplication"] | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description='ordinary tokens to add, found wherever their characters stand: a list, or "multiplication", 92 to '
        "write products with",
    )

    def clashes(self) -> Iterator[Clash]:
        yield from self._exactly_one("path", "train")
        if self.path is None:
            for key in self._given("revision", "end_of_text"):
                yield Clash(f"{key} goes with path, not with [tokenizer.train]", (key, "train"))
        if isinstance(self.add_tokens, list):
            for token in self.add_tokens:
                if token != token.strip() or not token:
                    yield Clash(f"{token!r} begins or ends with white space, or is empty", ("add_tokens",))
                elif self.add_tokens.count(token) > 1:
                    yield Clash(f"{token!r} stands there twice", ("add_tokens",))


class Drills(Section):
    """Generated arithmetic: the same seed and count give the same text everywhere."""

    kind: Literal["arithmetic", "table"] = Field(
        "arithmetic",
        description='what to generate; "table": the products of 1 to 9 alone, to be known by heart, which leaves '
        "digits, operations and held_out without a meaning",
    )
    documents: PositiveCount = Field(description="how many documents to write", examples=[10_000])
    digits: Annotated[int, Field(ge=1, le=9)] = Field(2, description="longest operand, in digits")
    seed: int = Field(0, description="another seed gives other drills")
    operations: Annotated[list[Literal["+", "-", "*"]], Field(min_length=1)] = Field(
        ["+", "-", "*"], description="what is done with the operands"
    )
    steps: bool = Field(False, description='with format = "chat": answers write out how they were found')
    held_out: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0, description="share of all pairs of operands that no drill contains, to be asked later"
    )
    without_probes: bool = Field(
        False, description="no drill contains a longer product or a sum that the task arithmetic_probes asks"
    )

    def clashes(self) -> Iterator[Clash]:
        if self.kind == "table":
            for key in ("digits", "operations", "held_out", "without_probes"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield Clash(f'{key} goes with kind = "arithmetic", not with "table"', (key, "kind"))


CHAT_TEMPLATES = ("chatml", "smollm2", "llama3", "plain")
ORIGINS = ("hub", "files", "packages", "drills", "tokens")
_GOES_WITH = {
    "columns": ("hub", "files"),
    "subset": ("hub",),
    "split": ("hub",),
    "revision": ("hub",),
    "data_files": ("hub",),
    "content": ("packages",),
    "token_bytes": ("tokens",),
    "column": ("hub", "files"),
    "max_tokens": ("hub", "files", "packages"),
}


class Source(Section):
    """One stream of documents and its share of the mixture. Exactly one origin."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="what metrics, overrides and recipes that extend this one call it", examples=["web"]
    )
    weight: Annotated[float, Field(ge=0)] | Literal["size"] = Field(
        description='share of the training tokens; shares are normalised, 0 leaves the source out; "size": as many as '
        "it has, so that an epoch reads all of every source once",
        examples=[1.0],
    )
    max_epochs: Positive | None = Field(
        None,
        description="times the source may be read in this run before it is an error; default train.epochs, else 1",
    )

    hub: str | None = location("hub dataset id, read as a stream")
    subset: str | None = Field(None, description="hub configuration, e.g. sample-10BT")
    split: str | None = Field(None, description="hub split; default train")
    revision: str | None = Field(None, description="hub revision; a commit hash pins it")
    data_files: str | list[str] | None = location("files inside the hub dataset, globs allowed")
    files: str | list[str] | None = location("local parquet, jsonl, jsonl.gz, jsonl.zst or txt; globs allowed")
    packages: str | list[str] | None = Field(None, description="installed Python packages or modules, e.g. sympy")
    content: Literal["code", "docstrings"] | None = Field(
        None, description="what to take from packages; default docstrings"
    )
    drills: Drills | None = Field(None, description="generated arithmetic")
    tokens: str | list[str] | None = location("token shards of others: .ds, Megatron .bin/.idx, nanoGPT .bin/.npy")
    token_bytes: Literal[2, 4] | None = Field(None, description="bytes a token of a headerless .bin; default 2")

    format: Literal["text", "chat"] = Field(
        "text", description="text: documents; chat: conversations, rendered as [chat] says"
    )
    column: str | None = Field(None, description="column holding the text; default: detected and printed")
    columns: dict[Literal["messages", "conversations", "prompt", "completion", "system", "tools"], str] | None = Field(
        None,
        description='chat: where the columns have other names, e.g. { prompt = "question", completion = "answer" }',
    )
    system: str | None = Field(
        None, description="chat: system turn of conversations of this source that have none; default: that of [chat]"
    )
    max_tokens: PositiveCount | None = Field(None, description="stop after about so many tokens")
    on_bad_line: Literal["error", "skip"] = Field(
        "error", description="broken JSON or bad UTF-8: stop, or skip and count"
    )

    def clashes(self) -> Iterator[Clash]:
        yield from self._exactly_one(*ORIGINS)
        for key in self._given("files", "packages", "tokens", "data_files"):
            if getattr(self, key) == []:
                yield Clash(f"{key} is an empty list; name at least one", (key,))
        if self.format == "chat":
            if self.column is not None:
                yield Clash('column names a text; with format = "chat" use columns', ("column", "format"))
            if self.tokens is not None:
                yield Clash("token shards hold no conversations", ("format", "tokens"))
            if self.packages is not None and self.content == "code":
                yield Clash('conversations are made from docstrings, not from content = "code"', ("content", "format"))
        else:
            for key in self._given("columns", "system"):
                yield Clash(f'{key} goes with format = "chat"', (key, "format"))
        if self.format == "text" and self.drills is not None and self.drills.steps:
            yield Clash('steps are written into answers: set format = "chat"', ("drills.steps", "format"))
        given = self._given(*ORIGINS)
        if len(given) == 1:
            for key in self._given(*_GOES_WITH):
                if given[0] not in _GOES_WITH[key]:
                    yield Clash(f"{key} goes with {' or '.join(_GOES_WITH[key])}, not with {given[0]}", (key, given[0]))

    @property
    def kind(self) -> str:
        """Which origin is given: hub, files, packages, drills or tokens."""
        return self._given(*ORIGINS)[0]


class Transform(Section):
    """A rule that rewrites text while it is prepared. Rules are applied in order, each to what the one before it left.
    Held-out documents stay as they are, so that their loss compares with that of other rules, or of none."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="what counts, overrides and recipes that extend this one call it", examples=["facts"]
    )
    pattern: str = Field(description="regular expression (Python's) to look for", examples=[r"([1-9])×([1-9])"])
    replace: str = Field(description=r"what to write instead; \1 is the first group", examples=[r"⟦\1×\2⟧"])
    sources: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="names of the [[data.sources]] it is for; default: all whose kind of text it is for"
    )
    to: Literal["text", "assistant", "both"] = Field(
        "text", description="text: documents; assistant: what the assistant says in conversations; both"
    )
    share: Share = Field(1.0, description="of the matches that are rewritten; which, is drawn by document and match")

    def clashes(self) -> Iterator[Clash]:
        try:
            pattern = re.compile(self.pattern)
            if pattern.fullmatch(""):
                yield Clash("pattern matches nothing at all, which stands everywhere", ("pattern",))
        except re.error as error:
            yield Clash(f"pattern is no regular expression: {error}", ("pattern",))
            return
        try:
            pattern.sub(self.replace, "")  # a template is read even where nothing matches
        except (re.error, IndexError) as error:
            yield Clash(f"replace does not fit the groups of pattern: {error}", ("replace", "pattern"))

    def applies_to(self, source: Source) -> bool:
        """Whether the rule is for this source."""
        named = self.sources is None or source.name in self.sources
        kinds = {"text": ("text",), "assistant": ("chat",), "both": ("text", "chat")}[self.to]
        return named and source.format in kinds and source.tokens is None


class Data(Section):
    """Sources, where their tokens are kept, and how rows are made of them."""

    dir: str = operational("data", "folder of the prepared tokens", path=True)
    seq_len: Annotated[int, Field(ge=8)] = Field(description="tokens a row", examples=[2048])
    document_mask: bool = Field(True, description="documents of one row do not attend to each other")
    validation: Share = Field(0.01, description="share of the documents held out, chosen by their hash")
    unit_bytes: Annotated[Bytes, Field(gt=0)] = Field(
        32_000_000, description="bytes of text in one unit of preparing, and so in one shard"
    )
    workers: Annotated[int, Field(ge=0)] = operational(0, "processes that tokenise; 0: one a core")
    sources: list[Source] = Field(
        min_length=1,
        description="the mixture: one [[data.sources]] for each stream of documents",
        examples=[[{"name": "web", "weight": 1.0, "files": "web/*.jsonl"}]],
    )
    transform: list[Transform] = Field(
        [],
        description="rules that rewrite text while it is prepared",
        examples=[[{"name": "facts", "pattern": "([1-9])×([1-9])", "replace": r"⟦\1×\2⟧"}]],
    )

    def clashes(self) -> Iterator[Clash]:
        names = [source.name for source in self.sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Clash(
                f"two sources are called {name!r}",
                tuple(f"sources.{index}" for index, other in enumerate(names) if other == name),
            )
        yield from self._clashing_rules()
        sized = [source.weight == "size" for source in self.sources if source.weight != 0]
        if any(sized) and not all(sized):
            yield Clash('weight = "size" is for all sources of a mixture or for none', ("sources",))
        if not sized:
            yield Clash("no source has a weight above 0", ("sources",))

    def rules(self, source: Source) -> list[Transform]:
        """The rules for this source, in order."""
        return [rule for rule in self.transform if rule.applies_to(source)]

    def _clashing_rules(self) -> Iterator[Clash]:
        names = [rule.name for rule in self.transform]
        there = {source.name: source for source in self.sources}
        for index, rule in enumerate(self.transform):
            if names.count(rule.name) > 1:
                yield Clash(f"two rules are called {rule.name!r}", (f"transform.{index}",))
            for name in rule.sources or ():
                if name not in there:
                    message = f"no [[data.sources]] is called {name!r}; there are {', '.join(there)}"
                    yield Clash(message, (f"transform.{index}.sources",))
                elif not rule.applies_to(there[name]):
                    what = "tokens" if there[name].tokens is not None else there[name].format
                    yield Clash(
                        f'source {name!r} holds {what}, and the rule {rule.name!r} is for to = "{rule.to}"',
                        (f"transform.{index}.to", f"transform.{index}.sources"),
                    )
            if not any(rule.applies_to(source) for source in self.sources if source.weight != 0):
                yield Clash(
                    f"the rule {rule.name!r} is for no source that is read: mend its to or sources, or leave it out",
                    (f"transform.{index}",),
                )


class Chat(Section):
    """How conversations become tokens."""

    template: str = Field(
        "chatml",
        description="chatml, llama3, smollm2 or plain; tokenizer: the tokenizer's own; or a .jinja file. The last two "
        "need {% generation %} around what the model must produce",
    )
    system: str | None = Field(None, description="system turn of conversations that have none")
    max_cut: Share = Field(0.05, description="share of the conversations of a source that may lose turns to fit a row")
    max_dropped: Share = Field(0.05, description="share that may be left out because not even one exchange fits")

    def clashes(self) -> Iterator[Clash]:
        if self.system is not None and self.template not in CHAT_TEMPLATES:
            yield Clash("system goes with a template of ours; write it into this one", ("system", "template"))
