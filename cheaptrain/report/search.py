"""Which layout, micro-batch and recomputation fit the memory: the cheapest first.

Cheapest is a rule here, not a simulation, and the plan states it: no tensor parallelism before tensor parallelism, no
recomputation before recomputation, a copy of the model in each node (HSDP, where only gradients leave the node) before
one copy over all processes, a larger micro-batch before a smaller. The first candidate whose measured peak fits is
proposed. The global batch stays what it is: micro-batches that do not divide its rows are no candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from cheaptrain.errors import PreflightError
from cheaptrain.hardware import GPUS_PER_NODE
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Train
from cheaptrain.report.measure import Measured, Setting, measure
from cheaptrain.report.memory import peak_bytes
from cheaptrain.report.tracker import ACTIVATIONS, WEIGHTS

RULE = (
    "without tensor parallelism before with it, without recomputation before with it, HSDP in nodes of "
    f"{GPUS_PER_NODE} before FSDP over all, larger micro-batches first"
)
_TENSOR_PARALLEL = (1, 2, 4, 8)
_HELD_BYTES = {"adamw": 16, "muon": 12}  # a parameter at least: weight, gradient, moments
_SURELY = 0.9  # of what the forward pass keeps, the share that grows with the rows


@dataclass(frozen=True)
class Fitting:
    """A setting that fits, and what was measured of it."""

    measured: Measured
    peak: int

    @property
    def setting(self) -> Setting:
        return self.measured.setting


@dataclass(frozen=True)
class Wanted:
    """What to look for beside the setting as it is. `rows`: of a step, over all processes; `usable`: bytes that a
    process may take; `nodes`: whether processes share nodes of GPUs; `parameters`: of the whole model."""

    usable: int
    rows: int
    nodes: bool
    parameters: int
    propose: bool


@dataclass(frozen=True)
class Found:
    """`as_it_is`: the setting that was asked for. `mildest`: the same layout with the smallest change that fits, when
    it does not fit itself (None: there is none). `cheapest`: over all layouts, if that was `looked` for. `apart`: why
    the model cannot be laid out with tensor parallelism, where that was tried."""

    as_it_is: Measured
    fits: bool
    mildest: Fitting | None = None
    looked: bool = False
    cheapest: Fitting | None = None
    apart: tuple[str, ...] = ()


def find(config: PreTrainedConfig, setting: Setting, train: Train, wanted: Wanted) -> Found:
    """Measure `setting`, and look for what fits as far as it is wanted or needed. Raises PreflightError when the model
    cannot be laid out as `setting` says."""
    search = _Search(config, setting, train, wanted)
    measured = search.measure(setting)
    fits = peak_bytes(measured, train) <= wanted.usable
    mildest = None if fits else search.mildest()
    shared = setting.layout.tp > 1 or setting.layout.cp > 1
    looked = wanted.propose or shared
    return Found(measured, fits, mildest, looked, search.cheapest() if looked else None, tuple(search.apart))


class _Search:
    def __init__(self, config: PreTrainedConfig, setting: Setting, train: Train, wanted: Wanted) -> None:
        self.config, self.setting, self.train, self.wanted = config, setting, train, wanted
        self.apart: list[str] = []
        self._known: dict[Setting, Measured] = {}

    def measure(self, setting: Setting) -> Measured:
        if setting not in self._known:
            self._known[setting] = measure(self.config, setting)
        return self._known[setting]

    def mildest(self) -> Fitting | None:
        """The same layout with a smaller micro-batch, else with recomputation as well."""
        micros = [n for n in self._micros(self.setting.layout) if n <= self.setting.micro_batch_size]
        for recompute in sorted({self.setting.recompute, True}):
            if fitting := self._largest(self.setting.layout, recompute, micros):
                return fitting
        return None

    def cheapest(self) -> Fitting | None:
        """The first that fits, by the rule of this module."""
        for tp in _TENSOR_PARALLEL if self.wanted.nodes else (1,):
            if self.setting.seq_len % tp:
                continue
            try:
                for recompute in (False, True):
                    for layout in layouts(self.setting.layout.world_size, tp, self.wanted.nodes):
                        if fitting := self._largest(layout, recompute, self._micros(layout)):
                            return fitting
            except PreflightError as error:
                self.apart.append(str(error))
                return None  # what does not divide by this number, or has no plan, does not by a multiple of it either
        return None

    def _micros(self, layout: Layout) -> list[int]:
        """Micro-batches that divide the rows of a process, largest first."""
        rows, left = divmod(self.wanted.rows, layout.data_parallel)
        return [] if left else [n for n in range(rows, 0, -1) if rows % n == 0]

    def _largest(self, layout: Layout, recompute: bool, micros: Sequence[int]) -> Fitting | None:
        """The largest of `micros` (falling) that fits. A micro-batch that is the whole step comes first: it does not
        accumulate, so it may fit where smaller ones do not; of the others a smaller one never takes more."""
        shards = layout.dp_shard * layout.cp * layout.tp
        if not micros or _HELD_BYTES[self.train.optimizer] * self.wanted.parameters // shards > self.wanted.usable:
            return None
        smallest, best = self._fitting(layout, recompute, micros[-1])
        hopeful = [micro for micro in micros[:-1] if self._least(smallest, micro) <= self.wanted.usable]
        if hopeful and hopeful[0] * layout.data_parallel == self.wanted.rows:
            whole = self._fitting(layout, recompute, hopeful.pop(0))[1]
            if whole is not None:
                return whole
        while best and hopeful:
            middle = len(hopeful) // 2
            fitting = self._fitting(layout, recompute, hopeful[middle])[1]
            best, hopeful = (fitting, hopeful[:middle]) if fitting else (best, hopeful[middle + 1 :])
        return best

    def _least(self, smaller: Measured, micro: int) -> float:
        """Bytes that `micro` rows take at the least, from what was measured of fewer: what a forward pass keeps grows
        with the rows."""
        at_loss = next(moment.parts for moment in smaller.moments if moment.place == "loss")
        grown = at_loss.get(ACTIVATIONS, 0) * (micro / smaller.setting.micro_batch_size - 1)
        return at_loss.get(WEIGHTS, 0) + at_loss.get(ACTIVATIONS, 0) + _SURELY * grown

    def _fitting(self, layout: Layout, recompute: bool, micro: int) -> tuple[Measured, Fitting | None]:
        setting = replace(
            self.setting,
            layout=layout,
            recompute=recompute,
            micro_batch_size=micro,
            accumulates=micro * layout.data_parallel < self.wanted.rows,
        )
        measured = self.measure(setting)
        peak = peak_bytes(measured, self.train)
        return measured, Fitting(measured, peak) if peak <= self.wanted.usable else None


def layouts(processes: int, tp: int, nodes: bool) -> Iterator[Layout]:
    """Layouts of `processes` with `tp`, the cheaper first: HSDP where there are several whole nodes, then FSDP."""
    if processes % tp:
        return
    copies, left = divmod(processes, GPUS_PER_NODE)
    if nodes and copies > 1 and not left:
        yield Layout(dp_replicate=copies, dp_shard=GPUS_PER_NODE // tp, tp=tp)
    yield Layout(dp_shard=processes // tp, tp=tp)
