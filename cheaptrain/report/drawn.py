"""Which curves a report has, over all its stages, on one axis of tokens.

A stage begins where the one ended whose weights it began with; one that starts afresh (a teacher, say) begins at 0,
beside the first. A picture that would be empty is left out.
"""

from collections.abc import Callable, Sequence

from cheaptrain.report.account import GPU_MEMORY, HOST_MEMORY, Account
from cheaptrain.report.drawn_scores import score_pictures
from cheaptrain.report.formats import plain, rate, share
from cheaptrain.report.pictures import Curve, Picture
from cheaptrain.report.series import Column
from cheaptrain.units import human, size

LOSS = "loss"


def pictures_of(accounts: Sequence[Account]) -> list[Picture]:
    """All of them, the loss first, then what was scored."""
    starts = sorted({float(account.offset) for account in accounts if account.offset and account.tokens})
    pictures = [
        Picture(
            LOSS,
            "Training loss",
            "Of each step that was logged (pale) and its median over stretches. Stages that learn from a teacher show "
            "the cross-entropy with the text, not the distance from the teacher; stages of conversations count what "
            "the assistant has to say alone.",
            _by_stage(accounts, _training_loss, noisy=True),
            plain,
            starts=starts,
        ),
        Picture(
            "validation",
            "Validation loss",
            "On held-out documents, all sources of a stage together. Another mixture, or conversations, is another "
            "text: between stages with different sources the level jumps for that reason alone.",
            _by_stage(accounts, _of("val/loss")),
            plain,
            starts=starts,
        ),
        _of_sources(accounts, starts),
        Picture(
            "learning-rate",
            "Learning rate",
            "Of AdamW; matrices that Muon trains follow the same course at a height of their own.",
            _by_stage(accounts, _of("train/learning_rate")),
            rate,
            starts=starts,
        ),
        Picture(
            "gradient-norm",
            "Gradient norm",
            "Before clipping.",
            _by_stage(accounts, _of("train/grad_norm"), noisy=True),
            plain,
            starts=starts,
        ),
        Picture(
            "throughput",
            "Throughput",
            "Tokens a second of all processes together, step by step (pale) and its median over stretches; validation "
            "and saving not counted.",
            _by_stage(accounts, _of("train/tokens_per_second"), noisy=True),
            human,
            starts=starts,
        ),
        Picture(
            "memory",
            "Memory",
            "The most that one process has held so far on its GPU; without one, what the main process holds.",
            _by_stage(accounts, _memory),
            size,
            starts=starts,
        ),
        Picture(
            "accuracy",
            "Next-token accuracy",
            "Share of the targets of a step that the model found likeliest.",
            _by_stage(accounts, _of("train/accuracy"), noisy=True),
            share,
            starts=starts,
        ),
        Picture(
            "distillation-loss",
            "Distance from the teacher",
            "kd/loss: the divergence between teacher and student, of each step.",
            _by_stage(accounts, _of("kd/loss"), noisy=True),
            plain,
            starts=starts,
        ),
        Picture(
            "distillation-agreement",
            "Agreement with the teacher",
            "kd/agreement: share of tokens whose likeliest successor is the same for both.",
            _by_stage(accounts, _of("kd/agreement"), noisy=True),
            share,
            starts=starts,
        ),
        *score_pictures(accounts, starts),
    ]
    return [picture for picture in pictures if picture.curves]


def _by_stage(accounts: Sequence[Account], column: Callable[[Account], Column], *, noisy: bool = False) -> list[Curve]:
    """A curve for each stage that has the metric."""
    curves = []
    for colour, account in enumerate(accounts):
        found = column(account).finite
        if len(found):
            curves.append(Curve(account.name, colour, account.position(found), found.values, noisy=noisy))
    return curves


def _of(name: str) -> Callable[[Account], Column]:
    return lambda account: account.metrics[name]


def _training_loss(account: Account) -> Column:
    entropy = account.metrics["train/cross_entropy"]
    return entropy if len(entropy) else account.metrics["train/loss"]


def _memory(account: Account) -> Column:
    on_gpu = account.metrics[GPU_MEMORY]
    return on_gpu if len(on_gpu) else account.metrics[HOST_MEMORY]


def _of_sources(accounts: Sequence[Account], starts: Sequence[float]) -> Picture:
    """Bits a byte of each source, over all stages that held some of it out; the loss where bytes are not known."""
    unit = "bpb" if any(len(account.metrics["val/bpb"]) for account in accounts) else "loss"
    curves: list[Curve] = []
    colours: dict[str, int] = {}
    line = _line_to_the_last(accounts)
    for account in accounts:
        for name in account.metrics.columns:
            parts = name.split("/")
            if parts[0] != "val" or len(parts) != 3 or parts[2] != unit:
                continue
            found = account.metrics[name].finite
            colour = colours.setdefault(parts[1], len(colours))
            if len(found):
                aside = account not in line
                curves.append(Curve(parts[1], colour, account.position(found), found.values, thin=aside))
    what = "Bits a byte" if unit == "bpb" else "Validation loss"
    caption = "On held-out documents of each source. Bits a byte do not depend on the tokenizer."
    if len(line) < len(accounts):
        caption += " Pale: stages beside the line that leads to the last one, a teacher for one."
    return Picture("validation-sources", f"{what}, by source", caption, curves, plain, starts=starts)


def _line_to_the_last(accounts: Sequence[Account]) -> list[Account]:
    """The last stage and those that it continues, one another, from the first on."""
    line = [accounts[-1]]
    for account in reversed(accounts[:-1]):
        if line[0].offset and account.offset + account.tokens == line[0].offset:
            line.insert(0, account)
    return line
