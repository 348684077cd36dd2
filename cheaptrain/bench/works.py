"""What is measured: works, each one optimizer step of one model on rows of one shape, and who does them.

A work says everything that must be equal for all its variants: model, vocabulary, rows of a step, documents in a row.
What a variant may choose is how many rows it takes at once; the step stays the same, accumulated from as many pieces as
its memory asks for. The trap it avoids: a variant measured at half the rows has its optimizer step counted twice.

The order is that of worth: where time ends before the works do, it is the last ones that are left.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from cheaptrain.errors import RecipeError

CHEAPTRAIN, PLAIN, FP8 = "cheaptrain", "cheaptrain, plain", "cheaptrain, fp8"
TRANSFORMERS, LIGER = "transformers", "transformers + liger"
GPT2_LOOP = "plain GPT-2 loop"
FULL_LOGITS, LIGER_JSD = "full logits", "liger JSD"
TRL, TRL_FLEX = "TRL", "TRL, FlexAttention"
FLOOR = "floor"
LAYER_KERNELS, CUDA_GRAPHS = "cheaptrain, layer kernels", "cheaptrain, CUDA graphs"
EXPERIMENTS = (LAYER_KERNELS, CUDA_GRAPHS)  # ways that training does not go yet: in each round after all else


@dataclass(frozen=True)
class Shape:
    """A preset and the fields of its config that are otherwise."""

    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """One optimizer step on `rows` rows of `seq_len` tokens. `micro_rows`: how many to try at once; `variants`: the
    first is what the others are held against; `documents`: mean tokens of a document in packed rows, None: every row is
    one; `beside`: the work whose cheaptrain is set beside this one's; `loss_steps`: compare losses over so many steps
    instead of speeds."""

    name: str
    title: str
    model: Shape
    vocab: int
    seq_len: int
    rows: int
    micro_rows: int
    variants: tuple[str, ...]
    kind: Literal["pretrain", "distill", "sft"] = "pretrain"
    teacher: Shape | None = None
    documents: int | None = None
    beside: str | None = None
    steps: int = 10
    loss_steps: int = 0
    opt_in: bool = False

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.rows * self.seq_len


_GPU_VOCAB = 128_256
_AT_HAND = (CHEAPTRAIN, TRANSFORMERS, LIGER, PLAIN)
_LLAMA_1B = Shape(
    "7b",
    {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
)


def _950m(name: str, title: str, seq_len: int, rows: int, variants: tuple[str, ...], **more: Any) -> Work:
    model = Shape("mobilellm-950m")
    return Work(name, title, model, _GPU_VOCAB, seq_len, rows, more.pop("micro_rows", rows), variants, **more)


GPU_WORKS = (
    _950m("950m", "mobilellm-950m, T 2,048", 2048, 16, (*_AT_HAND, LAYER_KERNELS)),
    Work(
        "140m", "mobilellm-140m, T 2,048", Shape("mobilellm-140m"), _GPU_VOCAB, 2048, 32, 32,
        (*_AT_HAND[:3], *EXPERIMENTS),
    ),
    Work(
        "gpt2", "gpt2-124m, T 1,024, 524,288 tokens a step", Shape("gpt2-124m"), 50_304, 1024, 512, 64,
        (CHEAPTRAIN, GPT2_LOOP), steps=6,
    ),
    _950m(
        "distill", "distillation, 950M ← 1.24B, T 4,096", 4096, 4, (CHEAPTRAIN, LIGER_JSD, FULL_LOGITS, TRL),
        kind="distill", teacher=_LLAMA_1B,
    ),
    _950m(
        "sft", "SFT, 950M, one row of 32,768, packed", 32_768, 1, (CHEAPTRAIN, TRL, TRL_FLEX),
        kind="sft", documents=2000,
    ),
    Work(
        "360m", "mobilellm-360m, T 2,048", Shape("mobilellm-360m"), _GPU_VOCAB, 2048, 32, 32,
        (*_AT_HAND[:3], CUDA_GRAPHS),
    ),
    _950m("packed", "950M, T 2,048, documents of 500 tokens", 2048, 16, (CHEAPTRAIN,), documents=500, beside="950m"),
    Work(
        "r1", "mobilellm-r1-950m (llama4_text), T 2,048", Shape("mobilellm-r1-950m"), _GPU_VOCAB, 2048, 16, 16,
        (CHEAPTRAIN, LIGER, LAYER_KERNELS), beside="950m",
    ),
    _950m("950m-4k", "mobilellm-950m, T 4,096", 4096, 8, (CHEAPTRAIN, LIGER)),
    _950m("950m-32k", "mobilellm-950m, one row of 32,768", 32_768, 1, (CHEAPTRAIN, LIGER)),
    _950m("fp8", "mobilellm-950m, T 2,048, FP8", 2048, 16, (FP8,), beside="950m"),
    _950m("fp8-loss", "950M, FP8 beside bf16, 300 steps", 2048, 8, (FP8, CHEAPTRAIN), loss_steps=300, opt_in=True),
)  # fmt: skip

_CPU_VOCAB = 2048
_QUICK, _TINY_TEACHER = Shape("quickstart"), Shape("tiny-llama", {"hidden_size": 96, "num_hidden_layers": 3})

CPU_WORKS = (
    Work("quick", "quickstart, T 256", _QUICK, _CPU_VOCAB, 256, 8, 8, (CHEAPTRAIN, TRANSFORMERS, LIGER)),
    Work(
        "gpt2", "tiny-gpt2, T 256, four micro-batches", Shape("tiny-gpt2"), _CPU_VOCAB, 256, 16, 4,
        (CHEAPTRAIN, GPT2_LOOP, TRANSFORMERS),
    ),
    Work(
        "distill", "distillation, quickstart ← a smaller one, T 256", _QUICK, _CPU_VOCAB, 256, 4, 4,
        (CHEAPTRAIN, FULL_LOGITS, LIGER_JSD, TRL), kind="distill", teacher=_TINY_TEACHER,
    ),
    Work(
        "sft", "SFT, quickstart, rows of 1,024, packed", _QUICK, _CPU_VOCAB, 1024, 1, 1, (CHEAPTRAIN, TRL),
        kind="sft", documents=120,
    ),
    Work(
        "packed", "quickstart, T 256, documents of 60 tokens", _QUICK, _CPU_VOCAB, 256, 8, 8, (CHEAPTRAIN,),
        documents=60, beside="quick",
    ),
    Work("r1", "tiny-llama4, T 256", Shape("tiny-llama4"), _CPU_VOCAB, 256, 8, 8, (CHEAPTRAIN, TRANSFORMERS)),
    Work(
        "tiny", "tiny-qwen3, T 128", Shape("tiny-qwen3"), _CPU_VOCAB, 128, 4, 2,
        (CHEAPTRAIN, TRANSFORMERS, LAYER_KERNELS), steps=5,
    ),
)  # fmt: skip


def works_of(device: str) -> tuple[Work, ...]:
    """All works of a "cuda" or "cpu" machine, in order of worth."""
    return GPU_WORKS if device == "cuda" else CPU_WORKS


def find_work(name: str, device: str) -> Work:
    """The work called `name`. Raises RecipeError with the list."""
    known = {work.name: work for work in works_of(device)}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"bench: there is no work {name!r} on this device ({device}).{hint} There are: {', '.join(known)}"
    )


def has_floor(work: Work) -> bool:
    """The floor is that of bf16 matmuls, and of speeds."""
    return not work.loss_steps and FP8 not in work.variants


def chosen_works(names: str | None, variants: str | None, device: str) -> list[tuple[Work, list[str]]]:
    """The works of `names` (comma-separated; None: all but those to be asked for) with the variants of `variants`
    (separated by semicolons, as their names have commas; None: all) and the floor, in order of worth. Raises
    RecipeError for a name that is none."""
    asked = None if names is None else {find_work(name.strip(), device).name for name in names.split(",")}
    works = [w for w in works_of(device) if (w.name in asked if asked is not None else not w.opt_in)]
    wanted = None if variants is None else [name.strip() for name in variants.split(";")]
    known = {name for work in works_of(device) for name in work.variants} | {FLOOR}
    for name in wanted or ():
        if name not in known:
            raise RecipeError(f"bench: there is no variant {name!r}. There are: {'; '.join(sorted(known))}")
    chosen = []
    for work in works:
        every = [*work.variants, *([FLOOR] if has_floor(work) else [])]
        if taken := [name for name in every if wanted is None or name in wanted]:
            chosen.append((work, taken))
    if not chosen:
        raise RecipeError(f"bench: none of these works has a variant {variants!r}: see --list")
    return chosen
