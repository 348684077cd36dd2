"""The work on one source: which units are done, which are wanted next, and when it is whole.

State is what lies in the folder: a record for each finished unit, believed only if its identity is the planned unit's
and its shards still have their hashes. From that, `wanted` is a plain function: kill the command anywhere and the next
one wants exactly the rest. With `max_tokens` the result is the smallest run of units that reaches it, the last one cut
at a document: that depends on all units before, so a unit may be cut too late at first and is then done once more,
which keeps the bytes independent of how many workers there were.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cheaptrain.data.encode import EncoderSpec
from cheaptrain.data.files import TEMPORARY_PREFIX, read_sealed
from cheaptrain.data.manifest import Manifest, Totals, bad_files, manifest_path, save_manifest
from cheaptrain.data.sources import Plan, Unit
from cheaptrain.data.units import FORMAT, SPLITS, Job, record_path
from cheaptrain.errors import PreflightError

_BYTES_PER_TOKEN = 4  # expected, until units are done


@dataclass
class Work:
    """One source being prepared. `shard` (k, n): this run does units u with u % n == k - 1."""

    job: Job
    plan: Plan
    settings: dict[str, Any]
    shard: tuple[int, int]
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    in_flight: set[int] = field(default_factory=set)
    changes: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0
    redone: int = 0

    @property
    def directory(self) -> Path:
        return self.job.directory

    @cached_property
    def max_tokens(self) -> int | None:
        return self.job.source.max_tokens

    def survey(self) -> None:
        """Read the records there are and keep those that hold; say in `changes` why others do not."""
        for unit in self.plan.units:
            if unit.index not in self.records and (record := self._valid_record(unit)):
                self.records[unit.index] = record

    def wanted(self) -> Iterator[tuple[Unit, int | None]]:
        """Units to be done now, in order, each with the limit of training tokens to do it with."""
        if self.max_tokens is None:
            for unit in self.plan.units:
                if unit.index not in self.records and unit.index not in self.in_flight and self._mine(unit):
                    yield unit, None
            return
        exact, remaining, expected = True, self.max_tokens, float(self.max_tokens)
        for unit in self.plan.units:
            record = self.records.get(unit.index)
            if record is not None and not (exact and self._cut_wrong(record, remaining)):
                expected -= record["train"]["tokens"]
                remaining -= record["train"]["tokens"] if exact else 0
            else:
                if unit.index not in self.in_flight and (self._mine(unit) or record is not None):
                    yield unit, remaining
                exact = False
                expected -= min(remaining, unit.text_bytes / _BYTES_PER_TOKEN)
            if expected <= 0:
                return

    def done(self, record: dict[str, Any], cpu_seconds: float) -> None:
        """Take in the result of a unit."""
        self.in_flight.discard(record["index"])
        self.records[record["index"]] = record
        self.cpu_seconds += cpu_seconds
        self.redone += 1

    def missing(self) -> list[int]:
        """Units that are still needed for the whole; empty when it can be finished."""
        remaining = self.max_tokens
        for unit in self.plan.units:
            record = self.records.get(unit.index)
            if remaining is None:
                continue
            if record is None or self._cut_wrong(record, remaining):
                return [unit.index]
            remaining -= record["train"]["tokens"]
            if remaining <= 0:
                return []
        return [unit.index for unit in self.plan.units if unit.index not in self.records]

    def finish(self, encoder: EncoderSpec) -> Manifest:
        """All units are there: write the manifest. Raises PreflightError when they hold nothing to train on."""
        kept = [self.records[unit.index] for unit in self.plan.units[: self._units_kept()]]
        totals = {
            split: Totals(**{key: sum(record[split][key] for record in kept) for key in kept[0][split]})
            for split in SPLITS
        }
        name = self.job.source.name
        if not totals["train"].documents:
            held_out = totals["val"].documents
            why = f"all {held_out} documents are held out (data.validation)" if held_out else "there is no text in it"
            raise PreflightError(f"source {name!r} is empty: {why}; check what it names in the recipe")
        names = {item for record in kept for item in record["inputs"]}
        manifest = Manifest(
            directory=self.directory, name=name, settings=self.settings, eot_id=encoder.eot_id,
            bos_id=encoder.bos_id, dtype=encoder.dtype.name, **totals,
            dropped=sum(record["dropped"] for record in kept), skipped=sum(record["skipped"] for record in kept),
            chat={key: sum(record["chat"][key] for record in kept) for key in kept[0].get("chat", ())} or None,
            transform={
                rule: {key: sum(record["transform"][rule][key] for record in kept) for key in counts}
                for rule, counts in kept[0].get("transform", {}).items()
            } or None,
            literal=sum(record["literal"] for record in kept) if "literal" in kept[0] else None,
            inputs=tuple(
                {"name": item.name, "fingerprint": item.fingerprint, "bytes": item.size}
                for item in self.plan.inputs if item.name in names
            ),
            units=tuple({key: value for key, value in record.items() if key != "inputs"} for record in kept),
        )  # fmt: skip
        save_manifest(manifest, self.job.owner)
        self._remove_surplus(
            {record_path(self.directory, record["index"]).name for record in kept} | set(manifest.files)
        )
        return manifest

    def clear_temporary(self) -> None:
        """Remove what killed runs left half-written: of the same part, or of any when no other part can be at work."""
        owner = f"{self.job.owner}-" if self.shard[1] > 1 else ""
        for path in self.directory.glob(f"{TEMPORARY_PREFIX}{owner}*"):
            path.unlink(missing_ok=True)

    def withdraw_manifest(self) -> None:
        """There is work to do, so what the manifest says is no longer true."""
        manifest_path(self.directory).unlink(missing_ok=True)

    def _mine(self, unit: Unit) -> bool:
        k, n = self.shard
        return unit.index % n == k - 1

    def _cut_wrong(self, record: dict[str, Any], remaining: int) -> bool:
        """Was this unit cut elsewhere than the units before it demand?"""
        if record["limit"] is not None:
            return bool(record["limit"] != remaining)
        return bool(record["train"]["tokens"] >= remaining)

    def _units_kept(self) -> int:
        if self.max_tokens is None:
            return len(self.plan.units)
        remaining = self.max_tokens
        for unit in self.plan.units:
            remaining -= self.records[unit.index]["train"]["tokens"]
            if remaining <= 0:
                return unit.index + 1
        return len(self.plan.units)

    def _valid_record(self, unit: Unit) -> dict[str, Any] | None:
        path = record_path(self.directory, unit.index)
        try:
            record = read_sealed(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.changes.append(f"unit {unit.index}: its record is damaged ({error})")
            return None
        if record.get("format") != FORMAT or record.get("identity") != unit.identity:
            self.changes.append(f"unit {unit.index} ({unit.label}): {_input_changes(record.get('inputs', {}), unit)}")
            return None
        problems = bad_files(self.directory, record["files"])
        if problems:
            self.changes.append(f"unit {unit.index} ({unit.label}): {problems[0]}")
            return None
        return record

    def _remove_surplus(self, kept: set[str]) -> None:
        """Shards of units that are no longer part of the source."""
        for pattern in ("unit-*.json", "train-*.*", "val-*.*", "ends-*.npy"):
            for path in self.directory.glob(pattern):
                if path.name not in kept:
                    path.unlink()


def _input_changes(before: dict[str, str], unit: Unit) -> str:
    now = {item.name: item.fingerprint for item in unit.inputs}
    changed = [f"{name} changed" for name in now if name in before and before[name] != now[name]]
    changed += [f"{name} is new" for name in now if name not in before]
    changed += [f"{name} is gone" for name in before if name not in now]
    return ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "") or "cut differently"
