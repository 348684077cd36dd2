"""From samples to the table that people read.

A figure is the median of its samples with the least and the largest beside it. "Ours" is cheaptrain's tokens/s over the
row's; "of floor" the row's over the floor's. The losses of the first steps of each row are held against cheaptrain's: a
row that learned something else, or less, says so instead of standing there as if it were slower or faster.
"""

from collections.abc import Sequence
from typing import Any

from cheaptrain.bench.samples import Row, newest_rows
from cheaptrain.bench.works import CHEAPTRAIN, FLOOR, FP8, Work, works_of
from cheaptrain.units import size

HEADER = (
    "work", "variant", "tokens/s", "spread, n", "MFU", "of floor", "ours", "peak", "first step, s", "rows at once",
    "remarks",
)  # fmt: skip
# Of the first loss, of the third, and of the first gradient norm: bf16 rounds, and Adam's first steps are of one size.
_TOLERANCES = {"cuda": (2e-3, 1e-2, 5e-2), "cpu": (1e-5, 1e-4, 1e-3)}
_OF_FP8 = (1e-2, 2e-2, 1e-1)
_LAST_STEPS = 50


def table_rows(held: dict[str, Any]) -> list[list[str]]:
    """The lines below `HEADER` for everything measured on a machine, works in order of worth."""
    machine, samples = held["machine"], held["samples"]
    lines = []
    for work in works_of(machine["type"]):
        rows = _sorted(newest_rows(samples, work.name), work)
        ours = next((row for row in rows if row.variant == work.variants[0]), None)
        if work.beside is not None and rows:
            other = next((r for r in newest_rows(samples, work.beside) if r.variant == CHEAPTRAIN), None)
            rows = [*rows, other] if other is not None else rows
        floor = next((row for row in rows if row.variant == FLOOR), None)
        for number, row in enumerate(rows):
            title = work.title if number == 0 else ""
            lines.append([title, *(_losses(row) if work.loss_steps else _line(row, work, ours, floor, machine))])
    return lines


def mismatch(row: Row, ours: Row | None, device: str) -> str | None:
    """What a row learned otherwise than cheaptrain in its first steps; None: nothing that rounding does not do."""
    if ours is None or not row.samples or not ours.samples or row.variant == FLOOR:
        return None
    first, third, norm = _OF_FP8 if row.variant == FP8 else _TOLERANCES[device]
    mine, theirs = ours.samples[-1], row.samples[-1]
    for what, tolerance, a, b in (
        ("first loss", first, mine["losses"][0], theirs["losses"][0]),
        ("third loss", third, mine["losses"][-1], theirs["losses"][-1]),
        ("gradient norm", norm, mine["grad_norms"][0], theirs["grad_norms"][0]),
    ):
        if abs(a - b) > tolerance * max(abs(a), abs(b)):
            return f"DIFFERS: {what} {b:.5g}, cheaptrain's {a:.5g}"
    return None


def mfu(row: Row, peak_flops: float | None) -> float | None:
    """Share of the device's peak; None where the peak or the figure is not known."""
    speed, flops = row.median("tokens_per_second"), row.median("flops_per_token")
    return None if peak_flops is None or speed is None or flops is None else speed * flops / peak_flops


def _sorted(rows: Sequence[Row], work: Work) -> list[Row]:
    order = [*work.variants, FLOOR]
    return sorted(rows, key=lambda row: order.index(row.variant) if row.variant in order else len(order))


def _line(row: Row, work: Work, ours: Row | None, floor: Row | None, machine: dict[str, Any]) -> list[str]:
    name = row.variant if row.work == work.name else f"{row.variant}, {row.work}"
    speed = row.median("tokens_per_second")
    if speed is None:
        return [name, "–", "", "", "", "", "", "", "", f"not measured: {row.failure}"]
    low, high = row.ends("tokens_per_second") or (speed, speed)
    share = mfu(row, machine["peak_flops"])
    bound = None if floor is None or row.work != work.name else floor.median("tokens_per_second")
    own = None if ours is None or row is ours else ours.median("tokens_per_second")
    peak, starts, at_once = row.median("peak_bytes"), row.ends("first_step_seconds"), row.median("micro_rows")
    compared = mismatch(row, ours, machine["type"]) if row.work == work.name and row is not ours else None
    return [
        name,
        f"{speed:,.0f}",
        "1" if len(row.samples) == 1 else f"{low:,.0f}–{high:,.0f}, {len(row.samples)}",
        "" if share is None else f"{share:.1%}",
        "" if bound is None or row is floor else f"{speed / bound:.0%}",
        "" if own is None or row is floor else f"{own / speed:.2f}×",
        "" if peak is None else size(int(peak)),
        "" if starts is None else _range(*starts),
        "" if at_once is None else f"{at_once:.0f} of {work.rows}",
        "; ".join(word for word in (compared, row.samples[-1].get("note")) if word),
    ]


def _range(low: float, high: float) -> str:
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f}–{high:.1f}"


def _losses(row: Row) -> list[str]:
    """Of a work that compares losses: the mean of the last steps, in the place of remarks."""
    if not row.samples:
        return [row.variant, "–", "", "", "", "", "", "", "", f"not measured: {row.failure}"]
    last = [sum(s["losses"][-_LAST_STEPS:]) / len(s["losses"][-_LAST_STEPS:]) for s in row.samples]
    said = f"mean loss of the last {_LAST_STEPS} steps {', '.join(f'{loss:.4f}' for loss in last)}"
    return [row.variant, "", f"{len(row.samples)}", "", "", "", "", "", "", said]
