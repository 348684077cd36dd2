"""One line of plain output. The trap: rich reads `[tokenizer.train]` as markup and prints nothing of it."""

from rich.console import Console


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` as it is, in `style`: no markup, no guessed colours, not cut to the width of the terminal."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
