"""Random schemas of the kinds that are taken, and random texts that a compiled grammar allows."""

import json
import random
from threading import Event
from typing import Any

import numpy as np

from expertmesh.cluster.attention.grammar import GrammarCompiler, GrammarState
from expertmesh.errors import ExpertMeshError
from expertmesh.request import AnswerGrammar
from expertmesh.router.gateway.json_schema import check
from expertmesh.router.gateway.tokenizer import Tokenizer


def compiled(compiler: GrammarCompiler, grammar: AnswerGrammar) -> GrammarState:
    """Waits for it."""
    ended, found = Event(), []
    compiler.compile(grammar, lambda ready: (found.append(ready), ended.set()))
    assert ended.wait(60)
    if isinstance(found[0], ExpertMeshError):
        raise found[0]
    return found[0]()


def allowed_ids(state: GrammarState, vocab_size: int) -> np.ndarray:
    mask = state.mask()
    if mask is None:
        return np.arange(vocab_size)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little"))


def walk(state: GrammarState, tokenizer: Tokenizer, rng: random.Random, *, most: int = 400) -> list[int] | None:
    """Ids drawn from what is allowed, the ending one left out; None where it did not end in `most`."""
    ids: list[int] = []
    endings = [i for i in range(tokenizer.vocab_size) if tokenizer.piece(i)[:1] in (b'"', b"}", b"]")]
    while len(ids) < most:
        allowed = allowed_ids(state, tokenizer.vocab_size)
        assert len(allowed), f"nothing may follow {tokenizer.decode(ids)!r}"
        stops = [i for i in allowed if i in tokenizer.special_ids.eos]
        if stops and (len(stops) == len(allowed) or rng.random() < 0.3):
            return ids
        likely = np.intersect1d(allowed, endings) if rng.random() < 0.4 else allowed
        token_id = int(rng.choice(likely if len(likely) else allowed))
        if token_id in tokenizer.special_ids.eos:
            continue
        state.accept(token_id)
        ids.append(token_id)
    return None


def random_schema(rng: random.Random, depth: int = 0) -> Any:
    kinds = ["null", "boolean", "integer", "number", "string", "enum", "const", "union", "ranged", "pattern", "format"]
    if depth < 3:
        kinds += ["array", "tuple", "object", "map", "anyOf", "oneOf", "allOf"] * 2
    match rng.choice(kinds):
        case "union":
            return {"type": rng.sample(["null", "boolean", "integer", "string"], 2)}
        case "ranged":
            low = rng.randint(-1000, 1000)
            kind = rng.choice(["integer", "number"])
            bounds = {"minimum": low, "maximum": low + rng.randint(1, 2000)}
            if rng.random() < 0.3:
                bounds = {"exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 50)}
            if rng.random() < 0.3:
                bounds.pop(rng.choice(list(bounds)))
            if kind == "number" and rng.random() < 0.5:
                bounds = {k: v + rng.choice([0.5, 0.25, 0.125]) for k, v in bounds.items()}
            return {"type": kind, **bounds}
        case "string":
            low = rng.randint(0, 4)
            return rng.choice([{"type": "string"}, {"type": "string", "minLength": low, "maxLength": low + 5}])
        case "pattern":
            patterns = ["^[a-z]{2,4}$", "^a+b?$", "^(x|yz)\\d$", "^\\w+$", "^.{1,3}$", "^[^a-y]+$", "^[.,:]$"]
            return {"type": "string", "pattern": rng.choice(patterns)}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "date-time", "time", "ipv4", "uuid", "email"])}
        case "enum":
            return {"enum": rng.sample([1, "a", "Köln", 'q"uote', None, True, 2.5, "b c", [1, {"k": "v"}]], 3)}
        case "const":
            return {"const": rng.choice([7, "x\n", {"a": [1, 2]}, None])}
        case "array":
            low = rng.randint(0, 2)
            bounds = rng.choice([{}, {"minItems": low}, {"minItems": low, "maxItems": low + 2}, {"maxItems": 2}])
            return {"type": "array", "items": random_schema(rng, depth + 1), **bounds}
        case "tuple":
            return {"type": "array", "prefixItems": [random_schema(rng, depth + 1) for _ in range(2)], "items": False}
        case "object":
            names = rng.sample(["a", "b c", "ü", 'q"', "name", "x" * 20], rng.randint(1, 4))
            properties = {name: random_schema(rng, depth + 1) for name in names}
            required = rng.sample(names, rng.randint(0, len(names)))
            return {"type": "object", "properties": properties, "required": required}
        case "map":
            return {"type": "object", "additionalProperties": random_schema(rng, depth + 1)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
        case "oneOf":
            branch = {"type": "object", "properties": {"k": {"const": "one"}}, "required": ["k"]}
            properties = {"k": {"const": "two"}, "v": random_schema(rng, 3)}
            other = {"type": "object", "properties": properties, "required": ["k", "v"]}
            return {"oneOf": [branch, other, {"type": "string"}]}
        case "allOf":
            return {"allOf": [random_schema(rng, depth + 1)]}
        case kind:
            return {"type": kind}


def json_grammar(schema: Any) -> AnswerGrammar:
    return AnswerGrammar(kind="json_schema", source=check(json.dumps(schema)))
