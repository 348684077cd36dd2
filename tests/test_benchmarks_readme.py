"""A figure in benchmarks/README.md that is not in the results would be an untruth."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_table_is_what_the_results_say() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from readme import README, filled
    finally:
        sys.path.remove(str(BENCHMARKS))
    text = README.read_text(encoding="utf-8")
    assert filled(text) == text
    assert text.count("|---") + text.count("| --- |") >= 4
