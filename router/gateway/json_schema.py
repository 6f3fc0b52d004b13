"""Which JSON schemas the grammar library enforces in full: `check` refuses every other one. Pure.

Why a list of what is known instead of the library's own errors: it skips what it does not know with a line on stderr
(`not`, `uniqueItems`, `multipleOf` with a range, two schemas in `allOf`, what stands beside an `enum`), and an answer
that was promised to match would not. What is listed here is generated at random against a validator in the tests.

Objects hold the properties listed, in that order; other ones only where `additionalProperties` allows them."""

import json
from collections.abc import Iterator
from typing import Any

from .regex_limits import UnsupportedRegex, check_regex

MAX_SCHEMA_BYTES = 32_768
MAX_DEPTH = 32  # schemas inside schemas
MAX_BOUNDED_STRINGS = 16  # minLength or maxLength: each may cost the compiler seconds with a large vocabulary

_NOTES = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
    "readOnly", "title", "writeOnly",
}  # fmt: skip
_OF_TYPE: dict[str, set[str]] = {
    "null": set(),
    "boolean": set(),
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_FORMATS = {"date", "time", "date-time", "email", "ipv4", "ipv6", "hostname", "uuid"}


class Unsupported(ValueError):
    """Path and keyword of what is not taken, and why."""


def check(text: str) -> str:
    """The schema as the library takes it; Unsupported where it is none, or large, or says what would not be enforced.

    A `oneOf` that was found to be disjoint becomes the `anyOf` that it equals: the library sees fewer of them."""
    if len(text.encode()) > MAX_SCHEMA_BYTES:
        raise Unsupported(f"at most {MAX_SCHEMA_BYTES} bytes, it has {len(text.encode())}")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unsupported(f"JSON: {error}") from None
    _Checker(schema).check(schema, "#", 0)
    try:
        said = json.dumps(schema, ensure_ascii=False)
        said.encode()
    except (RecursionError, UnicodeEncodeError) as error:  # a lone surrogate, escaped
        raise Unsupported(f"values that can be written: {error}") from None
    return said


class _Checker:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._num_bounded = 0

    def check(self, node: Any, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise Unsupported(f"at most {MAX_DEPTH} schemas inside each other")
        if node is True:
            return
        if not isinstance(node, dict):
            raise Unsupported(f"a schema at {path}, it is {json.dumps(node)[:40]}")
        for key in ("$defs", "definitions"):
            for name, schema in _members(node.get(key, {}), f"{path}/{key}"):
                self.check(schema, f"{path}/{key}/{name}", depth + 1)
        said = set(node) - _NOTES
        whole = next((k for k in ("$ref", "const", "enum", "anyOf", "oneOf", "allOf") if k in node), "")
        if not whole:
            self._check_typed(node, said, path, depth)
            return
        beside = said - {whole, *(("type",) if whole in ("const", "enum") else ())}
        if beside:
            raise Unsupported(f"{whole} alone at {path}, beside it is {min(beside)}")
        if whole == "$ref":
            self._target(node, path)
        elif whole in ("const", "enum"):
            self._check_values(node, whole, path)
        else:
            self._check_branches(node, whole, path, depth)

    def _check_typed(self, node: dict[str, Any], said: set[str], path: str, depth: int) -> None:
        if not said:
            return  # any value
        types = node.get("type")
        names: list[str] = types if isinstance(types, list) else [types]  # type: ignore[list-item]  # checked next
        if not names or not all(isinstance(name, str) and name in _OF_TYPE for name in names):
            raise Unsupported(f"a type of {', '.join(_OF_TYPE)} at {path}")
        known = set[str]().union(*(_OF_TYPE[name] for name in names))
        if unknown := said - {"type"} - known:
            raise Unsupported(f"no {min(unknown)} at {path}: it would not be enforced there")
        if "string" in names:
            self._check_string(node, said, path)
        for name, schema in _members(node.get("properties", {}), f"{path}/properties"):
            self.check(schema, f"{path}/properties/{name}", depth + 1)
        required = node.get("required", [])
        if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
            raise Unsupported(f"a list of names at {path}/required")
        if missing := [r for r in required if r not in node.get("properties", {})]:
            raise Unsupported(f"the required property {missing[0]!r} among the properties at {path}")
        for key in ("items", "additionalProperties"):
            if node.get(key, False) is not False:
                self.check(node[key], f"{path}/{key}", depth + 1)
        if "properties" in node and node.get("additionalProperties", False) is not False:
            raise Unsupported(f"either properties or additionalProperties at {path}: a name could come twice")
        prefix = node.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise Unsupported(f"a list of schemas at {path}/prefixItems")
        for index, schema in enumerate(prefix):
            self.check(schema, f"{path}/prefixItems/{index}", depth + 1)

    def _check_string(self, node: dict[str, Any], said: set[str], path: str) -> None:
        bounded = bool(said & {"minLength", "maxLength"})
        if bounded + ("pattern" in said) + ("format" in said) > 1:
            raise Unsupported(f"one of lengths, pattern and format at {path}")
        if "format" in said and node["format"] not in _FORMATS:
            raise Unsupported(f"a format of {', '.join(sorted(_FORMATS))} at {path}")
        if "pattern" in said:
            pattern = node["pattern"]
            if not isinstance(pattern, str) or '"' in pattern or "\\\\" in pattern:
                raise Unsupported(f"a pattern without quotes and backslashes as text at {path}")
            try:
                check_regex(pattern)
            except UnsupportedRegex as error:
                raise Unsupported(f"a pattern at {path} that is {error}") from None
        if bounded:
            self._num_bounded += 1
            if self._num_bounded > MAX_BOUNDED_STRINGS:
                raise Unsupported(f"at most {MAX_BOUNDED_STRINGS} strings with minLength or maxLength")
        if not all(isinstance(node.get(key, 0), int) and node.get(key, 0) >= 0 for key in ("minLength", "maxLength")):
            raise Unsupported(f"lengths of 0 or more at {path}")

    def _check_values(self, node: dict[str, Any], whole: str, path: str) -> None:
        values = node[whole] if whole == "enum" else [node[whole]]
        if not isinstance(values, list) or not values:
            raise Unsupported(f"at least one value at {path}/enum")
        types = node.get("type")
        if types is not None and not all(type_of(v) in _with_integer(types) for v in values):
            raise Unsupported(f"values of type {types} at {path}/{whole}")

    def _check_branches(self, node: dict[str, Any], whole: str, path: str, depth: int) -> None:
        branches = node[whole]
        if not isinstance(branches, list) or not branches:
            raise Unsupported(f"at least one schema at {path}/{whole}")
        if whole == "allOf" and len(branches) > 1:
            raise Unsupported(f"one schema at {path}/allOf; write several as one")
        for index, branch in enumerate(branches):
            self.check(branch, f"{path}/{whole}/{index}", depth + 1)
        if whole == "oneOf":
            shapes = [self._target(b, path) for b in branches]
            for i, first in enumerate(shapes):
                if any(not _disjoint(first, second) for second in shapes[i + 1 :]):
                    raise Unsupported(
                        f"schemas at {path}/oneOf that differ in type or in a constant property that all require; "
                        "write anyOf where more than one may match"
                    )
            node["anyOf"] = node.pop("oneOf")

    def _target(self, node: Any, path: str) -> Any:
        """What a chain of references and schemas that stand alone in an `allOf` leads to."""
        for _ in range(MAX_DEPTH):
            if isinstance(node, dict) and "$ref" in node:
                node = self._resolve(node["$ref"], path)
            elif isinstance(node, dict) and isinstance(node.get("allOf"), list) and len(node["allOf"]) == 1:
                node = node["allOf"][0]
            else:
                return node
        raise Unsupported(f"a $ref that leads to a schema at {path}, it leads to itself")

    def _resolve(self, reference: Any, path: str) -> Any:
        if reference == "#":
            return self._root
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise Unsupported(f"a $ref into this schema (#/...) at {path}")
        node = self._root
        for part in reference[2:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(node, dict) or part not in node:
                raise Unsupported(f"a $ref to something that is there at {path}, {reference} is not")
            node = node[part]
        return node


def type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names: dict[type, str] = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]


def _with_integer(types: Any) -> set[str]:
    names = set(types if isinstance(types, list) else [types])
    return names | {"integer"} if "number" in names else names


def _members(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise Unsupported(f"an object of schemas at {path}")
    yield from value.items()


def _disjoint(first: Any, second: Any) -> bool:
    """Whether no value can match both, as far as types and constant properties tell."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return False
    if not _types(first) & _types(second):
        return True
    if _types(first) != {"object"} or _types(second) != {"object"}:
        values = [_values(first), _values(second)]
        return None not in values and not any(v in values[1] for v in values[0])  # type: ignore[operator,union-attr]
    for name in set(first.get("required", ())) & set(second.get("required", ())):
        a, b = _values(first["properties"][name]), _values(second["properties"][name])
        if a is not None and b is not None and not any(v in b for v in a):
            return True
    return False


def _values(schema: Any) -> list[Any] | None:
    if not isinstance(schema, dict):
        return None
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _types(schema: dict[str, Any]) -> set[str]:
    """Types that a value of this schema may have."""
    values = _values(schema)
    if values is not None:
        return {t for v in values for t in _spread(type_of(v))}
    types = schema.get("type", list(_OF_TYPE))
    return {t for name in (types if isinstance(types, list) else [types]) for t in _spread(name)}


def _spread(name: str) -> set[str]:
    return {"integer", "number"} if name in ("integer", "number") else {name}
