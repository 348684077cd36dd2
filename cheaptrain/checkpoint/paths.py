"""Where everything of one run lies: one folder, named once, here.

`checkpoints/` holds folders called `step-000200` and nothing else that looks like one. Whatever is being written,
deleted or set aside has another kind of name (`.writing-…`, `.deleting-…`, `step-000200.bad-1`), so a reader that
goes by the name alone never takes a half-made folder for a checkpoint.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_STEP_FOLDER = re.compile(r"step-(\d{6,})")
WRITING = ".writing-"
DELETING = ".deleting-"
SHARED = ".shared-"
STACKS = "stacks"  # in the run folder: where each process stood when the job hung
_TEMPORARY_FILES = (".recipe.json-", ".launch.json-", ".metrics.jsonl-", ".samples.jsonl-", ".final-", SHARED)


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint folder is named for; None when it is not named like one."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run; nothing is created or read here."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def launch(self) -> Path:
        """What the last launch set out to do, and how it ended; without an end it runs, or was killed."""
        return self.path / "launch.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def final(self) -> Path:
        """A relative link to the checkpoint that the finished run ended with."""
        return self.path / "final"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def step(self, step: int) -> Path:
        """Folder of the checkpoint of `step`, whether or not it is there."""
        return self.checkpoints / f"step-{step:06d}"

    def steps(self) -> list[Path]:
        """Folders named like checkpoints, oldest first. Their content is not looked at."""
        if not self.checkpoints.is_dir():
            return []
        named = [(step_of(folder), folder) for folder in self.checkpoints.iterdir() if folder.is_dir()]
        return [folder for step, folder in sorted((step, folder) for step, folder in named if step is not None)]

    def leftovers(self) -> list[Path]:
        """What a dead process was writing or deleting: files and links in the run folder, folders in checkpoints/."""
        found = [p for p in self.path.glob(".*-*") if p.name.startswith(_TEMPORARY_FILES)] if self.path.is_dir() else []
        if self.checkpoints.is_dir():
            found += [p for p in self.checkpoints.iterdir() if p.name.startswith((WRITING, DELETING))]
        return sorted(found)
