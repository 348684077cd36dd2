"""Numbers on the axes of pictures."""


def plain(value: float) -> str:
    """As short as it can be."""
    return f"{value:.4g}"


def rate(value: float) -> str:
    """A learning rate."""
    return f"{value:.2g}"


def share(value: float) -> str:
    """0.25 -> `25%`."""
    return f"{value:.0%}"
