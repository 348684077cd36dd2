"""Reading checkpoints: nothing is used before it has been shown to be what was written.

A checkpoint says in manifest.json how long each of its files is and what it hashes to, and carries a hash of that
statement itself. Reading goes from the newest to the oldest and takes the first that is whole; each bad one is named
with what is wrong. The trap is the last step of that walk: when there were checkpoints and none is good, starting
over would look like a fresh run and throw the old one away, so that is refused.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheaptrain.checkpoint.paths import RunDirectory, step_of
from cheaptrain.durable import fingerprint, sha256_of_all
from cheaptrain.errors import PreflightError

MANIFEST = "manifest.json"
RECIPE = "recipe.json"
CARD = "README.md"
STATE = "state"
FORMAT = "cheaptrain checkpoint"
FORMAT_VERSION = 2  # 1: state/ of one process, with random states; the folder beside it is the same

Report = Callable[[str], None]

_FIRST_FORMAT = (
    f"is of format version 1, and a run goes on from version {FORMAT_VERSION} only: finish it with the cheaptrain that "
    "wrote it, or start a new stage from its weights with model.init_from"
)
_MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model"}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a checkpoint."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def has_state(self) -> bool:
        """Whether a run can go on from it, or only a new stage start."""
        return any(name.startswith(f"{STATE}/") for name in self.manifest["files"])


@dataclass(frozen=True)
class Origin:
    """What a new stage starts from: the verified folder behind model.init_from."""

    path: Path
    fingerprint: str  # over the files a new stage reads: weights, config, tokenizer
    manifest_sha256: str | None = None  # these three for a checkpoint of ours only
    step: int | None = None
    tokens_seen: int | None = None


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON table with the hash over its own content added."""
    return {**content, "sha256": fingerprint(content)}


def verify_checkpoint(path: Path, *, hashes: bool = True, state: bool = True) -> list[Problem]:
    """Everything wrong with the checkpoint at `path`; empty when it is whole. The options are those of `examine`."""
    return examine(path, hashes=hashes, state=state)[1]


def examine(path: Path, *, hashes: bool = True, state: bool = True) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The manifest of the checkpoint at `path`, when it can be trusted, and everything wrong.

    With `hashes` off only presence and size are looked at; with `state` off the state/ folder is not looked at.
    Files that the manifest does not name are nobody's business, except in state/, where every file is read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes(), object_pairs_hook=_no_key_twice)
        sealed = seal({key: value for key, value in manifest.items() if key != "sha256"})
    except FileNotFoundError:
        return None, [Problem(MANIFEST, "missing: the folder was never a finished checkpoint, or was copied in part")]
    except OSError as error:
        return None, [Problem(MANIFEST, f"cannot be read: {error.strerror}")]
    except (ValueError, AttributeError, RecursionError) as error:
        return None, [Problem(MANIFEST, f"is not what was written ({error})")]
    if sealed != manifest:
        return None, [Problem(MANIFEST, "is not what was written (its content does not match its own sha256)")]
    version = manifest.get("format_version")
    if manifest.get("format") != FORMAT or (version != FORMAT_VERSION and (version != 1 or state)):
        told = (
            _FIRST_FORMAT if version == 1 else f"is of format version {version}; this cheaptrain reads {FORMAT_VERSION}"
        )
        return None, [Problem(MANIFEST, told)]
    problems = []
    named = step_of(path)
    if named is not None and named != manifest["step"]:
        problems.append(Problem(MANIFEST, f"is of step {manifest['step']}, but the folder is called {path.name}"))
    return manifest, problems + _examine_files(path, manifest["files"], hashes, state)


def newest_good(run: RunDirectory, report: Report) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when the run has none at all.

    Each bad one passed over goes to `report`. Raises PreflightError when there are checkpoints and none is good.
    """
    bad: list[str] = []
    for folder in reversed(run.steps()):
        manifest, problems = examine(folder)
        if manifest is not None and not problems:
            return Checkpoint(folder, manifest["step"], manifest)
        bad.append(f"{folder}: {'; '.join(map(str, problems[:5]))}")
        report(f"damaged checkpoint passed over: {bad[-1]}")
    if bad:
        raise PreflightError(
            f"no checkpoint of {run.path} is whole, and starting over unasked would bury them:\n  "
            + "\n  ".join(bad)
            + f"\nbring back the named files, or move {run.checkpoints} away to start the run over"
        )
    return None


def verify_init_from(path: Path, key: str = "model.init_from") -> Origin:
    """Check and fingerprint the folder that a new stage starts from, or learns from; `key` of the recipe names it.

    A checkpoint of ours is verified against its manifest (not its state/, which a new stage does not read). A
    transformers folder of anyone else's has no manifest, so its files are only hashed. Raises PreflightError for a
    folder that is missing, damaged, or holds no safetensors weights.
    """
    path = path.resolve()
    if not path.is_dir():
        raise PreflightError(f"{key}: there is no folder {path}")
    if _is_ours(path):
        manifest, problems = examine(path, state=False)
        if manifest is None or problems:
            raise PreflightError(f"{key}: {path} is damaged: {'; '.join(map(str, problems))}")
        hashes = _read_by_a_stage(manifest)
        return Origin(path, fingerprint(hashes), manifest["sha256"], manifest["step"], manifest["tokens_seen"])
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in _MODEL_SUFFIXES)
    if not any(file.suffix == ".safetensors" for file in files):
        raise PreflightError(
            f"{key}: {path} holds no *.safetensors weights; pickled ones are not read: load and save the "
            "model once with transformers (save_pretrained) to convert them"
        )
    return Origin(path, fingerprint({file.name: digest for file, digest in sha256_of_all(files).items()}))


def stated_fingerprint(path: Path) -> str | None:
    """What `verify_init_from` would find of a checkpoint of ours, as its manifest states it: no weight is read. None
    for any other folder, and for one that is damaged at a glance."""
    manifest, problems = examine(path.resolve(), hashes=False, state=False)
    return None if manifest is None or problems else fingerprint(_read_by_a_stage(manifest))


def listed_files(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it, with forward slashes."""
    found = (Path(directory, name) for directory, _, names in os.walk(folder) for name in names)
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _read_by_a_stage(manifest: dict[str, Any]) -> dict[str, str]:
    """Hashes of the files that a stage reads which starts from the checkpoint."""
    files = manifest["files"].items()
    return {n: told["sha256"] for n, told in files if n not in (RECIPE, CARD) and not n.startswith(f"{STATE}/")}


def _is_ours(path: Path) -> bool:
    # By more than the manifest, so that losing it makes a damaged checkpoint of ours, not someone else's folder.
    if (path / STATE).is_dir() or step_of(path) is not None:
        return True
    try:
        return f'"{FORMAT}"' in (path / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _examine_files(path: Path, files: dict[str, dict[str, Any]], hashes: bool, state: bool) -> list[Problem]:
    problems, to_hash = [], {}
    for name, expected in files.items():
        if not state and name.startswith(f"{STATE}/"):
            continue
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            problems.append(Problem(name, "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)))
            continue
        if size != expected["bytes"]:
            problems.append(Problem(name, f"has {size:,} bytes instead of {expected['bytes']:,}"))
        else:
            to_hash[path / name] = name
    if state:
        unknown = (name for name in listed_files(path) if name.startswith(f"{STATE}/") and name not in files)
        problems += [Problem(name, "does not belong to this checkpoint") for name in unknown]
    if hashes:
        try:
            digests = sha256_of_all(to_hash)
        except OSError as error:
            return [*problems, Problem(str(error.filename or path), f"cannot be read: {error.strerror}")]
        wrong = (name for file, name in to_hash.items() if digests[file] != files[name]["sha256"])
        problems += [Problem(name, "has other bytes than were written (SHA-256 differs)") for name in wrong]
    return problems


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made
