"""The table of a recipe that says what a model is examined in: tasks of lm-eval, at the end and while it trains."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from cheaptrain.recipe.quantities import EveryField
from cheaptrain.recipe.section import Clash, Section, operational

ALL_TASKS = "all"  # in `shots`: every task that is not named there


class Eval(Section):
    """Tasks of lm-eval: scored on the last checkpoint, a light set of them also while training."""

    tasks: list[str] = operational(
        [], "scored on the last checkpoint, from disk: names of lm-eval, of cheaptrain, or in task_folder"
    )
    task_folder: str | None = operational(None, "folder of lm-eval task files (*.yaml) besides", path=True)
    data_folder: str | None = operational(
        None,
        "where data_files of task_folder count from; default: task_folder, the folder around it, or the current one",
        path=True,
    )
    metadata: dict[str, Any] = operational({}, 'handed to the tasks, e.g. core = "data/bench/core"')
    shots: dict[str, Annotated[int, Field(ge=0)]] = operational(
        {}, "worked examples by task, or for all = …; default: as its file says"
    )
    limit: Annotated[int, Field(ge=1)] | None = operational(None, "only the first so many questions of each task")
    batch_size: Annotated[int, Field(ge=1)] = operational(16, "requests a process runs at once")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = operational(
        "auto", "of the weights; auto: as saved on a GPU, float32 on a CPU"
    )
    chat_template: bool | None = operational(
        None, "ask in the chat template; default: as the task's metadata.chat_template says, else no"
    )
    system: str | None = operational(None, "system turn, or text before each prompt")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = operational(1234, "draws the worked examples")
    light: list[str] = operational([], "tasks scored while training")
    every: EveryField | None = operational(None, "how often light is scored; default: with every checkpoint")
    light_limit: Annotated[int, Field(ge=1)] | None = operational(None, "limit of light; default: limit")

    def clashes(self) -> Iterator[Clash]:
        for key in self._given("every", "light_limit"):
            if not self.light:
                yield Clash(f"{key} is for the tasks in light, and there is none", (key, "light"))
        for key in ("tasks", "light"):
            names = getattr(self, key)
            if twice := sorted({name for name in names if names.count(name) > 1}):
                yield Clash(f"{twice[0]!r} stands twice", (key,))
        if self.data_folder is not None and self.task_folder is None:
            yield Clash("data_folder goes with task_folder", ("data_folder",))
