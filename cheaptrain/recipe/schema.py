"""The recipe, typed: every key there is, with its unit and its default.

A recipe is one TOML file. Each table below belongs to one component, which is given that table and nothing else. Keys
that nobody declared are refused, scalars are strict (`"3"` is not 3), and a recipe never changes once read. Keys marked
operational (how often to log, how many rows fit the device) may differ between a run and its resumption; every other
key is part of what the run *is*. Keys marked path take `${env:NAME}`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cheaptrain.recipe.quantities import Bytes, Count, EveryField, Seconds, Span, SpanField
from cheaptrain.recipe.variables import Variables

Positive = Annotated[float, Field(gt=0)]
PositiveCount = Annotated[Count, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Clash(NamedTuple):
    """Keys that are each right and do not go together. `keys` are dotted, counted from the section that noticed.

    The first is the one to drop; with `one_of`, any of them.
    """

    message: str
    keys: tuple[str, ...]
    one_of: bool = False


class Section(BaseModel):
    """A table of the recipe: unknown keys refused, strict scalars, finite numbers, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    def clashes(self) -> Iterator[Clash]:
        """What is wrong between keys of this section; each key by itself has been checked."""
        return iter(())

    @model_validator(mode="after")
    def _no_clash(self) -> Self:
        found = list(self.clashes())
        if found:
            message = "; ".join(clash.message for clash in found)
            raise PydanticCustomError("clash", "{message}", {"message": message, "clashes": found})
        return self

    def _given(self, *names: str) -> tuple[str, ...]:
        return tuple(name for name in names if getattr(self, name) is not None)

    def _exactly_one(self, *names: str) -> Iterator[Clash]:
        given = self._given(*names)
        if len(given) != 1:
            got = " and ".join(given) or "none"
            yield Clash(f"give exactly one of {', '.join(names)}; got {got}", given or names, one_of=True)


def operational(default: Any, description: str, *, path: bool = False, **constraints: Any) -> Any:
    """A key that may change between a run and its resumption: it says how, not what."""
    extra: Any = {"operational": True} | ({"path": True} if path else {})
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def location(description: str) -> Any:
    """An optional key that names files, a folder or a hub id."""
    return Field(None, description=description, json_schema_extra={"path": True})


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

    def clashes(self) -> Iterator[Clash]:
        yield from self._exactly_one("path", "train")
        if self.path is None:
            for key in self._given("revision", "end_of_text"):
                yield Clash(f"{key} goes with path, not with [tokenizer.train]", (key, "train"))


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


class Drills(Section):
    """Generated arithmetic: the same seed and count give the same text everywhere."""

    kind: Literal["arithmetic"] = Field("arithmetic", description="what to generate")
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

    def clashes(self) -> Iterator[Clash]:
        names = [source.name for source in self.sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Clash(
                f"two sources are called {name!r}",
                tuple(f"sources.{index}" for index, other in enumerate(names) if other == name),
            )
        sized = [source.weight == "size" for source in self.sources if source.weight != 0]
        if any(sized) and not all(sized):
            yield Clash('weight = "size" is for all sources of a mixture or for none', ("sources",))
        if not sized:
            yield Clash("no source has a weight above 0", ("sources",))


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


class Distill(Section):
    """The teacher, and what the student learns from it (objective = "distill")."""

    teacher: str = Field(
        description="checkpoint, hub id or folder", json_schema_extra={"path": True}, examples=["outputs/teacher/final"]
    )
    revision: str | None = Field(None, description="hub revision of the teacher")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="forward_kl: KL(teacher, student)"
    )
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="jsd: the teacher's share of the mixture; default 0.5"
    )
    temperature: Positive = Field(1.0, description="of both distributions; the divergence is multiplied by its square")
    alpha: Share = Field(1.0, description="share of the divergence in the loss; the rest is cross-entropy")
    precision: Literal["auto", "fp32", "bf16", "int8", "fp8"] = Field(
        "auto", description="of the teacher; auto: bf16 on a GPU, fp32 on a CPU; int8 and fp8 need torchao"
    )
    tokenizers: Literal["same", "align"] = Field(
        "same", description="same: refused when they differ; align: matched by the stretches of text they share"
    )
    top_k: PositiveCount | None = Field(
        None, description="learn the teacher's k likeliest tokens and the rest as one; default: the whole vocabulary"
    )
    cache: str | None = operational(
        None, "folder of `cheaptrain distill-cache`: the teacher is read from there", path=True
    )

    def clashes(self) -> Iterator[Clash]:
        if self.divergence != "jsd" and self.jsd_beta is not None:
            yield Clash('jsd_beta needs divergence = "jsd"', ("jsd_beta", "divergence"))
        if self.cache is not None and self.top_k is None:
            yield Clash("a cache holds top_k tokens a position: say how many", ("cache", "top_k"))
        if self.tokenizers == "align":
            for key, given in (("top_k", self.top_k), ("cache", self.cache)):
                if given is not None:
                    yield Clash(
                        'tokenizers = "align" learns how likely a span of text is, not which tokens are: it takes no '
                        f"{key}",
                        (key, "tokenizers"),
                    )


class Lora(Section):
    """Low-rank adapters instead of all weights; the checkpoint holds them merged."""

    rank: PositiveCount = Field(description="rank of each adapter", examples=[16])
    alpha: Positive = Field(16.0, description="adapters are scaled by alpha over rank")
    dropout: Momentum = Field(0.0, description="dropout before each adapter")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        strict=False,
        min_length=1,
        description="names of the linear layers that get one",
    )


LENGTHS = ("tokens", "steps", "epochs", "flops", "tokens_per_parameter")


class Train(Section):
    """The loop. Exactly one of `tokens`, `steps`, `epochs`, `flops` and `tokens_per_parameter` says how long."""

    objective: Literal["next_token", "distill", "assistant_only"] = Field(
        "next_token",
        description="what is learned from a row: every next token; what a teacher says of it; what the assistant says",
    )
    loss_weighting: Literal["token", "example"] = Field(
        "token", description="example: each conversation weighs the same, however long its answers"
    )
    neftune_alpha: Annotated[float, Field(ge=0)] = Field(
        0.0, description="noise on the input embeddings while training (NEFTune); 0: none"
    )
    tokens: PositiveCount | None = Field(None, description="tokens to train on")
    steps: PositiveCount | None = Field(None, description="optimizer steps")
    epochs: Positive | None = Field(
        None, description="passes over the mixture: ends when the first source has been read so often"
    )
    flops: Positive | None = Field(None, description="floating-point operations to spend")
    tokens_per_parameter: Positive | None = Field(None, description="tokens for each parameter of the model, e.g. 20")

    global_batch_tokens: PositiveCount = Field(
        description="tokens of one optimizer step, over all processes and accumulation", examples=[524_288]
    )
    micro_batch_size: Annotated[int, Field(ge=1)] = operational(1, "rows a process runs at once")

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for hidden matrices, AdamW for the rest"
    )
    lr: Positive = Field(
        description="peak learning rate (with muon: of everything but the hidden matrices)", examples=[3e-4]
    )
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.95), strict=False, description="AdamW's two moving averages")
    eps: Positive = Field(1e-8, description="AdamW's epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay")
    muon_lr: Positive | None = Field(None, description="peak learning rate of the hidden matrices; default 0.02")
    muon_momentum: Momentum | None = Field(None, description="momentum of the hidden matrices; default 0.95")
    grad_clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 turns clipping off")

    schedule: Literal["linear", "cosine", "wsd", "constant"] = Field(
        "linear", description="how the rate falls after warm-up; wsd: constant, then a linear fall"
    )
    warmup: SpanField = Field(Span(0, "steps"), description="the first stretch, in which the rate rises")
    decay: SpanField | None = Field(None, description="wsd: the last stretch, in which the rate falls; default 20%")
    final_lr_ratio: Share = Field(0.0, description="last learning rate over the peak")

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="compute; auto: bf16 on a GPU, fp32 on a CPU. Weights stay fp32"
    )
    activation_checkpointing: bool = operational(False, "recompute each layer in the backward pass to save memory")
    compile: Literal["auto", "layers", "off"] = operational("auto", "compile each decoder layer; auto: on a GPU")
    cpu_threads: Annotated[int, Field(ge=0)] = operational(
        0, "threads of a process on a CPU; 0: its share of the cores"
    )
    loss_chunk_tokens: Annotated[int, Field(ge=64)] = operational(8192, "tokens whose logits exist at once")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="loss or gradients not finite: exit 4, or skip the step and count it"
    )
    max_skipped_steps: Annotated[int, Field(ge=1)] = Field(10, description="with skip: stop after so many in a row")

    @property
    def assistant_only(self) -> bool:
        """Whether only what the assistant says is a target."""
        return self.objective == "assistant_only"

    def clashes(self) -> Iterator[Clash]:
        yield from self._exactly_one(*LENGTHS)
        if self.loss_weighting == "example" and self.objective != "assistant_only":
            yield Clash(
                'loss_weighting = "example" needs objective = "assistant_only"', ("loss_weighting", "objective")
            )
        if self.optimizer != "muon":
            for key in self._given("muon_lr", "muon_momentum"):
                yield Clash(f'{key} needs optimizer = "muon"', (key, "optimizer"))
        if self.schedule != "wsd" and self.decay is not None:
            yield Clash('decay needs schedule = "wsd"', ("decay", "schedule"))
        if self.schedule == "constant" and self.final_lr_ratio != 0:
            yield Clash('final_lr_ratio means nothing with schedule = "constant"', ("final_lr_ratio", "schedule"))


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
    checkpoint: Checkpoint = Field(Checkpoint(), description="when to save and what to keep")
    log: Log = Field(Log(), description="where the numbers go")
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
        if self.lora is not None and self.train.optimizer != "adamw":
            yield Clash('adapters are trained with optimizer = "adamw"', ("train.optimizer", "lora"))
