"""Numbers for people: `1.23M`, `1h 05m`, `3.4 GB`."""


def human(count: float) -> str:
    """1234567 → `1.23M`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g}{suffix}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """93784 → `1d 2h`; 65 → `1m 05s`."""
    whole = round(max(0.0, seconds))
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def size(count: float) -> str:
    """3_400_000_000 → `3.4 GB`."""
    for unit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.3g} {suffix}"
    return f"{count:.0f} B"
