"""The tables of a recipe that say what is learned: the loop, its teacher, its adapters."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from cheaptrain.recipe.quantities import Span, SpanField
from cheaptrain.recipe.section import Clash, Momentum, Positive, PositiveCount, Section, Share, operational


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
    z_loss: Annotated[float, Field(ge=0)] = Field(
        0.0, description="adds this times the squared logarithm of the softmax's denominator to each token's loss"
    )
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
    fp8: bool = Field(
        False, description="matrix products of the layers in 8-bit floats; needs torchao, and a GPU for it"
    )
    activation_checkpointing: bool = operational(False, "recompute each layer in the backward pass to save memory")
    compile: Literal["auto", "layers", "off"] = operational("auto", "compile each decoder layer; auto: on a GPU")
    attention: Literal["auto", "cudnn", "flash", "varlen", "flash2", "flash3", "flash4"] = operational(
        "auto", "kernel of attention on a GPU; auto: the fastest right one, measured when a run starts"
    )
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
        if self.z_loss and self.objective == "distill":
            yield Clash("z_loss goes with cross-entropy, not with a teacher's divergence", ("z_loss", "objective"))
        if self.fp8 and self.precision == "fp32":
            yield Clash('fp8 is for layers that compute in bf16, not with precision = "fp32"', ("fp8", "precision"))
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
