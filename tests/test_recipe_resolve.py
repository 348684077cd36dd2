"""Every derived number adds up, and what does not fit is refused with what would."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recipe_texts import MINIMAL, line_of, load_text, recipe

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe.batch import resolve_batch
from cheaptrain.recipe.resolve import MissingFacts, ModelFacts, Resolved, SourceFacts, resolve
from cheaptrain.recipe.schema import Recipe

MODEL = ModelFacts(1_000_000, 400_000, {"embedding": 400_000, "layers": 600_000}, 6_500_000.0)
FACTORS = st.integers(1, 12)


def facts(tokens: int) -> SourceFacts:
    return SourceFacts(tokens, 10, tokens * 4, 100, 1)


def facts_of_rows(rows: int, seq_len: int = 64) -> SourceFacts:
    return facts(rows * seq_len + 1)


def build(
    *, sources: dict[str, float] | None = None, seq_len: int = 64, max_epochs: float | None = None, **train: object
) -> Recipe:
    weights = sources or {"web": 70.0, "wiki": 30.0}
    length = {} if {"tokens", "steps", "epochs", "flops", "tokens_per_parameter"} & set(train) else {"steps": 10}
    tables = {
        "run": {"dir": "x"},
        "tokenizer": {"path": "gpt2"},
        "model": {"preset": "tiny"},
        "data": {
            "seq_len": seq_len,
            "sources": [
                {"name": name, "weight": weight, "files": name}
                | ({"max_epochs": max_epochs} if max_epochs is not None else {})
                for name, weight in weights.items()
            ],
        },
        "train": {"global_batch_tokens": 1024, "lr": 1.0, **length, **train},
    }
    return Recipe.model_validate(tables)


def test_ten_billion_tokens_are_19073_steps() -> None:
    resolved = resolve(build(seq_len=1024, tokens="10B", global_batch_tokens=524_288, warmup="715 steps"), 4)
    assert resolved.steps == 19_073
    assert resolved.tokens == 19_073 * 524_288 == 9_999_745_024
    assert resolved.warmup_tokens == 715 * 524_288
    assert (resolved.rows_per_step, resolved.accumulation, resolved.tokens_per_step) == (512, 128, 524_288)


@settings(deadline=None)
@given(world=FACTORS, micro=FACTORS, accumulation=FACTORS, seq_len=st.integers(8, 4096), tokens=st.integers(1, 10**14))
def test_no_row_and_no_token_is_lost_between_batch_and_run(
    world: int, micro: int, accumulation: int, seq_len: int, tokens: int
) -> None:
    step = world * micro * accumulation * seq_len
    assume(2 * tokens >= step)
    asked = build(seq_len=seq_len, tokens=tokens, global_batch_tokens=step, micro_batch_size=micro)
    resolved = resolve(asked, world)
    assert resolved.rows_per_step == world * micro * accumulation
    assert resolved.accumulation == accumulation
    assert resolved.tokens_per_step == step
    assert resolved.tokens == resolved.steps * step == resolved.rows * seq_len
    assert abs(resolved.tokens - tokens) * 2 <= step, "the nearest number of steps"
    assert sum(share.rows for share in resolved.shares) == resolved.rows
    assert sum(share.tokens for share in resolved.shares) == resolved.tokens


@settings(deadline=None)
@given(
    rows=st.integers(1, 400),
    world=st.integers(1, 20),
    micro=st.integers(1, 20),
)
def test_what_a_refusal_proposes_is_accepted(rows: int, world: int, micro: int) -> None:
    asked = build(global_batch_tokens=rows * 64, micro_batch_size=micro)
    if rows % (world * micro) == 0:
        assert resolve_batch(asked, world).accumulation * world * micro == rows
        return
    with pytest.raises(RecipeError) as caught:
        resolve_batch(asked, world)
    for line in str(caught.value).split("\n")[1:]:
        where, _, proposal = line.partition(":")
        numbers = [int(number) for number in proposal.replace(",", "").split() if number.isdigit()]
        for number in _separate(proposal):
            if "with both" in where:
                resolve_batch(build(global_batch_tokens=number, micro_batch_size=micro), world)
            elif "processes" in proposal and "another" in where:
                resolve_batch(build(global_batch_tokens=rows * 64, micro_batch_size=1), number)
            elif "processes" in proposal:
                resolve_batch(asked, number)
            elif numbers:
                resolve_batch(build(global_batch_tokens=rows * 64, micro_batch_size=number), world)


def _separate(proposal: str) -> list[int]:
    """The numbers of `1, 2, 16 or 1,024`."""
    words = proposal.replace(" or ", ", ").split(", ")
    return [int(digits) for word in words if (digits := "".join(c for c in word if c.isdigit()))]


def test_the_refusal_says_which_processes_and_micro_batches_would_do() -> None:
    asked = build(global_batch_tokens=48 * 64, micro_batch_size=4)
    with pytest.raises(RecipeError) as caught:
        resolve(asked, 5)
    assert str(caught.value).split("\n") == [
        "train.micro_batch_size: 48 rows a step (global_batch_tokens 3,072 / seq_len 64) do not divide over 5 processes"
        " x micro_batch_size 4 = 20. What would:",
        "  with 5 processes: no micro_batch_size",
        "  with micro_batch_size 4: 1, 2, 3, 4, 6 or 12 processes",
        "  with another micro_batch_size: 1, 2, 3, 4, 6, 8, 12 or 16 processes",
        "  with both as they are: global_batch_tokens 2,560 or 3,840",
    ]


def test_a_batch_that_is_no_whole_number_of_rows_names_the_nearest_that_are() -> None:
    with pytest.raises(RecipeError, match="the nearest are 960 or 1,024"):
        resolve(build(global_batch_tokens=1000), 1)
    with pytest.raises(RecipeError, match=r"the nearest are 64$"):
        resolve(build(global_batch_tokens=10), 1)
    with pytest.raises(RecipeError, match="at least 1 process"):
        resolve(build(), 0)


def test_messages_name_the_line_when_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_text(Path(), MINIMAL.replace("= 1024", "= 1000"))
    with pytest.raises(RecipeError, match=f"recipe.toml:{line_of(MINIMAL, 'global_batch')}"):
        resolve(loaded.recipe, 1, provenance=loaded.provenance)
    loaded = load_text(Path(), MINIMAL)
    with pytest.raises(RecipeError) as caught:
        resolve(loaded.recipe, 1, {"web": facts(9), "wiki": facts(9)}, provenance=loaded.provenance)
    named = line_of(MINIMAL, 'name = "wiki"')
    assert f"data.sources.wiki (recipe.toml:{named}): 9 tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1024 * 7 + 511}, 7),
        ({"tokens": 1024 * 7 + 512}, 8),
        ({"tokens_per_parameter": 20.0}, 19_531),
        ({"flops": 6.5e6 * 1024 * 9}, 9),
        ({"tokens_per_parameter": 0.001}, 1),
    ],
)
def test_the_length_in_steps(length: dict[str, object], steps: int) -> None:
    resolved = resolve(build(**length), 1, model=MODEL)
    assert resolved.steps == steps
    assert resolved.tokens_per_parameter == steps * 1024 / 1_000_000
    assert resolved.flops == steps * 1024 * 6_500_000.0


def test_a_run_of_less_than_one_step_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.tokens: 500 tokens are less than one step of 1,024"):
        resolve(build(tokens=500), 1)
    with pytest.raises(RecipeError, match=r"train\.epochs: 640 tokens are less than one step"):
        resolve(build(sources={"web": 1.0}, epochs=1), 1, {"web": facts_of_rows(10)})


def test_an_unknown_length_asks_for_preparing() -> None:
    for length in ({"flops": 1e12}, {"tokens_per_parameter": 20.0}, {"epochs": 1}):
        with pytest.raises(MissingFacts, match="cheaptrain prepare") as caught:
            resolve(build(**length), 1)
        assert isinstance(caught.value, PreflightError)
        assert resolve_batch(build(**length), 1).rows_per_step == 16, "what needs no facts is still known"
    with pytest.raises(MissingFacts, match="not prepared yet: wiki"):
        resolve(build(), 1, {"web": facts(10**6)})


def test_unprepared_sources_have_a_share_and_no_epochs() -> None:
    web, wiki = resolve(build(), 1).shares
    assert (web.share, web.rows, web.available_rows, web.epochs) == (0.7, 112, None, None)
    assert (wiki.share, wiki.rows, wiki.tokens) == (0.3, 48, 48 * 64)


def test_weights_of_a_published_mixture_need_not_add_up() -> None:
    published = {"a": 63.75, "b": 8.93, "c": 8.09, "d": 6.98, "e": 6.30, "f": 5.96}
    assert sum(published.values()) == pytest.approx(100.01)
    shares = resolve(build(sources=published), 1).shares
    assert sum(share.share for share in shares) == pytest.approx(1, abs=1e-12)
    assert sum(share.rows for share in shares) == 160
    assert all(abs(share.rows - 160 * share.share) < 1 for share in shares)


def test_a_source_of_weight_0_needs_nothing_and_gets_nothing() -> None:
    resolved = resolve(build(sources={"web": 1.0, "off": 0.0}), 1, {"web": facts(10**6)})
    assert [(share.name, share.share, share.rows, share.epochs) for share in resolved.shares] == [
        ("web", 1.0, 160, pytest.approx(160 / 15_624)),
        ("off", 0.0, 0, None),
    ]


def test_an_empty_source_that_takes_part_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(build(), 1, {"web": facts(0), "wiki": facts(64)})
    assert "data.sources.web: 0 tokens" in str(caught.value)
    assert "data.sources.wiki: 64 tokens" in str(caught.value), "64 tokens make no row: the last target is missing"
    assert SourceFacts(65, 1, 1, 0, 0).rows(64) == 1


def test_more_epochs_than_allowed_are_refused_for_every_such_source() -> None:
    prepared = {"web": facts_of_rows(50), "wiki": facts_of_rows(20)}
    with pytest.raises(RecipeError) as caught:
        resolve(build(), 1, prepared)
    web, wiki = str(caught.value).split("\n")
    assert web.startswith("data.sources.web: 7,168 tokens asked (70.00% of the run), 3,200 present: 2.24 epochs")
    assert "max_epochs allows 1" in web and web.endswith("max_epochs = 2.3")
    assert wiki.startswith("data.sources.wiki: 3,072 tokens asked")
    resolved = resolve(build(max_epochs=2.4), 1, prepared)
    assert [share.epochs for share in resolved.shares] == [112 / 50, 48 / 20]
    assert resolved.shares[0].max_epochs == 2.4


def test_the_order_may_be_a_row_off_for_each_source() -> None:
    asked = build(sources={"web": 1.0, "wiki": 1.0})
    assert resolve(asked, 1, {"web": facts_of_rows(78), "wiki": facts_of_rows(100)}).shares[0].rows == 80
    with pytest.raises(RecipeError):
        resolve(asked, 1, {"web": facts_of_rows(77), "wiki": facts_of_rows(100)})


def test_epochs_end_with_the_first_source_and_need_no_second_permission() -> None:
    prepared = {"web": facts_of_rows(700), "wiki": facts_of_rows(100)}
    resolved = resolve(build(epochs=3.0), 1, prepared)
    # wiki: 30 % of the rows are at most 3 x 100.
    assert resolved.rows == 1000 // 16 * 16
    assert resolved.shares[1].epochs == pytest.approx(3, abs=0.03)
    assert resolved.shares[1].max_epochs == 3
    with pytest.raises(RecipeError, match=r"data\.sources\.wiki.*max_epochs allows 1"):
        resolve(build(epochs=3.0, max_epochs=1.0), 1, prepared)


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    rows=st.lists(st.integers(20, 10_000), min_size=5, max_size=5),
    epochs=st.floats(1, 7),
)
def test_no_source_is_read_more_often_than_the_epochs_asked(
    weights: list[float], rows: list[int], epochs: float
) -> None:
    names = [f"s{index}" for index in range(len(weights))]
    asked = build(sources=dict(zip(names, weights, strict=True)), epochs=epochs, global_batch_tokens=64)
    prepared = {name: facts_of_rows(count) for name, count in zip(names, rows, strict=False)}
    resolved = resolve(asked, 1, prepared)
    total = sum(map(Fraction, weights))
    ideal = [resolved.rows * Fraction(weight) / total for weight in weights]
    limits = [Fraction(epochs) * prepared[name].rows(64) for name in names]
    assert all(used <= limit for used, limit in zip(ideal, limits, strict=True))
    more = [(resolved.rows + 1) * Fraction(weight) / total for weight in weights]
    assert any(used > limit for used, limit in zip(more, limits, strict=True)), "one row more would be too many"


@pytest.mark.parametrize(
    ("keys", "warmup", "decay"),
    [
        ({}, 0, 100),
        ({"warmup": "10%"}, 10, 90),
        ({"warmup": "3 steps", "schedule": "cosine"}, 3, 97),
        ({"schedule": "constant", "warmup": "5 steps"}, 5, 0),
        ({"schedule": "wsd"}, 0, 20),
        ({"schedule": "wsd", "decay": "50 steps", "warmup": "50%"}, 50, 50),
        ({"warmup": "100%"}, 100, 0),
    ],
)
def test_the_schedule_in_tokens(keys: dict[str, object], warmup: int, decay: int) -> None:
    resolved = resolve(build(steps=100, **keys), 1)
    assert (resolved.warmup_tokens, resolved.decay_tokens) == (warmup * 1024, decay * 1024)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"warmup": "101 steps"},
            r"train\.warmup: a warm-up of 101 steps takes 103,424 tokens, and the run has 102,400",
        ),
        ({"schedule": "wsd", "warmup": "81 steps"}, r"train\.decay: warm-up \(82,944 tokens\) and decay \(20,480\)"),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(keys: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        resolve(build(steps=100, **keys), 1)


def intervals(tmp_path: Path, *overrides: str) -> Resolved:
    return resolve(recipe(tmp_path, "train.tokens=unset", "train.steps=10", *overrides), 1)


def test_intervals_are_whole_steps(tmp_path: Path) -> None:
    resolved = intervals(tmp_path, "log.every=1%", "samples.every=3 steps", "checkpoint.every=2048 tokens")
    assert (resolved.log_every, resolved.validate_every, resolved.sample_every, resolved.save_every) == (1, 1, 3, 2)
    assert resolved.keep_every is None
    assert intervals(tmp_path, "checkpoint.every=2 steps", "checkpoint.keep_every=6 steps").keep_every == 6


def test_checkpoints_to_keep_are_among_those_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="5 steps is not a multiple of"):
        intervals(tmp_path, "checkpoint.every=2 steps", "checkpoint.keep_every=5 steps")
    resolved = intervals(tmp_path, "checkpoint.every=25%", "checkpoint.keep_every=50%")
    assert (resolved.save_every, resolved.keep_every) == (3, 6), "2.5 and 5 steps, rounded to what is written"


def sized(*names: str, **keys: object) -> Recipe:
    return build(sources=dict.fromkeys(names, "size"), **keys)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(1, 500), min_size=1, max_size=5),
    epochs=st.sampled_from([1.0, 2.0, 3.0, 0.5]),
    step=st.integers(1, 64),
)
def test_epochs_by_size_leave_out_a_row_or_hide_one_of_the_next(rows: list[int], epochs: float, step: int) -> None:
    names = [f"s{k}" for k in range(len(rows))]
    known = {name: SourceFacts(1, 1, 1, 0, 0, packed_rows=count) for name, count in zip(names, rows, strict=True)}
    resolved = resolve(sized(*names, epochs=epochs, global_batch_tokens=step * 64), 1, known)
    wanted = -int(-sum(rows) * Fraction(epochs) // 1)
    assert resolved.rows == wanted + resolved.filled_up
    assert 0 <= resolved.filled_up < step
    assert [Fraction(share.share).limit_denominator(10**6) for share in resolved.shares] == [
        Fraction(count, sum(rows)) for count in rows
    ]
    assert sum(share.rows for share in resolved.shares) == resolved.rows


def test_shares_by_size_are_made_up_before_the_sizes_are_known() -> None:
    asked = sized("a", "b", steps=10)
    assert [(share.share, share.rows, share.epochs) for share in resolve(asked, 1).shares] == [(None, 0, None)] * 2
    with pytest.raises(MissingFacts, match=r"train\.epochs"):
        resolve(sized("a", "b", epochs=2), 1)
    with pytest.raises(RecipeError, match="do not fill one row"):
        resolve(asked, 1, {"a": facts_of_rows(7), "b": facts(3)})


def test_more_than_the_epochs_of_a_source_by_size_pass_for_filling_up() -> None:
    known = {"a": facts_of_rows(100), "b": facts_of_rows(50)}
    assert resolve(sized("a", "b", epochs=2), 1, known).filled_up == 4
    with pytest.raises(RecipeError, match=r"data\.sources\.b: .* 2\.\d+ epochs, and max_epochs allows 1"):
        resolve(sized("a", "b", epochs=2.5, max_epochs=1.0), 1, known)
