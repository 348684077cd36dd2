"""A wrong recipe costs one attempt: every mistake is shown, at its line, with what to write instead."""

from pathlib import Path

import pytest
from recipe_texts import MINIMAL, line_of, load_text

from cheaptrain.errors import EXIT_RECIPE, RecipeError
from cheaptrain.recipe.errors import RecipeProblems
from cheaptrain.recipe.foreign import FOREIGN
from cheaptrain.recipe.keys import keys
from cheaptrain.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeProblems) as caught:
        load_text(Path(), text, *overrides)
    assert caught.value.exit_code == EXIT_RECIPE
    return [str(problem) for problem in caught.value.problems]


def one(text: str, *overrides: str) -> str:
    (problem,) = problems(text, *overrides)
    return problem


def changed(old: str, new: str) -> str:
    assert MINIMAL.count(old) == 1
    return MINIMAL.replace(old, new)


def test_every_mistake_at_once() -> None:
    text = (
        MINIMAL.replace('dir = "outputs/x"', "dir = 5")
        .replace("lr = 3e-4", 'lr = "3e-4"\nlearnig_rate = 1\nwarmup = 100\nsteps = 4')
        .replace('hub = "org/wiki"', 'hub = "org/wiki"\nfiles = "x"')
        + "[log]\ntrackers = [\n  'wandb',\n  'wandbb',\n]\n[extra]\nx = 1\n"
    )
    told = problems(text)
    assert [problem.split(": ")[:2] for problem in told] == [
        [f"recipe.toml:{line_of(text, part)}", key]
        for part, key in [
            ("dir =", "run.dir"),
            ('files = "x"', "data.sources.wiki"),
            ("lr =", "train.lr"),
            ("learnig_rate", "train.learnig_rate"),
            ("warmup", "train.warmup"),
            ("steps", "train"),
            ("'wandbb'", "log.trackers[2]"),
            ("[extra]", "extra"),
        ]
    ]


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        ("lr = 3e-4", "lrr = 3e-4", "train.lrr", "did you mean train.lr?"),
        ("lr = 3e-4", "lr = -1", "train.lr", "must be above 0, not -1"),
        ("lr = 3e-4", "lr = inf", "train.lr", "must be a finite number"),
        ("lr = 3e-4", "lr = true", "train.lr", "expected a number, not true"),
        ("lr = 3e-4", 'lr = "3e-4"', "train.lr", "write it without quotes"),
        ("lr = 3e-4", "lr = { x = 1 }", "train.lr", "expected a number, not a table"),
        ("lr = 3e-4", "lr = 2020-01-01", "train.lr", "expected a number"),
        ('dir = "outputs/x"', "dir = 5", "run.dir", "expected text, not 5: write it in quotes"),
        ('tokens = "1M"', 'tokens = "1,5M"', "train.tokens", "'1,5M' is not a count"),
        ('tokens = "1M"', "tokens = 0", "train.tokens", "must be above 0"),
        ("seq_len = 64", "seq_len = 64.0", "data.seq_len", "expected a whole number, not 64.0: write 64"),
        ("seq_len = 64", "seq_len = 4", "data.seq_len", "must be 8 or more, not 4"),
        ("seq_len = 64", 'seq_len = 64\ndocument_mask = "true"', "data.document_mask", "write true without quotes"),
        ('name = "wiki"', 'name = "my wiki"', "data.sources.my wiki.name", "letters, digits"),
        ('files = "web.jsonl"', 'files = ["a", 3]', "data.sources.web.files[2]", "text or a list of texts, not 3"),
        ("lr = 3e-4", 'lr = 1\nschedule = "cosin"', "train.schedule", 'not "cosin"; did you mean cosine?'),
        ("lr = 3e-4", "lr = 1\nbetas = [0.9, 1]", "train.betas[2]", "must be below 1, not 1"),
        ("lr = 3e-4", "lr = 1\nwarmup = 5", "train.warmup", '5 has no unit; write "2000 steps"'),
        ("[train]", '[log]\nevery = "0%"\n[train]', "log.every", "how often cannot be 0"),
        ("[train]", '[log]\ntrackers = "wandb"\n[train]', "log.trackers", 'write ["wandb"]'),
        ("[train]", "[samples]\nprompts = [1]\n[train]", "samples.prompts[1]", "write it in quotes"),
        ("lr = 3e-4", "lr = 1\nmuon_lr = 1", "train", 'muon_lr needs optimizer = "muon"'),
        ("lr = 3e-4", 'lr = 1\ndecay = "5%"', "train", 'decay needs schedule = "wsd"'),
        (
            'path = "gpt2"',
            'path = "gpt2"\n[tokenizer.train]\nvocab_size = 500\nsources = ["web"]',
            "tokenizer",
            "one of",
        ),
        (
            'hub = "org/wiki"',
            'hub = "org/wiki"\ncolumn = "x"\ncontent = "code"',
            "data.sources.wiki",
            "goes with packages",
        ),
        ('preset = "tiny"', 'preset = "tiny"\noverrides = { a = 1979-05-27 }', "model.overrides.a", "recipe.json"),
        ('preset = "tiny"', 'preset = "tiny"\noverrides = { a = nan }', "model.overrides.a", "recipe.json"),
        ("[train]", "[parallel]\ntp = 0\n[train]", "parallel.tp", "must be 1 or more, not 0"),
        ("[train]", "[parallel]\ndp_shard = 0\n[train]", "parallel.dp_shard", "must be 1 or more, not 0"),
        ("[train]", '[parallel]\ndp_shard = "4"\n[train]', "parallel.dp_shard", 'a whole number or "auto", not "4"'),
        ("[train]", '[parallel]\ndp_shard = "aut"\n[train]', "parallel.dp_shard", "did you mean auto?"),
        (
            "[train]",
            '[parallel]\nstep_timeout = "5"\n[train]',
            "parallel.step_timeout",
            "'5' is not a time; write 5400",
        ),
        ('dir = "outputs/x"', 'dir = "x"\nmax_time = 23:45:00', "run.max_time", "23:45:00 is not a time"),
    ],
)
def test_a_wrong_value_says_what_is_expected(old: str, new: str, key: str, said: str) -> None:
    text = changed(old, new)
    problem = one(text)
    assert problem.split(": ")[1] == key
    assert said in problem
    culprit = new.split("\n")[-1]
    if key not in ("tokenizer",) and culprit != "[train]":
        assert problem.startswith(f"recipe.toml:{line_of(text, culprit)}: ")


@pytest.mark.parametrize(
    ("old", "key", "said"),
    [
        ("lr = 3e-4\n", "train.lr", "e.g. lr = 0.0003"),
        ('dir = "outputs/x"\n', "run.dir", "missing"),
        ("weight = 30\n", "data.sources.wiki.weight", "missing"),
        ('preset = "tiny"\n', "model", "give exactly one of preset, config, init_from; got none"),
        ('hub = "org/wiki"\n', "data.sources.wiki", "give exactly one of hub, files"),
        ('tokens = "1M"\n', "train", "got none"),
    ],
)
def test_a_missing_key_is_missed_at_its_table(old: str, key: str, said: str) -> None:
    text = changed(old, "")
    header = f"[{key.split('.')[0]}]" if "sources" not in key else "[[data.sources]]"
    problem = one(text)
    assert problem.startswith(f"recipe.toml:{line_of(text, header, 2 if 'sources' in key else 1)}: {key}: ")
    assert said in problem


def test_an_empty_recipe_names_the_tables_it_needs() -> None:
    assert [problem.split(": ")[1] for problem in problems("")] == ["run", "tokenizer", "model", "data", "train"]


def test_tables_and_lists_of_tables_are_not_confused() -> None:
    assert "write [[data.sources]] with two brackets" in one(
        "\n".join(
            line for line in MINIMAL.split("\n") if line not in ('name = "wiki"', "weight = 30", 'hub = "org/wiki"')
        )
        .replace("[[data.sources]]", "[data.sources]", 1)
        .replace("[[data.sources]]", "")
    )
    assert "write [run] with one bracket" in one(changed("[run]", "[[run]]"))
    run_key = changed("[run]", "").replace('dir = "outputs/x"', 'run = "outputs/x"')
    assert "its keys stand under [run]" in one(run_key)


def test_strange_elements_of_a_list_of_tables_do_not_crash() -> None:
    start, _, rest = MINIMAL.partition("[[data.sources]]")
    train = rest[rest.index("[train]") :]
    for sources in ('["a", { weight = -1 }]', '[{ name = 5 }, "b"]', "[]", "[[]]", '"x"', "[{}]", "{}"):
        assert problems(f"{start}sources = {sources}\n{train}")


def test_the_key_of_another_trainer_gets_the_name_used_here() -> None:
    told = one(changed("lr = 3e-4", "lr = 3e-4\nper_device_train_batch_size = 4"))
    assert "use train.micro_batch_size" in told
    assert "global_batch_tokens" in one(changed("lr = 3e-4", "lr = 3e-4\ngradient_accumulation_steps = 4"))
    assert "rows are always packed" in one("sample_packing = true\n" + MINIMAL)
    assert "use column in [[data.sources]]" in one(changed('hub = "org/wiki"', 'hub = "x"\ntext-column = "t"'))


def test_the_right_name_is_not_missed_as_well_when_another_was_given() -> None:
    assert "use train.lr" in one(changed("lr = 3e-4", "learning_rate = 3e-4"))
    assert "did you mean [train]?" in one(changed("[train]", "[trian]"))


def test_every_wrong_element_of_a_list_is_shown() -> None:
    told = problems(changed("lr = 3e-4", 'lr = 1\nbetas = ["0.9", 1.0]') + "[samples]\nprompts = [1, 'a', 2]\n")
    assert [problem.split(": ")[1] for problem in told] == [
        "train.betas[1]",
        "train.betas[2]",
        "samples.prompts[1]",
        "samples.prompts[3]",
    ]
    assert "must be below 1, not 1.0" in told[1]


def test_a_length_given_under_another_name_is_not_missed_as_well() -> None:
    assert "use train.steps" in one(changed('tokens = "1M"', "max_steps = 5"))
    assert "use model.init_from" in one(changed('preset = "tiny"', 'model_name_or_path = "x"'))


def test_tables_of_another_trainer_are_opened() -> None:
    told = problems(MINIMAL + "[optimizer]\nname = 'AdamW'\nlr = 1\n[training]\nlocal_batch_size = 4\nlr = 5\n")
    assert [problem.split(": ")[1] for problem in told] == [
        "optimizer",
        "optimizer.name",
        "training",
        "training.local_batch_size",
    ]


def test_a_key_in_the_wrong_table_is_sent_to_its_own() -> None:
    assert "there is data.seq_len" in one(changed("lr = 3e-4", "lr = 1\nseq_len = 4"))
    assert "above the first [table]" in one(changed('dir = "outputs/x"', 'dir = "x"\nseed = 5'))


@pytest.mark.parametrize("foreign", FOREIGN)
def test_every_foreign_name_is_foreign_and_points_at_a_key(foreign: str) -> None:
    ours, hint = FOREIGN[foreign]
    assert ours in keys() if ours else hint
    assert foreign not in keys()
    assert foreign == foreign.lower()
    assert not any(
        f"{table}." in hint and name not in keys() for table in ("train", "data") for name in _named(hint, table)
    )


def _named(hint: str, table: str) -> list[str]:
    return [word.strip(",;:()") for word in hint.split() if word.startswith(f"{table}.")]


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("tensor_parallel_size = 2", "use parallel.tp"),
        ("context_parallel_size = 2", "use parallel.cp"),
        ("data_parallel_shard_degree = -1", "use parallel.dp_shard"),
        ("data_parallel_replicate_degree = 2", "use parallel.dp_replicate"),
        ("fsdp = true", "use parallel.dp_shard"),
        ("num_processes = 8", "cheaptrain launch --processes"),
        ("num_nodes = 2", "cheaptrain launch --nodes"),
        ("gradient_accumulation_steps = 4", "use train.global_batch_tokens"),
        ("async_save = true", "use checkpoint.asynchronous"),
        ('time_limit = "1d"', "use run.max_time"),
        ("[parallelism]\ntensor_parallel_degree = 2", "use [parallel]"),
        ('[environment]\nNCCL_DEBUG = "INFO"', "use [env]"),
    ],
)
def test_who_comes_with_many_processes_finds_no_name_of_theirs(written: str, ours: str) -> None:
    assert any(
        ours in problem for problem in problems(f"{written}\n{MINIMAL}" if "[" not in written else MINIMAL + written)
    )


def test_at_least_sixty_foreign_names() -> None:
    assert len(FOREIGN) >= 60


def test_an_inherited_mistake_names_the_parents_line() -> None:
    base = changed("lr = 3e-4", "lr = 0")
    Path("base.toml").write_text(base)
    assert one('extends = "base.toml"\n[train]\neps = 1e-9\n').startswith(
        f"base.toml:{line_of(base, 'lr =')}: train.lr: "
    )


def test_a_second_length_tells_how_to_drop_the_inherited_one() -> None:
    Path("base.toml").write_text(MINIMAL)
    told = one('extends = "base.toml"\n[train]\nsteps = 5\n')
    assert told.startswith("recipe.toml:3: train: give exactly one of tokens, steps")
    assert f"train.tokens in base.toml:{line_of(MINIMAL, 'tokens =')}" in told
    assert 'put unset = ["train.tokens"] at the top of recipe.toml' in told
    told = one(MINIMAL, "train.steps=5")
    assert told.startswith("command line: train: ") and "train.tokens=unset" in told
    both = one(changed("lr = 3e-4", "lr = 1\nsteps = 5"))
    assert "unset" not in both, "nothing is inherited there"


def test_a_source_that_changes_its_origin_tells_what_to_drop() -> None:
    Path("base.toml").write_text(MINIMAL)
    told = one('extends = "base.toml"\n[[data.sources]]\nname = "wiki"\nfiles = "x"\n')
    assert told.startswith("recipe.toml:4: data.sources.wiki: ")
    assert 'unset = ["data.sources.wiki.hub"]' in told


def test_a_source_given_twice_in_one_file_is_refused() -> None:
    text = changed('name = "wiki"', 'name = "web"')
    told = one(text)
    assert "two sources are called 'web'" in told
    assert f"recipe.toml:{line_of(text, '[[data.sources]]', 1)}" in told
    assert told.startswith(f"recipe.toml:{line_of(text, '[[data.sources]]', 2)}")


def test_what_does_not_go_together_is_shown_beside_wrong_values() -> None:
    told = problems(changed("lr = 3e-4", 'lr = "x"\nsteps = 5\nschedule = "cosin"\ndecay = "5%"'))
    assert [problem.split(": ")[1] for problem in told] == ["train.lr", "train", "train.schedule"]
    assert "got tokens and steps" in told[1]
    assert "decay" not in "".join(told), "whether decay fits is unknown while the schedule is"


def test_a_tokenizer_trained_on_what_is_not_there() -> None:
    trained = '[tokenizer.train]\nvocab_size = 500\nsources = ["web", "wikki"]'
    told = one(changed('path = "gpt2"', trained))
    assert "no [[data.sources]] is called 'wikki'; there are web, wiki" in told


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=3", "train.lrr: unknown key; did you mean train.lr?"),
        ("learning_rate=3", "learning_rate: unknown key; use train.lr"),
        ("train.learning_rate=3", "use train.lr"),
        ("data.sources.wikki.weight=3", "no [[data.sources]] is called 'wikki'; did you mean wiki?"),
        ("data.sources.wiki.wieght=3", "did you mean weight in [[data.sources]]?"),
        ("train.lr", "write key=value"),
        ("train.lr=abc", 'expected a number, not the text "abc"'),
        ("train.lr=", "expected a number"),
        ("train.steps=unset", "nothing sets it"),
        ("train.foo=unset", "unknown key"),
        ("train.lr.x=3", "unknown key"),
        ("train=3", "its keys stand under [train]"),
        ("log.trackers=wandb", 'write ["wandb"]'),
        ("extends=other.toml", "unknown key"),
        ("train.lr=3 # not 4", "expected a number"),
        ("train.lr=3,", "expected a number"),
        ("train.lr=3\nseed = 4", "expected a number"),
        ("run.dir.x=3", "unknown key"),
    ],
)
def test_wrong_overrides(override: str, said: str) -> None:
    told = one(MINIMAL, override)
    assert told.startswith("command line: ")
    assert said in told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tokens = 10B", "write it in quotes"),
        ("warmup = 1%", "write it in quotes"),
        ("flag = True", "write true or false"),
        ("x = None", "TOML has no null"),
        ("x = .5", "a number begins with a digit"),
        ("x = outputs/run", "text stands in quotes"),
        ("x: 1", "by ="),
        ("[train", "table declaration"),
    ],
)
def test_broken_toml_is_shown_with_its_line_and_a_hint(line: str, said: str) -> None:
    told = one(f"[run]\n{line}\n")
    assert told.startswith("recipe.toml:2: not valid TOML, column ")
    assert line in told and said in told


def test_a_key_given_twice() -> None:
    assert one("[run]\ndir = 'a'\ndir = 'b'\n").startswith("recipe.toml:3: not valid TOML, column")


def test_what_is_not_text_is_named() -> None:
    Path("bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeProblems, match=r"bytes\.toml:1: not UTF-8 text"):
        load_recipe("bytes.toml")
    Path("folder").mkdir()
    with pytest.raises(RecipeProblems, match="cannot read folder"):
        load_recipe("folder")


@pytest.mark.parametrize(
    "text",
    [f"seed = {'1' * 5000}\n", f"seed = {'[' * 999}{']' * 999}\n", f"{'.'.join('a' * 2000)} = 1\n"],
)
def test_what_the_toml_reader_gives_up_on_is_no_traceback(text: str) -> None:
    assert one(text + MINIMAL).startswith("recipe.toml:1: cannot be read as TOML: ")
    value = text.partition("= ")[2].strip()
    if not text.startswith("a"):
        assert one(MINIMAL, f"seed={value}").startswith("command line: seed: expected a whole number")


def test_a_dotted_key_in_quotes_is_told_to_lose_them() -> None:
    told = one(f'"train.lr" = 3e-4\n{MINIMAL}')
    assert told == (
        "recipe.toml:1: train.lr: unknown key: in quotes it is one name with a dot in it; write train.lr without quotes"
    )


@pytest.mark.parametrize("key", ["files", "data_files", "packages", "tokens"])
def test_an_empty_list_stands_for_everything_or_nothing(key: str) -> None:
    new = f'hub = "a/b"\n{key} = []' if key == "data_files" else f"{key} = []"
    assert f"{key} is an empty list" in one(changed('files = "web.jsonl"', new))


def test_a_name_too_long_for_a_folder_fails_in_preparing() -> None:
    assert "must have at most 100 characters, not 101" in one(changed('"web"', f'"{"w" * 101}"'))


def test_a_very_long_key_fills_the_screen() -> None:
    assert len(one(f"{'x' * 100_000} = 1\n{MINIMAL}")) < 600


@pytest.mark.parametrize("override", ["run.dir=", "data.dir=${env:HOLLOW}/data", "run.dir=a\0b", "run.dir=\udcff"])
def test_a_path_that_is_empty_or_no_text_is_used(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLLOW", "")
    assert one(MINIMAL, override).startswith("command line: ")
    one(MINIMAL, override).encode()


def test_a_name_that_no_file_can_have_ends_in_a_traceback() -> None:
    assert "extends: expected text" in one(f'extends = "a\\u0000b"\n{MINIMAL}')
    for path in ("a\0b.toml", "\udcff.toml"):
        with pytest.raises(RecipeError, match="not UTF-8 text"):
            load_recipe(path)


def test_many_problems_are_one_readable_text() -> None:
    with pytest.raises(RecipeProblems) as caught:
        load_text(Path(), changed("lr = 3e-4", "lrr = 3e-4\nsteps = 0"))
    lines = str(caught.value).split("\n")
    assert lines[0] == "recipe.toml: 2 problems"
    assert all(line.startswith("  recipe.toml:") for line in lines[1:])
