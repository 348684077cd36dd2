"""The one door to training.

    cheaptrain launch RECIPE [RECIPE …] [key=value …]                    on all GPUs, or what [parallel] says
    accelerate launch launch/run.py RECIPE [RECIPE …] [key=value …]      what it runs

Several recipes run one after the other; overrides apply to all of them. Training makes no call to the hub: what it
needs was fetched by `cheaptrain prepare`.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from cheaptrain.errors import RecipeError
from cheaptrain.exits import guarded


def main() -> None:
    """Load every recipe, then run them in order."""
    from cheaptrain.launching import apply_environment
    from cheaptrain.recipe.load import load_recipes
    from cheaptrain.recipe.overrides import split_arguments

    paths, overrides = split_arguments(sys.argv[1:])
    if not paths or any(path.startswith("-") for path in paths):
        raise RecipeError("usage: accelerate launch launch/run.py RECIPE [RECIPE …] [key=value …]")
    apply_environment(load_recipes(paths, overrides))
    from cheaptrain.train.chain import run_chain  # torch comes with it, after the environment

    run_chain(paths, overrides)


if __name__ == "__main__":
    guarded(main)
