"""The sources of a run as the plan shows them: what is asked of each, what is prepared, what preparing would bring."""

from dataclasses import dataclass
from pathlib import Path

from cheaptrain.data.files import InputHashes
from cheaptrain.data.manifest import Manifest
from cheaptrain.data.open import holds_chats
from cheaptrain.data.sources import plan_source
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.schema import Data, Source
from cheaptrain.recipe.shares import SourceShare

TEXT_BYTES_PER_TOKEN = 4  # of an estimate; English prose with a vocabulary of 32k to 128k comes near it


@dataclass(frozen=True)
class SourcePlan:
    """One source. None: not known.

    `tokens_estimated`: what preparing would bring, from the size of its text or from max_tokens; `at_most`: only a part
    of that text is taken. `useful`: the share of the positions of packed rows that conversations fill; None for text.
    """

    name: str
    share: float | None
    tokens: int | None
    prepared_tokens: int | None
    prepared_bytes: int
    epochs: float | None
    max_epochs: float
    val_tokens: int | None
    tokens_estimated: int | None
    at_most: bool
    useful: float | None


def plan_sources(
    data: Data, shares: tuple[SourceShare, ...], manifests: dict[str, Manifest], resolved: bool
) -> tuple[SourcePlan, ...]:
    """Every source with a weight. `resolved`: whether the shares carry the rows of a run of known length."""
    specs = {source.name: source for source in data.sources}
    plans = []
    for share in shares:
        if share.share == 0:
            continue
        manifest = manifests.get(share.name)
        plans.append(
            SourcePlan(
                name=share.name,
                share=share.share,
                tokens=share.tokens if resolved and share.share is not None else None,
                prepared_tokens=manifest.train.tokens if manifest else None,
                prepared_bytes=sum(file["bytes"] for file in manifest.files.values()) if manifest else 0,
                epochs=share.epochs if resolved else None,
                max_epochs=share.max_epochs,
                val_tokens=manifest.val.tokens if manifest else None,
                tokens_estimated=None if manifest else estimate_tokens(data, specs[share.name]),
                at_most=specs[share.name].kind == "packages" and specs[share.name].content != "code",
                useful=_useful(manifest, share, data.seq_len),
            )
        )
    return tuple(plans)


def _useful(manifest: Manifest | None, share: SourceShare, seq_len: int) -> float | None:
    if manifest is None or not share.available_rows or not holds_chats(manifest):
        return None
    return (manifest.train.tokens - manifest.train.documents) / (share.available_rows * seq_len)


def estimate_tokens(data: Data, source: Source) -> int | None:
    """About what a source that is not prepared would bring, from the sizes of its files; None if they are not here."""
    if source.kind not in ("files", "packages", "drills"):
        return source.max_tokens
    try:
        plan = plan_source(source, data.unit_bytes, _NoHashes(Path(data.dir)))
    except PreflightError:
        return None
    tokens = sum(unit.text_bytes for unit in plan.units) // TEXT_BYTES_PER_TOKEN
    return min(tokens, source.max_tokens or tokens)


class _NoHashes(InputHashes):
    """The sizes of inputs do not need their content read."""

    def sha256(self, path: Path) -> str:
        return ""
