"""Where documents come from: texts, or conversations of sources with format = "chat". Each kind of source plans units
of work and reads the documents of one unit.

A plan is made once, in the parent process, from the inputs as they are now; a unit is a slice of it that one worker
reads start to end. A unit's `identity` is a hash of everything that decides its text: two units with one identity give
the same documents in the same order on any machine. The trap: paths and modification times differ between machines and
stay out.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cheaptrain.chat.conversation import Conversation, Turn
from cheaptrain.data.files import InputHashes, cannot_read, digest
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

Document = str | Conversation
_OF_THIS_MACHINE = ("path", "stamp")
_BEFORE = {"format": "text"}  # as sources were before the key was there
_DRILLS_BEFORE = {
    "operations": ["+", "-", "*"], "steps": False, "held_out": 0.0, "without_probes": False,
}  # fmt: skip


@dataclass(frozen=True)
class Bad:
    """A document that cannot be read: where (file and line or row) and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Input:
    """One input as records name it: nothing of this machine but what the recipe says. `size` in bytes."""

    name: str
    fingerprint: str
    size: int


@dataclass(frozen=True)
class Unit:
    """A slice of a source for one worker. `pieces`: what its reader needs. `text_bytes`: an estimate, for progress."""

    index: int
    label: str
    identity: str
    inputs: tuple[Input, ...]
    pieces: tuple[dict[str, Any], ...]
    text_bytes: int


@dataclass(frozen=True)
class Plan:
    """All units of a source, in order, and what to tell the user about how the source was understood."""

    units: tuple[Unit, ...]
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[Input]:
        """Every input once, in order."""
        return list({item.name: item for unit in self.units for item in unit.inputs}.values())


def source_spec(source: schema.Source) -> dict[str, Any]:
    """What of a source decides its documents: not its name, nor how the mixture uses it."""
    spec = source.model_dump(mode="json", exclude={"name", "weight", "max_epochs"}, exclude_none=True)
    # Keys that came later stay out where they change nothing: what was prepared before them is still right.
    spec = {key: value for key, value in spec.items() if _BEFORE.get(key) != value}
    if "drills" in spec:
        spec["drills"] = {key: value for key, value in spec["drills"].items() if _DRILLS_BEFORE.get(key) != value}
    return spec


def make_unit(
    index: int, label: str, inputs: list[Input], pieces: list[dict[str, Any]], text_bytes: int, **decides: Any
) -> Unit:
    """A unit with its identity: a hash of its inputs, its pieces (not where they lie), and what else `decides`."""
    inputs = list({item.name: item for item in inputs}.values())
    nameless = [{key: value for key, value in piece.items() if key not in _OF_THIS_MACHINE} for piece in pieces]
    known = [[item.name, item.fingerprint] for item in inputs]
    identity = digest({"inputs": known, "pieces": nameless, "decides": decides})
    return Unit(index, label, identity, tuple(inputs), tuple(pieces), text_bytes)


def plan_source(source: schema.Source, unit_bytes: int, hashes: InputHashes) -> Plan:
    """Units of about `unit_bytes` of text. Raises PreflightError naming what is missing, unreadable or empty."""
    if source.kind == "files":
        from cheaptrain.data.sources import local

        return local.plan(source, unit_bytes, hashes)
    if source.kind == "packages":
        from cheaptrain.data.sources import packages

        return packages.plan(source, unit_bytes, hashes)
    if source.kind == "drills":
        from cheaptrain.data.sources import drills

        return drills.plan(source, unit_bytes)
    if source.kind == "hub":
        from cheaptrain.data.sources import hub

        return hub.plan(source, hashes)
    from cheaptrain.data import foreign

    return foreign.plan(source, hashes)


def read_documents(source: schema.Source, unit: Unit) -> Iterator[Document | Bad]:
    """The documents of one unit, in order; those that cannot be read as `Bad`."""
    documents = _documents(source, unit)
    return documents if source.system is None else _with_system(documents, source.system)


def _with_system(documents: Iterator[Document | Bad], system: str) -> Iterator[Document | Bad]:
    """Conversations that have no system turn get this one."""
    for document in documents:
        if isinstance(document, Conversation) and document.turns[0].role != "system":
            document = replace(document, turns=(Turn("system", system), *document.turns))
        yield document


def _documents(source: schema.Source, unit: Unit) -> Iterator[Document | Bad]:
    if source.kind == "files":
        from cheaptrain.data.sources import local

        return local.documents(unit)
    if source.kind == "packages":
        from cheaptrain.data.sources import packages

        return packages.documents(source, unit)
    if source.kind == "drills":
        from cheaptrain.data.sources import drills

        return drills.documents(source, unit)
    from cheaptrain.data.sources import hub

    return hub.documents(source, unit)


def file_stamp(path: Path | str) -> tuple[int, int]:
    """(bytes, modification time): taken before a file is hashed, so that a later change is noticed when it is read.

    Raises PreflightError when there is no such file.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise PreflightError(cannot_read(path, error)) from error
    return stat.st_size, stat.st_mtime_ns


def check_unchanged(piece: dict[str, Any]) -> None:
    """Refuse a file that is no longer the one that was hashed into the plan. Raises PreflightError."""
    if file_stamp(piece["path"]) != piece["stamp"]:
        raise PreflightError(f"{piece['path']}: changed while it was being prepared; run the same command again")
