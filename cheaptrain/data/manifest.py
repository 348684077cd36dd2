"""The manifest: what a prepared source holds, what it was made from, and a hash of every file.

A source lives in `<data.dir>/<name>-<key>/`, where the key is a hash of everything the recipe says about its tokens:
the source, the tokenizer, the unit size, the share held out. Another tokenizer is another folder, so nothing prepared
is ever overwritten by something different, and a folder without a manifest is not finished. The trap: a manifest that
is found must still be checked against what the recipe asks now, and its files against their hashes; existence proves
nothing.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cheaptrain.chat.rendering import VERSION as RENDERING
from cheaptrain.data.files import (
    InputHashes,
    cannot_read,
    digest,
    file_sha256,
    read_sealed,
    sealed_json,
    write_atomically,
)
from cheaptrain.data.sources import source_spec
from cheaptrain.data.tokenizer import TextTokenizer
from cheaptrain.data.transform import rule_spec
from cheaptrain.data.units import FORMAT, SPLITS
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe import schema
from cheaptrain.recipe.resolve import SourceFacts

REMEDY = "run: cheaptrain prepare RECIPE"
_KEY_LENGTH = 12


@dataclass(frozen=True)
class Totals:
    """What one side of the split holds. `bytes`: of text. `supervised`: tokens the model must produce, of chats."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    supervised: int | None = None


@dataclass(frozen=True)
class Manifest:
    """`settings`: what the key is made of. `units`, in order: {"index", "train", "val", "files", ...}, with file names
    relative to `directory`. `inputs`: [{"name", "fingerprint", "bytes"}]. `chat`, of conversations: how many lost turns
    ("cut"), where header and answer would merge ("merging"); `dropped` are those of which no exchange fits a row.
    `transform`: rule → counts of its matches (`transform.py`); `literal`: documents in which an added token stood."""

    directory: Path
    name: str
    settings: Mapping[str, Any]
    eot_id: int
    bos_id: int | None
    dtype: str
    train: Totals
    val: Totals
    dropped: int
    skipped: int
    inputs: tuple[Mapping[str, Any], ...]
    units: tuple[Mapping[str, Any], ...]
    chat: Mapping[str, int] | None = None
    transform: Mapping[str, Mapping[str, int]] | None = None
    literal: int | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content, which names every token there is; where it lies does not matter."""
        return digest(self.content())

    @property
    def files(self) -> dict[str, Mapping[str, Any]]:
        """{file name: {"bytes", "sha256"}} of all shards and indexes."""
        return {name: written for unit in self.units for name, written in unit["files"].items()}

    def facts(self) -> SourceFacts:
        """What the plan needs to know."""
        return SourceFacts(
            train_tokens=self.train.tokens, train_documents=self.train.documents, train_bytes=self.train.bytes,
            val_tokens=self.val.tokens, val_documents=self.val.documents,
        )  # fmt: skip

    def content(self) -> dict[str, Any]:
        """As it stands on the disk."""
        content = {key: value for key, value in vars(self).items() if key not in ("directory", "name", "fingerprint")}
        content |= {split: _given(asdict(getattr(self, split))) for split in SPLITS}
        for key in ("chat", "transform", "literal"):  # they came later: what was prepared before them is still right
            if content[key] is None:
                del content[key]
        return content | {"inputs": list(self.inputs), "units": list(self.units)}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def source_settings(data: schema.Data, source: schema.Source, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Everything the recipe says about the tokens of a source."""
    settings: dict[str, Any] = {
        "format": FORMAT,
        "source": source_spec(source),
        "tokenizer": tokenizer.fingerprint,
        "validation": data.validation,
        "unit_bytes": data.unit_bytes,
    }
    if source.format == "chat":
        if tokenizer.template is None:
            raise RecipeError(f"source {source.name!r} holds conversations: say how they are rendered in [chat]")
        template = hashlib.sha256(tokenizer.template.jinja.encode()).hexdigest()
        settings["chat"] = {"version": RENDERING, "template": template, "seq_len": data.seq_len}
    if rules := data.rules(source):
        settings["transform"] = [rule_spec(rule) for rule in rules]
    return settings


def source_directory(data: schema.Data, source: schema.Source, tokenizer: TextTokenizer) -> Path:
    """Where the tokens of a source lie, prepared or not."""
    key = digest(source_settings(data, source, tokenizer))[:_KEY_LENGTH]
    return Path(data.dir) / f"{source.name}-{key}"


def manifest_path(directory: Path) -> Path:
    """Where the manifest of a prepared source lies."""
    return directory / "manifest.json"


def save_manifest(manifest: Manifest, owner: str) -> None:
    """Write it, atomically, unless it is there: from now on the source counts as prepared."""
    path, content = manifest_path(manifest.directory), sealed_json(manifest.content())
    if not (path.is_file() and os.access(path, os.R_OK) and path.read_bytes() == content):
        write_atomically(path, content, owner)


def load_manifest(data: schema.Data, source: schema.Source, tokenizer: TextTokenizer) -> Manifest:
    """The manifest of a source as this recipe wants it. Raises PreflightError if there is none, or another."""
    directory = source_directory(data, source, tokenizer)
    path = manifest_path(directory)
    settings = source_settings(data, source, tokenizer)
    if not path.is_file():
        if directory.is_dir():
            raise PreflightError(f"source {source.name!r} is not completely prepared ({directory}); {REMEDY}")
        others = describe_others(data, source, settings)
        raise PreflightError(f"source {source.name!r} is not prepared{others}; {REMEDY}")
    manifest = read_manifest(directory, source.name)
    if manifest.settings != settings:
        difference = ", ".join(settings_difference(manifest.settings, settings))
        raise PreflightError(f"{path} was made with other settings ({difference}); {REMEDY}")
    if losses := refusal_of_losses(manifest, tokenizer.limits):
        raise PreflightError(losses)
    return manifest


def refusal_of_losses(manifest: Manifest, limits: schema.Chat | None) -> str | None:
    """Why a source cannot be trained on: conversations with nothing to learn, or more of them cut or left out than the
    recipe allows, and how many. None: it can."""
    if manifest.chat is None or limits is None:
        return None
    where = f"source {manifest.name!r}"
    kept = manifest.train.documents + manifest.val.documents
    if untaught := manifest.chat["untaught"]:
        return (
            f"{where}: {untaught:,} of {kept:,} conversations have no token that the model must produce; choose "
            "another chat.template"
        )
    total = kept + manifest.dropped
    for what, count, key in (
        ("lose turns", manifest.chat["cut"], "max_cut"), ("are left out", manifest.dropped, "max_dropped"),
    ):  # fmt: skip
        allowed = getattr(limits, key)
        if count > allowed * total:
            needed = math.ceil(1000 * count / total) / 1000
            return (
                f"{where}: {count:,} of {total:,} conversations ({count / total:.1%}) {what} because they are longer "
                f"than a row; raise data.seq_len, or allow it with chat.{key} = {needed}"
            )
    return None


def read_manifest(directory: Path, name: str) -> Manifest:
    """Read a manifest file. Raises PreflightError when it is damaged."""
    path = manifest_path(directory)
    try:
        content = read_sealed(path)
        content |= {split: Totals(**content[split]) for split in SPLITS}
        content |= {"inputs": tuple(content["inputs"]), "units": tuple(content["units"])}
        return Manifest(directory=directory, name=name, **content)
    except OSError as error:
        raise PreflightError(cannot_read(path, error)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise PreflightError(f"{path}: damaged manifest ({error}); {REMEDY}") from error


def verify_manifest(manifest: Manifest) -> None:
    """Hash every shard again, and the raw inputs that are still there and were touched since.

    Raises PreflightError naming the first file that is missing, cut, or not what the manifest says.
    """
    problems = bad_files(manifest.directory, manifest.files)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise PreflightError(f"{problems[0]}{more}; {REMEDY}: it makes only the damaged units again")
    _verify_inputs(manifest)


def bad_files(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with files that should have these sizes and hashes, a sentence for each."""

    def problem(item: tuple[str, Mapping[str, Any]]) -> str | None:
        name, expected = item
        path = directory / name
        try:
            if path.stat().st_size != expected["bytes"]:
                return f"{path}: {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            return None if file_sha256(path) == expected["sha256"] else f"{path}: its content changed (SHA-256 differs)"
        except OSError as error:
            return f"{path}: {error.strerror}"
        except PreflightError as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return [found for found in pool.map(problem, files.items()) if found]


def settings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words, what two settings differ in."""
    differences = []
    for key in ("format", "unit_bytes", "validation"):
        if old.get(key) != new[key]:
            differences.append(f"{key}: {old.get(key)} -> {new[key]}")
    if old.get("tokenizer") != new["tokenizer"]:
        differences.append(f"tokenizer: {str(old.get('tokenizer'))[:8]} -> {new['tokenizer'][:8]}")
    rendered, wanted = old.get("chat") or {}, new.get("chat") or {}
    for key in sorted({*rendered, *wanted}):
        if rendered.get(key) != wanted.get(key):
            differences.append(f"chat {key}: {str(rendered.get(key))[:8]} -> {str(wanted.get(key))[:8]}")
    rules, others = ({rule["name"]: rule for rule in side.get("transform") or ()} for side in (old, new))
    for name in (name for name in {**rules, **others} if rules.get(name) != others.get(name)):
        old_rule, new_rule = rules.get(name, {}), others.get(name, {})
        if old_rule and new_rule:
            changed = [key for key in new_rule if old_rule.get(key) != new_rule[key]]
            for key in changed:
                differences.append(f"data.transform.{name}.{key}: {old_rule.get(key)} -> {new_rule[key]}")
        else:
            differences.append(f"data.transform.{name}: {'there -> absent' if old_rule else 'absent -> there'}")
    if rules == others and list(rules) != list(others):
        differences.append(f"data.transform, in order: {', '.join(rules)} -> {', '.join(others)}")
    before, after = old.get("source") or {}, new["source"]
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            differences.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return differences


def describe_others(data: schema.Data, source: schema.Source, settings: Mapping[str, Any]) -> str:
    """How what is prepared under this name differs from what is wanted; empty when there is nothing."""
    found = []
    for path in sorted(Path(data.dir).glob(f"{source.name}-{'[0-9a-f]' * _KEY_LENGTH}/manifest.json")):
        try:
            difference = settings_difference(read_manifest(path.parent, source.name).settings, settings)
        except PreflightError:
            continue
        found.append(f"{path.parent} differs in {', '.join(difference)}")
    return f" in this way ({'; '.join(found)})" if found else ""


def _verify_inputs(manifest: Manifest) -> None:
    """Refuse tokens whose raw text was changed. Inputs that are gone, on the hub or in packages are past asking."""
    spec = manifest.settings["source"]
    if not {"files", "tokens", "hub"} & set(spec):
        return
    hashes = InputHashes(manifest.directory.parent)
    for item in manifest.inputs:
        path = Path(item["name"])
        if item["fingerprint"].startswith("hub ") or (not path.is_file() and "tokens" not in spec):
            continue
        if hashes.sha256(path) != item["fingerprint"]:
            raise PreflightError(f"{path} changed after it was prepared into {manifest.directory}; {REMEDY}")
    hashes.save()
