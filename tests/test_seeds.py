"""Seeds that share a folder, or start from each other's weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_runs import recipe_table, write_recipe
from typer.testing import CliRunner

from cheaptrain import launching
from cheaptrain.cli import app
from cheaptrain.errors import RecipeError
from cheaptrain.recipe.identity import identity, identity_difference
from cheaptrain.recipe.load import load_recipe, load_recipes
from cheaptrain.recipe.seeds import parse_seeds, seeded_recipes
from cheaptrain.report.subjects import subjects_of

ROOT = Path(__file__).parent.parent


def chain(folder: Path) -> list[str]:
    """base → distill (taught by the teacher) → sft, and what starts from somebody else's weights."""
    tables = {name: recipe_table(folder, name) for name in ("base", "teacher", "distilled", "other")}
    tables["distilled"]["model"] = {"init_from": str(folder / "base" / "final")}
    tables["distilled"]["distill"] = {"teacher": str(folder / "teacher" / "checkpoints" / "step-000004")}
    tables["distilled"]["train"]["objective"] = "distill"
    tables["other"]["model"] = {"init_from": str(folder / "base-of-others" / "final")}
    return [write_recipe(folder / f"{name}.toml", table) for name, table in tables.items()]


def test_a_seed_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    for seed in (1, 22):
        written = seeded_recipes(paths, ["train.lr=1e-4"], seed)
        assert written == [
            str(tmp_path / f"{name}-seed{seed}.toml") for name in ("base", "teacher", "distilled", "other")
        ]
        recipes = [loaded.recipe for loaded in load_recipes(written)]
        base, _, distilled, other = recipes
        assert [recipe.seed for recipe in recipes] == [seed] * 4
        assert base.run.dir == str(tmp_path / f"base-seed{seed}")
        assert distilled.model.init_from == str(tmp_path / f"base-seed{seed}" / "final")
        assert distilled.distill is not None
        assert distilled.distill.teacher == str(tmp_path / f"teacher-seed{seed}" / "checkpoints" / "step-000004")
        assert other.model.init_from == str(tmp_path / "base-of-others" / "final")
        plain = load_recipe(paths[0]).recipe
        assert identity_difference(identity(plain), identity(base)) == [f"seed: 11 -> {seed}"]
    again = [Path(path).stat().st_mtime_ns for path in written]
    assert seeded_recipes(paths, [], 22) == written and [Path(path).stat().st_mtime_ns for path in written] == again
    (subject,) = subjects_of([written[0]])
    assert subject.run.path == tmp_path / "base-seed22"


def test_a_later_stage_by_itself_starts_from_the_weights_without_a_seed(tmp_path: Path) -> None:
    base, teacher, distilled, _ = chain(tmp_path)
    seeded_recipes([base, teacher], [], 3)
    (alone,) = seeded_recipes([distilled], [], 3)
    recipe = load_recipe(alone).recipe
    assert recipe.model.init_from == str(tmp_path / "base-seed3" / "final")
    assert recipe.distill is not None
    assert recipe.distill.teacher == str(tmp_path / "teacher-seed3" / "checkpoints" / "step-000004")
    (common,) = seeded_recipes([distilled], [], 4)  # nothing was made with seed 4: all its seeds share one beginning
    assert load_recipe(common).recipe.model.init_from == str(tmp_path / "base" / "final")


@pytest.mark.parametrize("text", ["", "1,", "1,1", "1,01", "a", "-1", "1.5", "1;2"])
def test_seeds_that_are_none_are_taken(text: str) -> None:
    with pytest.raises(RecipeError, match=r"write different whole numbers .* --seeds 1,2,3"):
        parse_seeds(text)


def test_overrides_undo_what_makes_seeds_different(tmp_path: Path) -> None:
    assert parse_seeds("1, 2,10") == [1, 2, 10]
    for override in ("seed=4", "run.dir=x", "model.init_from=y", "distill.teacher=z", "tokenizer.path=gpt2"):
        with pytest.raises(RecipeError, match=rf"--seeds says {override.partition('=')[0]} for each seed: leave"):
            seeded_recipes(chain(tmp_path), [override], 1)


def test_a_seed_after_one_that_failed_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[list[str], list[str]]] = []

    def launch(paths: Sequence[str], overrides: Sequence[str], *_: Any, **__: Any) -> int:
        launched.append(([Path(path).name for path in paths], list(overrides)))
        return 4 if "base-seed2.toml" in launched[-1][0] else 0

    monkeypatch.setattr(launching, "launch", launch)
    paths = chain(tmp_path)[:1]
    result = CliRunner().invoke(app, ["launch", *paths, "train.lr=1e-4", "--seeds", "1,2,3"])
    assert result.exit_code == 4
    assert launched == [([f"base-seed{seed}.toml"], ["train.lr=1e-4"]) for seed in (1, 2)]
    launched.clear()
    assert CliRunner().invoke(app, ["chain", *paths, "--seeds", "1,3"]).exit_code == 0
    assert [names for names, _ in launched] == [["base-seed1.toml"], ["base-seed3.toml"]]
    launched.clear()
    assert CliRunner().invoke(app, ["launch", *paths]).exit_code == 0
    assert launched == [(["base.toml"], [])]


@pytest.mark.parametrize("scale", ["", "small/", "10b/"])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "gsm8k"])
def test_the_conditions_differ_in_more_than_their_tokens(
    scale: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    folder = f"recipes/domain-tokens/{scale}"
    baseline, mul = (load_recipe(f"{folder}{name}/{stage}.toml").recipe for name in ("baseline", "mul"))
    allowed = ("data.transform", "tokenizer.add_tokens", "model.init_from")
    lines = identity_difference(identity(baseline), identity(mul))
    assert [line for line in lines if not line.startswith(allowed)] == []
    assert any(line.startswith("tokenizer.add_tokens: not set") for line in lines)
    if stage != "pretrain":
        earlier = {"sft": "pretrain", "gsm8k": "sft"}[stage]
        for name, recipe in (("baseline", baseline), ("mul", mul)):
            before = load_recipe(f"{folder}{name}/{earlier}.toml").recipe
            assert recipe.model.init_from == f"{before.run.dir}/final"
    reads = [source.drills for source in mul.data.sources if source.drills is not None]
    assert all(drills.kind == "table" or drills.without_probes for drills in reads)
