"""Put the tables of benchmarks/results/ into benchmarks/README.md: `python benchmarks/readme.py`."""

import json
import re
from pathlib import Path

from results import RESULTS, machine_line, table

README = Path(__file__).parent / "README.md"


def filled(text: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced by the table of that result."""

    def block(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match['name']}.json").read_text(encoding="utf-8"))
        content = (
            f"{result['title']}\n\n{table(result['header'], result['rows'])}\n\n{machine_line(result['machine'])}."
        )
        return f"<!-- {match['name']} -->\n{content}\n<!-- /{match['name']} -->"

    return re.sub(r"<!-- (?P<name>\w+) -->.*?<!-- /(?P=name) -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
