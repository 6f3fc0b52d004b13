"""A response format as a grammar of the library xgrammar: what the gateway checks and the engine compiles.

The library is an extra (`expertmesh[structured]`): its wheel names triton, 286 MB that this product never calls, so the
Makefile installs it without its dependencies. Importing it takes a second, so it is done by the first request that asks
for a format, in a thread."""

import importlib
import json
from typing import Any

from ..errors import MissingPackage
from ..request import AnswerGrammar


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
                return kinds.from_json_schema(grammar.source, any_whitespace=False, strict_mode=True)
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
