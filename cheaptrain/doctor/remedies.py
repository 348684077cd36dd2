"""Settings that have made hung communication work, tried one by one, then in plausible pairs.

The first all-reduce of a machine can hang for hours for want of one variable, and which one depends on its board, its
network and its driver. Trying takes a minute. Each trial runs in fresh processes, because these variables are read
once, when the process group is made. The trap is an endless search: so a fixed list, and a time for all of it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, TypeVar

import psutil

Settings = Mapping[str, str]


class _Trial(Protocol):
    @property
    def trouble(self) -> str: ...


Trial = TypeVar("Trial", bound=_Trial)


@dataclass(frozen=True)
class Interface:
    """A network interface that is up and has an address."""

    name: str
    loopback: bool


def interfaces_up() -> list[Interface]:
    """Network interfaces that are up and have an internet address, loopback last."""
    addresses = psutil.net_if_addrs()
    found = [
        Interface(name, "loopback" in state.flags.split(","))
        for name, state in psutil.net_if_stats().items()
        if state.isup and any(address.family.name in ("AF_INET", "AF_INET6") for address in addresses.get(name, ()))
    ]
    return sorted(found, key=lambda interface: (interface.loopback, interface.name))


def candidates(
    *, on_gpu: bool, interfaces: Sequence[Interface], present: Settings, joining: bool
) -> Iterator[Settings]:
    """Settings to try, likeliest first. `present`: what is set already; `joining`: it failed before any message."""
    names = [interface.name for interface in interfaces]
    gloo: list[Settings] = [{"GLOO_SOCKET_IFNAME": name} for name in names]
    nccl: list[Settings] = [
        {"NCCL_P2P_DISABLE": "1"},
        {"NCCL_IB_DISABLE": "1"},
        *({"NCCL_SOCKET_IFNAME": name} for name in names),
        {"NCCL_NET": "Socket"},
        {"NCCL_SHM_DISABLE": "1"},
    ]
    if not on_gpu:
        singles, pairs = gloo, []
    else:
        singles = [*gloo, *nccl] if joining else [*nccl, *gloo]
        pairs = [{**one, **other} for one, other in combinations(singles, 2) if _plausible(one, other)]
    for settings in (*singles, *pairs):
        new = {name: value for name, value in settings.items() if present.get(name) != value}
        if len(new) == len(settings):  # else it is one that was tried by itself
            yield settings


def try_in_order(
    attempt: Callable[[Settings], Trial], settings: Sequence[Settings], seconds: float
) -> Iterator[tuple[Settings, Trial]]:
    """Each of `settings` with its trial, up to and including the first without trouble; none is begun later than
    `seconds` from now."""
    ends = time.monotonic() + seconds
    for candidate in settings:
        if time.monotonic() >= ends:
            return
        trial = attempt(candidate)
        yield candidate, trial
        if not trial.trouble:
            return


def as_shell(settings: Settings) -> str:
    """`NAME=value NAME=value`."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def as_toml(settings: Settings) -> str:
    """The recipe's table, ready to paste."""
    return "\n".join(["[env]", *(f'{name} = "{value}"' for name, value in settings.items())])


def _plausible(one: Settings, other: Settings) -> bool:
    """Pairs that mean something together: one way between GPUs and one over the network, or both ways between GPUs off,
    or the same interface for both libraries."""
    names = {*one, *other}
    if len(names) < 2 or "NCCL_NET" in names:
        return False
    if names == {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}:
        return [*one.values()] == [*other.values()]
    return names in (
        {"NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"},
        {"NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"},
        {"NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME"},
        {"NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME"},
    )
