"""Put the tables of benchmarks/results/ into benchmarks/README.md: `python benchmarks/readme.py`.

The throughput of each machine is in a folder of its own there, as samples; its table is made as `cheaptrain bench`
makes it, of the newest code that was measured on each work.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import RESULTS, machine_line, table

from cheaptrain.bench.samples import FILE, Row, newest_rows
from cheaptrain.bench.table import HEADER, table_rows
from cheaptrain.bench.works import works_of

README = Path(__file__).parent / "README.md"


def filled(text: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced by the table of that result."""

    def block(match: re.Match[str]) -> str:
        if match["name"] == "throughput":
            return f"<!-- throughput -->\n{throughput()}\n<!-- /throughput -->"
        result = json.loads((RESULTS / f"{match['name']}.json").read_text(encoding="utf-8"))
        content = (
            f"{result['title']}\n\n{table(result['header'], result['rows'])}\n\n{machine_line(result['machine'])}."
        )
        return f"<!-- {match['name']} -->\n{content}\n<!-- /{match['name']} -->"

    return re.sub(r"<!-- (?P<name>\w+) -->.*?<!-- /(?P=name) -->", block, text, flags=re.DOTALL)


def throughput() -> str:
    """A table for each machine that was measured, GPUs first; and in words what was not."""
    machines = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"*/{FILE}"))]
    machines.sort(key=lambda held: held["machine"]["type"] != "cuda")
    parts = [_of_machine(held) for held in machines]
    if not any(held["machine"]["type"] == "cuda" for held in machines):
        parts.insert(0, f"No GPU figure is here yet: none has been measured.{_to_come('cuda', [])}")
    return "\n\n".join(parts)


def _of_machine(held: dict[str, Any]) -> str:
    machine, samples = held["machine"], held["samples"]
    rows = [row for work in works_of(machine["type"]) for row in newest_rows(samples, work.name)]
    measured = [sample for row in rows for sample in row.samples]
    about = [f"{machine['cores']} cores", f"{machine['memory_gib']} GiB", f"Python {machine['python']}"]
    about += sorted({f"{name} {version}" for sample in measured for name, version in sample["versions"].items()})
    days = sorted({sample["date"][:10] for sample in measured})
    when = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "nothing measured"
    codes = ", ".join(sorted({sample["code"] for sample in measured}))
    below = f"{when}, {', '.join(about)}; code {codes}.{_to_come(machine['type'], rows)}"
    return f"**{machine['device']}**\n\n{table(HEADER, table_rows(held))}\n\n{below}"


def _to_come(device: str, rows: Sequence[Row]) -> str:
    """The works and variants that nobody has tried on a device of this kind, in words."""
    tried = {(row.work, row.variant) for row in rows}
    missing = {
        work.title: [variant for variant in work.variants if (work.name, variant) not in tried]
        for work in works_of(device)
    }
    said = [f"{title}: {' / '.join(variants)}" for title, variants in missing.items() if variants]
    return f" Still to come: {'; '.join(said)}." if said else ""


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
