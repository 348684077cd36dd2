"""Models of the hub on this machine: fetched while preparing, only looked up afterwards.

Training makes no network call, so what `model.config` or `model.init_from` names on the hub has to be here before. Only
safetensors weights, JSON and tokenizer files are fetched: nothing that could be pickled.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from cheaptrain.errors import PreflightError
from cheaptrain.model.config import locate
from cheaptrain.recipe import schema

_CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]


def is_future_checkpoint(spec: schema.Model) -> bool:
    """Whether `init_from` is a path, not a hub id, that an earlier stage has yet to write."""
    return spec.init_from is not None and spec.init_from.count("/") > 1 and not Path(spec.init_from).exists()


def fetch_model(spec: schema.Model) -> Path | None:
    """Bring what `spec` names on the hub to this machine; None when it names no hub id. Raises PreflightError."""
    if spec.preset is not None or Path(locate(spec)).is_dir():
        return None
    wanted = _CONFIG_FILES + (_WEIGHT_FILES if spec.init_from is not None else [])
    try:
        return Path(snapshot_download(locate(spec), revision=spec.revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise PreflightError(
            f"model: {locate(spec)} could not be fetched from the hub: check the id, the network and the login "
            f"({reason})"
        ) from error


def model_folder(spec: schema.Model) -> Path:
    """The folder behind `spec.config` or `spec.init_from` on this machine. Raises PreflightError when it is not
    here."""
    where = locate(spec)
    if Path(where).is_dir():
        return Path(where)
    try:
        return Path(snapshot_download(where, revision=spec.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        what = f"model: {where} is not on this machine; run `cheaptrain prepare` on this recipe"
        raise PreflightError(what) from error
