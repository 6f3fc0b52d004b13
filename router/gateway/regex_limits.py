"""Which regular expressions the grammar library takes as they are meant, at a bounded cost. Pure.

Refused beside its own refusals: escapes that it reads as letters, anchors in the middle that it skips, and what is
large when its repetitions are written out. A repetition of more than 128 is not compiled by the library but walked at
every token (100 ms with a vocabulary of 151,000, against 50 us); a compiled position of a wide class costs up to 80 ms,
once."""

import re
import re._constants as sre
import re._parser as sre_parse
from typing import Any

MAX_REGEX_BYTES = 4096
MAX_REPEAT = 128
MAX_POSITIONS = 512  # with every repetition written out
_LETTERS = set("dDwWsSnrtfvxu")  # escapes that mean what they do elsewhere


class UnsupportedRegex(ValueError):
    """What was expected instead."""


def check_regex(regex: str) -> None:
    if not 1 <= len(regex.encode()) <= MAX_REGEX_BYTES:
        raise UnsupportedRegex(f"1..{MAX_REGEX_BYTES} bytes")
    try:
        tree = sre_parse.parse(regex)
    except (re.error, RecursionError, OverflowError) as error:
        raise UnsupportedRegex(f"a regular expression: {error}") from None
    _check_characters(regex)
    if (size := _size(tree)) > MAX_POSITIONS:
        raise UnsupportedRegex(f"at most {MAX_POSITIONS} positions with its repetitions written out, it has {size}")


def _check_characters(regex: str) -> None:
    position, in_class = 0, False
    while position < len(regex):
        char = regex[position]
        if char == "\\":
            position += 1
            escaped = regex[position]
            if escaped.isdigit() or (escaped.isalpha() and escaped not in _LETTERS):
                raise UnsupportedRegex(f"no \\{escaped}")
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif (char == "^" and position) or (char == "$" and position < len(regex) - 1):
            raise UnsupportedRegex(f"{char} at the {'beginning' if char == '^' else 'end'} alone")
        position += 1


def _size(tree: Any) -> int:
    """Positions of the expression with its repetitions written out."""
    total = 0
    for operation, argument in tree:
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, body = argument
            times = low if high is sre.MAXREPEAT else high
            if times > MAX_REPEAT:
                raise UnsupportedRegex(f"repetitions of at most {MAX_REPEAT}, or without an upper bound")
            total += max(1, times) * _size(body)
        elif operation is sre.SUBPATTERN:
            total += _size(argument[-1])
        elif operation is sre.BRANCH:
            total += sum(_size(branch) for branch in argument[1])
        else:
            total += 1
        if total > MAX_POSITIONS:
            break
    return total
