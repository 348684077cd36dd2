"""The recipe, typed: every key there is, with its unit and its default.

A recipe is one TOML file. Each table below belongs to one component, which is given that table and nothing else. What
is read stands in `schema_data.py`, what is learned in `schema_train.py`, what all tables share in `section.py`; this is
the one to import from.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from cheaptrain.recipe.quantities import Count, EveryField, Seconds, Span
from cheaptrain.recipe.schema_data import (
    CHAT_TEMPLATES,
    ORIGINS,
    Chat,
    Data,
    Drills,
    Source,
    Tokenizer,
    TokenizerTrain,
    Transform,
)
from cheaptrain.recipe.schema_eval import ALL_TASKS, Eval
from cheaptrain.recipe.schema_train import LENGTHS, Distill, Lora, Train
from cheaptrain.recipe.section import Clash, Positive, Section, location, operational
from cheaptrain.recipe.variables import Variables

__all__ = [
    "ALL_TASKS", "CHAT_TEMPLATES", "LENGTHS", "ORIGINS", "Card", "Chat", "Checkpoint", "Clash", "Data", "Distill",
    "Drills", "Eval", "Log", "Lora", "Model", "Parallel", "Plan", "Probe", "Recipe", "Run", "Samples", "Section",
    "Source", "Tokenizer", "TokenizerTrain", "Train", "Transform", "Validation",
]  # fmt: skip


class Run(Section):
    """Where the run lives."""

    dir: str = operational(
        ...,
        "folder of the run: recipe.json, metrics.jsonl, checkpoints/, final",
        path=True,
        examples=["outputs/my-run"],
    )
    max_time: Seconds | None = operational(
        None, 'end this launch with a checkpoint (exit 75) before so much time has passed, e.g. "23h 45min"'
    )
    allow_batch_change: bool = operational(
        False, "let a started run go on with another train.global_batch_tokens; the ledger records where it changed"
    )


class Model(Section):
    """What is trained. Exactly one of `preset`, `config` and `init_from`."""

    preset: str | None = Field(None, description="a named shape with fresh weights, e.g. mobilellm-140m")
    config: str | None = location("hub id or folder whose config.json gives the shape; fresh weights")
    init_from: str | None = location("checkpoint, hub id or folder to start from with its weights")
    revision: str | None = Field(None, description="hub revision for config or init_from")
    overrides: dict[str, Any] = Field({}, description="fields of the transformers config to change")
    vocab_multiple: Annotated[int, Field(ge=1)] = Field(64, description="pad the vocabulary to a multiple of this")

    def clashes(self) -> Iterator[Clash]:
        yield from self._exactly_one("preset", "config", "init_from")
        if self.revision is not None and self._given("preset", "config", "init_from") == ("preset",):
            yield Clash("revision goes with config or init_from, not with a preset", ("revision", "preset"))


class Parallel(Section):
    """How the processes share the work. Their product is the number of processes, and that is asserted.

    A run may change all of it at every resume: the rows of each step stay the same.
    """

    dp_replicate: Annotated[int, Field(ge=1)] = operational(1, "groups that each hold the whole model (HSDP)")
    dp_shard: Annotated[int, Field(ge=1)] | Literal["auto"] = operational(
        "auto", "processes a copy of the model is spread over (FSDP2); auto: what the other three leave"
    )
    cp: Annotated[int, Field(ge=1)] = operational(1, "processes that share the tokens of a row; for very long rows")
    tp: Annotated[int, Field(ge=1)] = operational(1, "processes that share each matrix (tensor parallelism)")
    start_timeout: Seconds = operational(1800.0, "longest silence of a process until the first step is done")
    step_timeout: Seconds = operational(
        600.0, "longest silence of a process after that; then the job ends and names it"
    )


class Validation(Section):
    """Loss and bits per byte on the held-out documents of each source."""

    every: EveryField = operational(Span(10, "%"), "how often; always before the first and after the last step")
    tokens: Count = operational(200_000, "tokens of each source, at most")


class Samples(Section):
    """Text the model writes, kept in samples.jsonl."""

    every: EveryField = operational(Span(50, "%"), "how often; always before the first and after the last step")
    prompts: list[str] = operational([], "texts for the model to go on from; none: no samples")
    max_new_tokens: Annotated[int, Field(ge=1)] = operational(48, "tokens of one sample")
    temperature: Annotated[float, Field(ge=0)] = operational(0.0, "0: the likeliest token each time")


class Probe(Section):
    """Sums that no drill of a source contains, put to the model before and after the stage."""

    source: str = operational(..., "name of the [[data.sources]] with drills; its weight may be 0", examples=["sums"])
    questions: Annotated[int, Field(ge=1)] = operational(100, "how many to ask")
    max_new_tokens: Annotated[int, Field(ge=1)] = operational(96, "longest answer")


class Checkpoint(Section):
    """When to save and what to keep. The last step is always saved."""

    every: EveryField = operational(Span(25, "%"), "how often")
    keep_last: Annotated[int, Field(ge=1)] = operational(2, "newest checkpoints to keep")
    keep_every: EveryField | None = operational(None, 'keep these for good as well, e.g. "1000 steps"')
    state_in_final: bool = operational(True, "keep optimizer state in the last checkpoint")
    asynchronous: bool = operational(
        True, "write in the background while training goes on; false: training waits until the checkpoint stands"
    )


class Log(Section):
    """Where the numbers go besides metrics.jsonl."""

    every: EveryField = operational(Span(1, "steps"), "how often a line of training metrics is written")
    trackers: list[Literal["wandb", "trackio", "tensorboard"]] = operational([], "also send them there")
    project: str = operational("cheaptrain", "project name at the trackers")
    report: bool = operational(True, "write report/ into the run folder when a launch ends")


class Card(Section):
    """What the model card of each checkpoint (README.md) says that nobody can know from the run."""

    license: str | None = operational(None, "the hub's name of a license, e.g. apache-2.0; none: the card names none")
    tags: list[str] = operational([], "for the hub, besides cheaptrain")


class Plan(Section):
    """What `cheaptrain plan` reckons with. Changes nothing in the run."""

    gpus: Annotated[int, Field(ge=1)] | None = operational(
        None, "processes to plan for; default: as few as [parallel] takes"
    )
    gpu: str | None = operational(None, "kind of GPU, e.g. H200: its memory and peak")
    tokens_per_second: Positive | None = operational(None, "measured speed of one process")
    mfu: Annotated[float, Field(gt=0, le=1)] = operational(0.4, "share of the peak to expect where no speed is given")
    dollars_per_gpu_hour: Annotated[float, Field(ge=0)] | None = operational(None, "price")


class Recipe(Section):
    """One stage of a model's life."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        1337, description="draws fresh weights and the order of the data"
    )
    run: Run = Field(description="where the run lives", examples=[{"dir": "outputs/my-run"}])
    tokenizer: Tokenizer = Field(description="text to token ids", examples=[{"path": "gpt2"}])
    model: Model = Field(description="what is trained", examples=[{"preset": "mobilellm-140m"}])
    data: Data = Field(
        description="sources, and how rows are made of them",
        examples=[{"seq_len": 2048, "sources": [{"name": "web", "weight": 1.0, "files": "web/*.jsonl"}]}],
    )
    train: Train = Field(
        description="the loop", examples=[{"tokens": "10B", "global_batch_tokens": 524_288, "lr": 3e-4}]
    )
    chat: Chat | None = Field(None, description="how conversations become tokens")
    distill: Distill | None = Field(
        None, description='the teacher of objective = "distill"', examples=[{"teacher": "outputs/teacher/final"}]
    )
    lora: Lora | None = Field(None, description="low-rank adapters instead of all weights", examples=[{"rank": 16}])
    parallel: Parallel = Field(Parallel(), description="how the processes share the work")
    env: Variables = operational({}, 'environment of every process, set before it starts, e.g. NCCL_IB_DISABLE = "1"')
    validation: Validation = Field(Validation(), description="loss on held-out documents")
    samples: Samples = Field(Samples(), description="text the model writes")
    probe: Probe | None = operational(None, "sums the model has not seen, asked before and after")
    eval: Eval = Field(Eval(), description="tasks of lm-eval")
    checkpoint: Checkpoint = Field(Checkpoint(), description="when to save and what to keep")
    log: Log = Field(Log(), description="where the numbers go")
    card: Card = Field(Card(), description="what the model card says besides what was trained")
    plan: Plan = Field(Plan(), description="what `cheaptrain plan` reckons with")

    def clashes(self) -> Iterator[Clash]:
        yield from self._clashes_of_stage()
        sources = {source.name: source for source in self.data.sources}
        for name in self.tokenizer.train.sources if self.tokenizer.train else ():
            if name not in sources:
                message = f"no [[data.sources]] is called {name!r}; there are {', '.join(sources)}"
                yield Clash(message, ("tokenizer.train.sources", "data.sources"))
            elif sources[name].tokens is not None:
                yield Clash(f"source {name!r} holds tokens, not text", ("tokenizer.train.sources",))

    def _clashes_of_stage(self) -> Iterator[Clash]:
        objective, taking_part = self.train.objective, [s for s in self.data.sources if s.weight != 0]
        chats = [source.name for source in taking_part if source.format == "chat"]
        if (objective == "distill") != (self.distill is not None):
            yield Clash('objective = "distill" and the table [distill] go together', ("distill", "train.objective"))
        if objective == "assistant_only":
            for source in taking_part:
                if source.format != "chat":
                    message = f'source {source.name!r} is text, which has no assistant: set format = "chat"'
                    yield Clash(message, (f"data.sources.{source.name}.format", "train.objective"))
        if chats and self.chat is None:
            yield Clash(f"source {chats[0]!r} holds conversations: say how they are rendered in [chat]", ("chat",))
        if self.chat is not None and not chats:
            yield Clash('[chat] is for sources with format = "chat", and there is none', ("chat",))
        if chats and not self.data.document_mask:
            yield Clash("conversations of a row must not see each other", ("data.document_mask",))
        if self.probe is not None:
            probed = next((s for s in self.data.sources if s.name == self.probe.source), None)
            if probed is None or probed.drills is None or not probed.drills.held_out or probed.format != "chat":
                message = (
                    f"{self.probe.source!r} is no source of chat drills with held_out above 0: there is nothing to ask"
                )
                yield Clash(message, ("probe.source",))
            if self.chat is None:
                yield Clash("questions are asked in a chat template: [probe] needs [chat]", ("probe", "chat"))
        if self.lora is not None and self.model.init_from is None:
            yield Clash("[lora] adapts a model that is there: give model.init_from", ("lora", "model.init_from"))
        if self.lora is not None and self.train.fp8:
            yield Clash("fp8 is for training all weights, not adapters", ("train.fp8", "lora"))
        if self.lora is not None and self.train.optimizer != "adamw":
            yield Clash('adapters are trained with optimizer = "adamw"', ("train.optimizer", "lora"))
