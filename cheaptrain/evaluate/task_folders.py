"""Where the task files that come with the package lie: give these folders to lm-eval's `include_path`.

    TaskManager(include_path=[str(folder) for folder in task_folders()], metadata={...})
    lm_eval run --include_path "$(python -m cheaptrain.evaluate.task_folders)" --tasks core …

What a task needs and cannot know is handed to it as lm-eval `metadata`: `core` (folder of the CORE bundle), `core_rows`
(so many of its questions at all), `gsm8k` (folder or file; else the hub), `held_out` (name → file) and
`held_out_documents`. docs/tasks.md says what each asks. A task file says of itself, in its own metadata, whether it is
asked in a chat template, what guessing gives, and whether it is only shown.
"""

from pathlib import Path


def task_folders() -> list[Path]:
    """The folders of task files of this package."""
    return [Path(__file__).parent / "tasks"]


if __name__ == "__main__":
    for folder in task_folders():
        print(folder)
