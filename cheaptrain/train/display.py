"""What a person watching sees: one live line in a terminal, one plain line now and then when the output goes to a file.

The plain lines come at most every few seconds, so that a log of a week stays readable; metrics.jsonl has every step.
"""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cheaptrain.say import say
from cheaptrain.units import duration, human

PLAIN_EVERY_SECONDS = 10.0


class Display:
    """Progress of one stage; `console.print` above it stays readable."""

    def __init__(self, console: Console, name: str, steps: int, start: int) -> None:
        self.console = console
        self.steps = steps
        self.last_plain = 0.0
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"),
            console=console, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task(name, total=steps, completed=start, line="")
        self.live = console.is_terminal
        if self.live:
            self.progress.start()

    def step(self, step: int, values: dict[str, Any], seconds_left: float) -> None:
        """Show the state after `step`; `values` are the metrics just written."""
        line = _line(step, self.steps, values, seconds_left)
        if self.live:
            self.progress.update(self.task, completed=step, line=line)
        elif time.monotonic() - self.last_plain >= PLAIN_EVERY_SECONDS or step == self.steps:
            say(self.console, line)
            self.last_plain = time.monotonic()

    def close(self) -> None:
        """Take the live line away."""
        if self.live:
            self.progress.stop()


def _line(step: int, steps: int, values: dict[str, Any], seconds_left: float) -> str:
    parts = [
        f"step {step:,}/{steps:,}",
        f"loss {values['train/loss']:.4f}",
        f"lr {values['train/learning_rate']:.2e}",
        f"norm {values['train/grad_norm']:.2f}",
        f"{human(values['train/tokens'])} tokens",
        f"{human(values['train/tokens_per_second'])} tok/s",
    ]
    if "train/mfu" in values:
        parts.append(f"{values['train/mfu']:.1%} MFU")
    return "  ".join([*parts, f"{duration(seconds_left)} left"])
