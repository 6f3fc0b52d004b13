"""Written arithmetic, one column a line: the thinking that a small model can follow.

Why this form: a transformer of a few layers can't carry over many columns in one step, but every line here needs only
two digits, at most one carry and a copy of the line before. Operands are padded to equal length first, so that the
digit to fetch lies at a distance that depends on the column alone; the result so far stands at the end of each line.
Idea: scratchpads (Nye et al. 2021), the detailed one of "Teaching Arithmetic to Small Transformers" (2023)."""

from __future__ import annotations


def add(a: int, b: int) -> str:
    """Lines of a + b for a, b >= 0, the last one `= result`."""
    width = max(len(str(a)), len(str(b)))
    top, bottom = str(a).zfill(width), str(b).zfill(width)
    lines, done, carry = [f"{top} + {bottom}"], "", 0
    for x, y in zip(reversed(top), reversed(bottom)):
        total = int(x) + int(y) + carry
        done = str(total % 10) + done
        lines.append(f"{x}+{y}{'+1' if carry else ''}={total}{', carry 1' if total > 9 else ''} -> {done}")
        carry = total // 10
    if carry:
        lines.append(f"carry 1 -> 1{done}")
    return "\n".join([*lines, f"= {a + b}"])


def subtract(a: int, b: int) -> str:
    """Lines of a - b for a, b >= 0; a smaller a is turned round first."""
    if a < b:
        return f"{a} < {b}, negative\n{_subtract_columns(b, a)}\n= {a - b}"
    return f"{_subtract_columns(a, b)}\n= {a - b}"


def _subtract_columns(a: int, b: int) -> str:
    width = len(str(a))
    top, bottom = str(a), str(b).zfill(width)
    lines, done, borrow = [f"{top} - {bottom}"], "", 0
    for x, y in zip(reversed(top), reversed(bottom)):
        lent = int(x) < int(y) + borrow
        digit = int(x) + 10 * lent - int(y) - borrow
        done = str(digit) + done
        lines.append(
            f"{'1' if lent else ''}{x}-{y}{'-1' if borrow else ''}={digit}{', borrow 1' if lent else ''} -> {done}"
        )
        borrow = int(lent)
    return "\n".join(lines)


def multiply(a: int, b: int) -> str:
    """Lines of a * b for a >= 0 and b of one or two digits: one row a digit of b, then their sum."""
    digits = str(b)
    if len(digits) == 1:
        return f"{_multiply_by_digit(a, b)}\n= {a * b}"
    tens, ones = int(digits[0]), int(digits[1])
    rows = [f"{a} * {b}", _multiply_by_digit(a, ones), _multiply_by_digit(a, tens)]
    return "\n".join([*rows, add(a * tens * 10, a * ones)])


def _multiply_by_digit(a: int, digit: int) -> str:
    lines, done, carry = [f"{a} * {digit}"], "", 0
    top = str(a)
    for index, x in enumerate(reversed(top)):
        total = int(x) * digit + carry
        last = index == len(top) - 1
        step = f"{x}*{digit}{f'+{carry}' if carry else ''}={total}"
        carry = total // 10
        done = (str(total) if last else str(total % 10)) + done
        lines.append(f"{step}{f', carry {carry}' if carry and not last else ''} -> {done}")
    return "\n".join(lines)


def chain(terms: list[int]) -> str:
    """Lines of the sum of several terms, each >= 0 or < 0 (then subtracted), from left to right."""
    total, parts = terms[0], []
    for term in terms[1:]:
        parts.append(add(total, term) if term >= 0 else subtract(total, -term))
        total += term
    return "\n".join(parts)


def divide(a: int, divisor: int) -> str:
    """Lines of a / divisor for a divisor of one digit: long division from the left."""
    lines, done, rest = [f"{a} / {divisor}"], "", 0
    for x in str(a):
        total = rest * 10 + int(x)
        rest = total % divisor
        done += str(total // divisor)
        lines.append(f"{total}/{divisor}={total // divisor}{f', rest {rest}' if rest else ''} -> {done}")
    return "\n".join([*lines, f"= {a // divisor}" + (f" rest {rest}" if rest else "")])


def is_held_out(a: int, b: int) -> bool:
    """True for the one pair of operands in sixteen, in either order, that training never sees; a fixed hash."""
    low, high = min(a, b), max(a, b)
    return ((low * 2654435761 + high * 40503 + 12345) >> 7) % 16 == 0
