"""Hub datasets, read as a stream: one unit for each underlying file.

The revision is resolved once, when the plan is made, and pinned for every worker, so a dataset that is updated
meanwhile is still read as one version. A file's fingerprint is the hash the hub keeps of its content, not the commit:
a changed README does not make anybody tokenise ten billion tokens again. A local folder in the hub's layout works the
same and is fingerprinted by the SHA-256 of its files.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from cheaptrain.data.files import InputHashes
from cheaptrain.data.sources import Bad, Document, Input, Plan, Unit, make_unit
from cheaptrain.data.sources.column import choose, named, take, taken_columns
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

_REMOTE = re.compile(r"^hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<file>.+)$")
_TEXT_BYTES_PER_FILE_BYTE = 2  # of compressed parquet; only progress and free space depend on it


def plan(source: schema.Source, hashes: InputHashes) -> Plan:
    """One unit a file. Raises PreflightError: not found, no such subset or split, wrong column, no network."""
    import datasets

    assert source.hub is not None
    split = source.split or "train"
    try:
        builder = datasets.load_dataset_builder(
            source.hub, name=source.subset, revision=source.revision, data_files=source.data_files
        )
        paths = [str(path) for path in (builder.config.data_files or {}).get(split, [])]
        inputs, revision = _fingerprints(paths, hashes)
        dataset = _stream(source.hub, source.subset, split, revision or source.revision, _key(source.data_files))
        columns = _columns(dataset)
    except PreflightError:
        raise
    except Exception as error:  # datasets raises many kinds, all of them about what the recipe asked for or the network
        raise PreflightError(_cannot_load(source, error)) from error
    taken = choose(columns, source, None, f"{source.hub} ({split})")
    key = "column" if isinstance(taken, str) else "columns"
    one_each = len(inputs) == dataset.num_shards
    units = []
    for index in range(dataset.num_shards):
        of_unit = [inputs[index]] if one_each else inputs
        piece = {"shard": index, "of": dataset.num_shards, "split": split, key: taken}
        where = {"path": {"revision": revision or source.revision}}  # pins the workers; content is in the inputs
        label = of_unit[0].name if one_each else f"{source.hub} part {index + 1} of {dataset.num_shards}"
        expected = sum(item.size for item in of_unit) * _TEXT_BYTES_PER_FILE_BYTE // (1 if one_each else len(of_unit))
        units.append(make_unit(index, label, of_unit, [piece | where], expected, on_bad_line=source.on_bad_line))
    return Plan(
        tuple(units), (*named(source, taken, set(columns)), *([f"revision {revision[:12]}"] if revision else []))
    )


def documents(source: schema.Source, unit: Unit) -> Iterator[Document | Bad]:
    """The documents of one shard of the stream. Raises PreflightError when the stream breaks."""
    assert source.hub is not None
    for piece in unit.pieces:
        taken, row = taken_columns(piece), 0
        names = [taken] if isinstance(taken, str) else list(taken.values())
        try:
            revision, files = piece["path"]["revision"], _key(source.data_files)
            dataset = _stream(source.hub, source.subset, piece["split"], revision, files)
            if dataset.num_shards != piece["of"]:
                raise PreflightError(f"source {source.name!r}: {source.hub} changed while it was read; run again")
            for example in dataset.shard(num_shards=piece["of"], index=piece["shard"]).select_columns(names):
                yield take(example, taken, f"{unit.label} row {row:,}")
                row += 1
        except (PreflightError, GeneratorExit):
            raise
        except Exception as error:
            raise PreflightError(f"{_cannot_load(source, error)} (after row {row:,} of {unit.label})") from error


def _fingerprints(paths: list[str], hashes: InputHashes) -> tuple[list[Input], str | None]:
    """An Input a file, and the resolved hub revision, if they are on the hub."""
    matches = [_REMOTE.match(path) for path in paths]
    if not paths or not all(matches):
        local = [Path(path) for path in paths if Path(path).is_file()]
        if len(local) == len(paths):
            found = zip(paths, hashes.of(local), local, strict=True)
            return [Input(_relative(path), sha, file.stat().st_size) for path, sha, file in found], None
        return [Input(path, path, 0) for path in paths], None
    from huggingface_hub import HfApi

    remote = [match for match in matches if match]
    repo, revision = remote[0]["repo"], remote[0]["revision"]
    names = [match["file"] for match in remote]
    known: dict[str, Any] = {}
    for start in range(0, len(names), 500):
        for info in HfApi().get_paths_info(repo, names[start : start + 500], revision=revision, repo_type="dataset"):
            known[info.path] = info
    inputs = []
    for name in names:
        info = known[name]
        content = info.lfs.sha256 if getattr(info, "lfs", None) else info.blob_id
        inputs.append(Input(f"{repo}/{name}", f"hub {content}", int(info.size)))
    return inputs, revision


def _relative(path: str) -> str:
    """As seen from the working directory when it lies below it: the same on every machine with the same layout."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


@lru_cache(maxsize=4)
def _stream(hub: str, subset: str | None, split: str, revision: str | None, files: tuple[str, ...] | None) -> Any:
    import datasets

    data_files = list(files) if files else None
    return datasets.load_dataset(
        hub, name=subset, split=split, revision=revision, data_files=data_files, streaming=True
    )


def _key(data_files: str | list[str] | None) -> tuple[str, ...] | None:
    return (data_files,) if isinstance(data_files, str) else tuple(data_files) if data_files else None


def _columns(dataset: Any) -> dict[str, bool]:
    if dataset.features is None:
        example: dict[str, Any] = next(iter(dataset), {})
        return {name: isinstance(value, str) for name, value in example.items()}
    return {name: getattr(kind, "dtype", None) in ("string", "large_string") for name, kind in dataset.features.items()}


def _cannot_load(source: schema.Source, error: Exception) -> str:
    asked = [f"hub = {source.hub!r}"]
    asked += [f"{key} = {value!r}" for key in ("subset", "split", "revision") if (value := getattr(source, key))]
    reason = " ".join(str(error).split())[:400]
    said = f"{type(error).__name__}: {reason}; check these, and the network"
    if isinstance(error, StopIteration):  # what datasets raises for files without a row
        said = "its files hold nothing"
    elif source.on_bad_line == "skip":
        said += "; on_bad_line leaves out rows without text, not lines at which the datasets library stops"
    return f"source {source.name!r} ({', '.join(asked)}): {said}"
