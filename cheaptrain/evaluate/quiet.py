"""lm-eval, datasets and transformers kept from talking over a run: no bars, and what they warn of is counted.

Their bars write over a display that is being drawn, and their warnings come once an item, ten thousand times. What
matters in them must not be lost, though: how many prompts were cut is a number that belongs beside the score.
"""

import contextlib
import io
import logging
import re
from collections import Counter
from collections.abc import Iterator

import datasets
from tqdm import tqdm

_LOGGERS = ("lm_eval", "lm-eval", "datasets", "transformers")
_CUT = re.compile(r"exceeds model's maximum length|Left truncation applied")


class Told(logging.Handler):
    """What was logged: `warnings` by their text, and how many prompts did not fit the model (`cut`)."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: Counter[str] = Counter()
        self.cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Take in one record."""
        text = record.getMessage()
        if _CUT.search(text):
            self.cut += 1
        else:
            self.warnings[" ".join(text.split())] += 1


@contextlib.contextmanager
def quiet() -> Iterator[Told]:
    """Within the block nothing of it reaches the terminal; what was told is in what the block is given."""
    told = Told()
    plain = tqdm.__init__
    bars = datasets.are_progress_bars_disabled()
    before = {}

    def without_bar(self: tqdm, *arguments: object, **options: object) -> None:
        plain(self, *arguments, **{**options, "disable": True})  # type: ignore[arg-type]

    for name in _LOGGERS:
        logger = logging.getLogger(name)
        before[name] = (logger.handlers[:], logger.propagate)
        logger.handlers, logger.propagate = [told], False
    tqdm.__init__ = without_bar  # type: ignore[method-assign]
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # lm-eval prints a line for each bootstrap
            yield told
    finally:
        tqdm.__init__ = plain  # type: ignore[method-assign]
        if not bars:
            datasets.enable_progress_bars()
        for name, (handlers, propagate) in before.items():
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = handlers, propagate
