"""A response format as a grammar of the library xgrammar: what the gateway checks and the engine compiles.

The library is an extra (`expertmesh[structured]`): its wheel names triton, 286 MB that this product never calls, so the
Makefile installs it without its dependencies. Importing it takes a second, so it is done by the first request that asks
for a format, in a thread."""

import importlib
import json
import re
from typing import Any

from ..errors import MissingPackage
from ..request import AnswerGrammar

# The library's strings with a length may hold raw control characters, which JSON does not allow.
_BOUNDED = re.compile(r'(_characters ::= \(\()\[\^\\"\\\\\\r\\n\]\)\)$', re.MULTILINE)
_NO_CONTROLS = r'\1[^\\0-\\x1f\\"\\\\]))'


def library() -> Any:
    """xgrammar, or MissingPackage."""
    try:
        return importlib.import_module("xgrammar")
    except ImportError as error:
        raise MissingPackage("response_format", "xgrammar", "pip install 'expertmesh[structured]'") from error


def parse(grammar: AnswerGrammar) -> Any:
    """As `xgrammar.Grammar`. ValueError with the library's words where it is none."""
    kinds = library().Grammar
    try:
        match grammar.kind:
            case "json_schema":
                # One line, spaced as `json.dumps` does: free white space is where models lose themselves.
                found = kinds.from_json_schema(grammar.source, any_whitespace=False, strict_mode=True)
                return kinds.from_ebnf(_BOUNDED.sub(_NO_CONTROLS, str(found)))
            case "regex":
                return kinds.from_regex(grammar.source)
            case "choice":
                words = " | ".join(_literal(choice) for choice in json.loads(grammar.source))
                return kinds.from_ebnf(f"root ::= {words}\n")
            case other:
                raise ValueError(f"no such kind of grammar: {other}")
    except RuntimeError as error:
        raise ValueError(str(error).partition(": ")[2].strip() or str(error)) from None


def _literal(text: str) -> str:
    """A string of the library's EBNF."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{plain}"'
