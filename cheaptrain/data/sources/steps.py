"""Sums, differences and products written out the way they are learned at school: column by column, from the right.

    47 + 85          7 + 5 = 12, carry 1: 2
                     4 + 8 + 1 = 13, carry 1: 32
                     carry 1: 132

Behind the colon stand the digits of the result so far. Every line uses one digit of each operand and what the line
before it says, so that a small model can learn each step by itself. The trap: an answer whose digits depend on a carry
that nobody wrote down, or have to be collected from all lines at the end, can only be guessed.
"""

from collections.abc import Sequence


def written_out(operation: str, a: int, b: int) -> list[str]:
    """The lines by which `a` + `b`, `a` - `b` (with b <= a) or `a` * `b` is found; the last one ends in the result."""
    return {"+": _sum, "-": _difference, "*": _product}[operation](a, b)


def is_a_step(operation: str, a: int, b: int, *, digits: int, operations: Sequence[str]) -> bool:
    """Whether the lines of some other exercise, on operands of up to `digits` digits, say what `a` `operation` `b` is:
    7 + 5 is a column of 47 + 85, and 12 + 80 a line of 4 * 23."""
    if digits == 1:
        return False  # all lines are about the exercise itself
    if operation == "-":
        return b < 10 and a - b < 10
    if operation == "*":
        return any(len(str(factor).rstrip("0")) <= 1 for factor in (a, b))
    partial = "*" in operations and (_adds_partial(a, b, digits) or _adds_partial(b, a, digits))
    return partial or (a < 10 and b < 10)


def _adds_partial(total: int, part: int, digits: int) -> bool:
    """Whether some product adds the partial product `part` to `total`, what the digits further right gave."""
    for place in (10**k for k in range(1, digits)):
        for digit in range(1, 10):
            a, left = divmod(part, digit * place)
            if a and not left and not total % a and total // a < place:
                return True
    return part == 0


def _sum(a: int, b: int) -> list[str]:
    return _columns([(x + y, f"{x} + {y}") for x, y in _pairs(a, b)])


def _difference(a: int, b: int) -> list[str]:
    lines, borrow, digits = [], 0, ""
    for x, y in _pairs(a, b):
        lent = 10 if x - borrow < y else 0
        left = x + lent - borrow - y
        digits = f"{left}{digits}"
        lines.append(f"{x + lent} - {y}{' - 1' if borrow else ''} = {left}{', borrow 1' if lent else ''}: {digits}")
        borrow = int(lent > 0)
    return [*lines, *_without_zeros(digits)]


def _product(a: int, b: int) -> list[str]:
    lines, total, place = [], 0, 1
    for digit in map(int, reversed(str(b))):
        part = a * digit * place
        lines += _columns([(int(x) * digit, f"{x} * {digit}") for x in reversed(str(a))])
        lines.append(f"{a} * {digit * place} = {part}")
        if place > 1:
            lines += [*_sum(total, part), f"{total} + {part} = {total + part}"]
        total, place = total + part, place * 10
    return lines


def _columns(columns: list[tuple[int, str]]) -> list[str]:
    """A line for each column, (value without what is carried, how it is written), and one for the last carry."""
    lines, carry, digits = [], 0, ""
    for value, written in columns:
        found = value + carry
        digits = f"{found % 10}{digits}"
        more = f", carry {found // 10}" if found > 9 else ""
        lines.append(f"{written}{f' + {carry}' if carry else ''} = {found}{more}: {digits}")
        carry = found // 10
    return [*lines, f"carry {carry}: {carry}{digits}"] if carry else lines


def _pairs(a: int, b: int) -> list[tuple[int, int]]:
    """Digits of both from the right, the shorter one filled with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1], strict=True)]


def _without_zeros(digits: str) -> list[str]:
    """A line more where a difference begins with zeros."""
    return [f"{digits} = {int(digits)}"] if len(digits) > 1 and digits[0] == "0" else []
