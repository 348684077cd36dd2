"""Recipes that extend others, overrides, variables in paths, and where each value came from."""

import json
from pathlib import Path

import pytest
from recipe_texts import MINIMAL, line_of, load_text

from cheaptrain.recipe.errors import RecipeProblems
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.quantities import Span
from cheaptrain.recipe.schema import Recipe


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run inside the folder of the recipes, so that messages name them by their file alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(MINIMAL)
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return path


def test_a_recipe_is_typed_and_knows_where_each_value_was_written() -> None:
    loaded = load_recipe("base.toml")
    assert loaded.recipe.train.tokens == 1_000_000
    assert loaded.recipe.train.betas == (0.9, 0.95)
    assert loaded.name == "base"
    assert loaded.provenance["train.lr"] == f"base.toml:{line_of(MINIMAL, 'lr =')}"
    assert loaded.provenance["data.sources.wiki.hub"] == f"base.toml:{line_of(MINIMAL, 'hub =')}"
    assert loaded.provenance["train.betas"] == "default"
    assert loaded.provenance["log.every"] == "default"
    json.dumps(loaded.provenance)


def test_a_recipe_survives_json() -> None:
    recipe = load_recipe("base.toml", ["train.warmup=0.1%", "train.epochs=1", "train.tokens=unset"]).recipe
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_extending_changes_what_it_says_and_nothing_else() -> None:
    write(
        "deep/child.toml",
        'extends = "../base.toml"\n[train]\nlr = 1e-3\n[[data.sources]]\nname = "wiki"\nweight = 5\n'
        '[[data.sources]]\nname = "math"\nweight = 1\ndrills = { documents = "2k" }\n',
    )
    loaded = load_recipe("deep/child.toml")
    base = load_recipe("base.toml").recipe
    assert loaded.files == ("base.toml", "deep/child.toml")
    assert [(s.name, s.weight, s.kind) for s in loaded.recipe.data.sources] == [
        ("web", 70, "files"),
        ("wiki", 5, "hub"),
        ("math", 1, "drills"),
    ]
    assert loaded.recipe.train == base.train.model_copy(update={"lr": 1e-3})
    assert loaded.provenance["data.sources.wiki.weight"] == "deep/child.toml:6"
    assert loaded.provenance["data.sources.wiki.hub"] == f"base.toml:{line_of(MINIMAL, 'hub =')}"
    assert loaded.provenance["data.sources.math.drills.documents"] == "deep/child.toml:10"


def test_the_second_parent_of_a_diamond_does_not_undo_the_first() -> None:
    write("a.toml", 'extends = "base.toml"\n[train]\nlr = 1.0\nweight_decay = 0.5\n')
    write("b.toml", 'extends = "base.toml"\n[train]\nweight_decay = 0.25\n')
    write("child.toml", 'extends = ["a.toml", "b.toml"]\n')
    loaded = load_recipe("child.toml")
    assert loaded.files == ("base.toml", "a.toml", "b.toml", "child.toml")
    assert (loaded.recipe.train.lr, loaded.recipe.train.weight_decay) == (1.0, 0.25)


def test_a_circle_is_named_and_not_followed() -> None:
    write("a.toml", '\nextends = "b.toml"\n')
    write("b.toml", 'extends = ["base.toml",\n  "a.toml"]\n')
    with pytest.raises(RecipeProblems) as caught:
        load_recipe("a.toml")
    assert str(caught.value).startswith("b.toml:2: extends: ")
    assert "a.toml -> b.toml -> a.toml" in str(caught.value)


def test_missing_parents_are_all_named_with_who_asked() -> None:
    write("a.toml", 'extends = ["no.toml", "base.toml",\n"nor/this.toml"]\n')
    with pytest.raises(RecipeProblems) as caught:
        load_recipe("a.toml")
    told = [str(problem) for problem in caught.value.problems]
    assert told[0].startswith("a.toml:1: extends: no.toml does not exist")
    assert told[1].startswith("a.toml:2: extends: nor/this.toml does not exist")
    with pytest.raises(RecipeProblems, match=r"nothing\.toml does not exist"):
        load_recipe("nothing.toml")


def test_a_key_can_be_unset() -> None:
    write("a.toml", 'extends = "base.toml"\nunset = ["train.tokens", "data.sources.web"]\n[train]\nsteps = 7\n')
    recipe = load_recipe("a.toml").recipe
    assert (recipe.train.tokens, recipe.train.steps) == (None, 7)
    assert [source.name for source in recipe.data.sources] == ["wiki"]


def test_a_source_can_be_made_anew() -> None:
    write(
        "a.toml",
        'extends = "base.toml"\nunset = ["data.sources"]\n[[data.sources]]\nname = "web"\nweight = 1\nhub = "x"\n',
    )
    (source,) = load_recipe("a.toml").recipe.data.sources
    assert (source.hub, source.files) == ("x", None)


def test_both_arms_of_a_diamond_may_unset_the_same_key() -> None:
    write("a.toml", 'extends = "base.toml"\nunset = "train.tokens"\n')
    write("b.toml", 'extends = "base.toml"\nunset = "train.tokens"\n[train]\nepochs = 2\n')
    write("child.toml", 'extends = ["a.toml", "b.toml"]\n')
    assert load_recipe("child.toml").recipe.train.epochs == 2


def test_unsetting_what_nobody_set_is_an_error() -> None:
    write("a.toml", 'extends = "base.toml"\nunset = ["train.steps",\n  "train.lrr"]\n')
    with pytest.raises(RecipeProblems) as caught:
        load_recipe("a.toml")
    assert [str(problem.origin) for problem in caught.value.problems] == ["a.toml:2", "a.toml:3"]


def test_lists_without_names_are_replaced() -> None:
    write("a.toml", 'extends = "base.toml"\n[samples]\nprompts = ["one", "two"]\n')
    write("b.toml", 'extends = "a.toml"\n[samples]\nprompts = ["three"]\n')
    assert load_recipe("b.toml").recipe.samples.prompts == ["three"]


def test_names_with_dots_are_found() -> None:
    text = MINIMAL.replace('"wiki"', '"wiki-1.0"')
    write("base.toml", text)
    write("a.toml", 'extends = "base.toml"\nunset = ["data.sources.wiki-1.0.weight"]\n')
    recipe = load_recipe("a.toml", ["data.sources.wiki-1.0.weight=3"]).recipe
    assert recipe.data.sources[1].weight == 3


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.lr=3e-4", lambda r: r.train.lr == 3e-4),
        ("train.lr=.5", lambda r: r.train.lr == 0.5),
        ("train.lr=1", lambda r: r.train.lr == 1.0 and isinstance(r.train.lr, float)),
        ("train.tokens=2B", lambda r: r.train.tokens == 2_000_000_000),
        ("train.tokens=2_000", lambda r: r.train.tokens == 2000),
        ("train.micro_batch_size=8", lambda r: r.train.micro_batch_size == 8),
        ("train.warmup=1%", lambda r: r.train.warmup == Span(1, "%")),
        ("train.warmup=20 steps", lambda r: r.train.warmup == Span(20, "steps")),
        ("train.warmup=0", lambda r: r.train.warmup == Span(0, "steps")),
        ("train.activation_checkpointing=true", lambda r: r.train.activation_checkpointing is True),
        ("train.betas=[0.8, 0.9]", lambda r: r.train.betas == (0.8, 0.9)),
        ("train.schedule=cosine", lambda r: r.train.schedule == "cosine"),
        ("run.dir=outputs/a b", lambda r: r.run.dir == "outputs/a b"),
        ("run.dir=a=b", lambda r: r.run.dir == "a=b"),
        ('run.dir="quoted"', lambda r: r.run.dir == "quoted"),
        ("tokenizer.revision=123456", lambda r: r.tokenizer.revision == "123456"),
        ("tokenizer.revision=true", lambda r: r.tokenizer.revision == "true"),
        ('log.trackers=["wandb"]', lambda r: r.log.trackers == ["wandb"]),
        ("data.sources.wiki.weight=5", lambda r: r.data.sources[1].weight == 5.0),
        ('data.sources.web.files=["a","b"]', lambda r: r.data.sources[0].files == ["a", "b"]),
        ("data.sources.web.files=a/*.txt", lambda r: r.data.sources[0].files == "a/*.txt"),
        ("data.sources.web={weight=2, column='c'}", lambda r: r.data.sources[0].column == "c"),
        ("model.overrides.num_hidden_layers=3", lambda r: r.model.overrides == {"num_hidden_layers": 3}),
        ("model.overrides.hidden_act=silu", lambda r: r.model.overrides == {"hidden_act": "silu"}),
        ("model.overrides.rope.theta=1e6", lambda r: r.model.overrides == {"rope": {"theta": 1e6}}),
        ("seed=5", lambda r: r.seed == 5),
        ("parallel.dp_shard=4", lambda r: r.parallel.dp_shard == 4),
        ("parallel.dp_shard=auto", lambda r: r.parallel.dp_shard == "auto"),
        ("parallel.step_timeout=1h 30min", lambda r: r.parallel.step_timeout == 5400.0),
        ("run.max_time=5400", lambda r: r.run.max_time == 5400.0),
        ("run.max_time=23h 45min", lambda r: r.run.max_time == 85_500.0),
        ("run.allow_batch_change=true", lambda r: r.run.allow_batch_change is True),
        ("checkpoint.asynchronous=false", lambda r: r.checkpoint.asynchronous is False),
        ("env.NCCL_IB_DISABLE=1", lambda r: r.env == {"NCCL_IB_DISABLE": "1"}),  # the shell has taken the quotes
        ('env.NCCL_IB_DISABLE="1"', lambda r: r.env == {"NCCL_IB_DISABLE": "1"}),
        ("env.NCCL_SOCKET_IFNAME=eth0,eth1", lambda r: r.env == {"NCCL_SOCKET_IFNAME": "eth0,eth1"}),
        ("env.NCCL_DEBUG_FILE=/tmp/a=b", lambda r: r.env == {"NCCL_DEBUG_FILE": "/tmp/a=b"}),
        ("env.X=true", lambda r: r.env == {"X": "true"}),
        ("env.X=[1]", lambda r: r.env == {"X": "[1]"}),
        ("env.X=", lambda r: r.env == {"X": ""}),
        ('env={A="1", B="x"}', lambda r: r.env == {"A": "1", "B": "x"}),
    ],
)
def test_an_override_is_read_as_the_type_of_its_key(override: str, read: object) -> None:
    loaded = load_recipe("base.toml", [override])
    assert callable(read) and read(loaded.recipe)
    key = override.partition("=")[0]
    changed = [name for name, origin in loaded.provenance.items() if origin == "command line"]
    assert changed and all(name.startswith(key) for name in changed)


def test_overrides_come_last_and_in_order() -> None:
    write("a.toml", 'extends = "base.toml"\n[train]\nlr = 1e-3\n')
    assert load_recipe("a.toml", ["train.lr=2", "train.lr=3"]).recipe.train.lr == 3.0
    recipe = load_recipe("a.toml", ["train.tokens=unset", "train.steps=9"]).recipe
    assert (recipe.train.tokens, recipe.train.steps) == (None, 9)


def test_variables_are_expanded_in_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/big")
    text = MINIMAL.replace('"outputs/x"', '"${env:SCRATCH}/x"').replace('"web.jsonl"', '["${env:SCRATCH}/a", "b"]')
    recipe = load_text(Path(), text).recipe
    assert recipe.run.dir == "/big/x"
    assert recipe.data.sources[0].files == ["/big/a", "b"]
    assert load_recipe("base.toml", ["data.dir=${env:SCRATCH}/d"]).recipe.data.dir == "/big/d"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(RecipeProblems) as caught:
        load_text(Path(), text, "log.project=${env:USER}", "data.dir=${SCRATCH}", "tokenizer.path=~/tok")
    told = "\n".join(str(problem) for problem in caught.value.problems)
    assert told.count("the environment variable SCRATCH is not set") == 2
    assert "log.project: ${env:NAME} is expanded in paths only" in told
    assert "data.dir: '${SCRATCH}': a variable is written ${env:NAME}" in told
    assert "tokenizer.path: '~/tok': ~ is not expanded" in told


def test_a_file_of_an_editor_that_writes_a_byte_order_mark_is_read() -> None:
    Path("bom.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe("bom.toml").provenance["train.lr"] == f"bom.toml:{line_of(MINIMAL, 'lr =')}"
