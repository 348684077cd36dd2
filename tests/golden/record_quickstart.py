"""Record the golden curve of the quickstart: `python tests/golden/record_quickstart.py` in the repository's root.

Runs the shipped recipes as they are, in a scratch folder. A changed golden file is a visible act: say why in the
commit.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from cheaptrain.checkpoint.jsonl import read_records
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.recipe.load import LoadedRecipe, load_recipe
from cheaptrain.train.chain import run_chain
from cheaptrain.train.survey import survey

ROOT = Path(__file__).parents[2]
STAGES = ("teacher", "phase1", "phase2", "midtrain", "sft_general", "sft_reasoning")
RECIPES = {stage: ROOT / "recipes" / "quickstart" / f"{stage}.toml" for stage in STAGES}
GOLDEN = Path(__file__).parent / "quickstart.json"


def prepared_phase1() -> tuple[LoadedRecipe, dict[str, str]]:
    """Prepare phase 1 in the working directory; the recipe and the hash of every source."""
    loaded = load_recipe(RECIPES["phase1"])
    prepare_recipe(loaded.recipe, console=Console(quiet=True))
    return loaded, {name: manifest.fingerprint for name, manifest in survey(loaded, 1).manifests.items()}


def prepare_sft() -> None:
    """Prepare the conversations of the last stages."""
    for stage in ("sft_general", "sft_reasoning"):
        prepare_recipe(load_recipe(RECIPES[stage]).recipe, console=Console(quiet=True))


def curve(run: Path) -> dict[str, list[Any]]:
    """Training and validation losses of a run, as [step, loss]."""
    records = read_records(run / "metrics.jsonl")
    return {
        key: [[record["step"], round(record[key], 5)] for record in records if key in record]
        for key in ("train/loss", "val/loss", "val/bpb")
    }


def main() -> None:
    """Run all stages and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _, data = prepared_phase1()
        prepare_sft()
        run_chain([str(path) for path in RECIPES.values()], [])
        stages = {stage: curve(Path("outputs/quickstart") / stage) for stage in STAGES}
    GOLDEN.write_text(json.dumps({"data": data, **stages}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
