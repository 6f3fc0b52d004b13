"""Promise: a schema that is taken is enforced in full, one that would not be is refused with its place and keyword."""

import json
import random

import jsonschema
import pytest
from demo_world import CHECKPOINT, TOKENIZER
from grammar_walks import compiled, json_grammar, random_schema, walk

from expertmesh.cluster.attention.grammar import GrammarCompiler
from expertmesh.router.gateway.json_schema import MAX_DEPTH, MAX_SCHEMA_BYTES, Unsupported, check
from expertmesh.router.gateway.regex_limits import UnsupportedRegex, check_regex


def test_what_a_random_schema_allows_is_valid_by_it():
    compiler = GrammarCompiler.for_checkpoint(CHECKPOINT, TOKENIZER.vocab_size)
    num_valid = 0
    try:
        for seed in range(150):
            rng = random.Random(seed)
            schema = random_schema(rng)
            ids = walk(compiled(compiler, json_grammar(schema)), TOKENIZER, rng)
            text = TOKENIZER.decode(ids or ())
            if ids is None or "\ufffd" in text:  # endless, or bytes that are no text: their length is another one
                continue
            jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
            num_valid += 1
    finally:
        compiler.close()
    assert num_valid > 120


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("nope", "JSON"),
        ("[]", "a schema at #"),
        ("false", "a schema at #"),
        ('{"type": "nope"}', "a type of"),
        ('{"minimum": 1}', "a type of"),
        ('{"type": "string", "minimum": 1}', "no minimum at #"),
        ('{"type": "integer", "multipleOf": 3}', "no multipleOf"),
        ('{"type": "array", "uniqueItems": true}', "no uniqueItems"),
        ('{"type": "object", "not": {}}', "no not"),
        ('{"type": "object", "properties": {"a": {"foo": 1}}}', "at #/properties/a"),
        ('{"type": "object", "required": ["a"]}', "the required property 'a'"),
        ('{"type": "object", "properties": {"a": {}}, "additionalProperties": true}', "either"),
        ('{"enum": []}', "at least one value"),
        ('{"enum": ["a"], "type": "integer"}', "values of type integer"),
        ('{"enum": ["a"], "minLength": 3}', "enum alone"),
        ('{"anyOf": [{}], "type": "string"}', "anyOf alone"),
        ('{"anyOf": []}', "at least one schema"),
        ('{"allOf": [{}, {}]}', "one schema at #/allOf"),
        ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf that differ"),
        ('{"$ref": "http://x/y"}', "into this schema"),
        ('{"$ref": "#/$defs/x"}', "something that is there"),
        ('{"$ref": "#"}', "it leads to itself"),
        (r'{"const": "\ud800"}', "values that can be written"),
        ('{"allOf": [{"$ref": "#"}]}', "it leads to itself"),
        ('{"type": "string", "pattern": "a", "maxLength": 3}', "one of lengths"),
        ('{"type": "string", "pattern": "("}', "a regular expression"),
        ('{"type": "string", "pattern": "a\\"b"}', "without quotes"),
        ('{"type": "string", "format": "nope"}', "a format of"),
        ('{"type": "string", "maxLength": -1}', "0 or more"),
        ('{"items": ' * 40 + "{}" + "}" * 40, "a type of"),
        ('{"allOf": [' * (MAX_DEPTH + 1) + "{}" + "]}" * (MAX_DEPTH + 1), "inside each other"),
        ("[" * 100_000, "at most 32768 bytes"),
        ("[" * MAX_SCHEMA_BYTES, "JSON"),
        (json.dumps({"anyOf": [{"type": "string", "maxLength": n} for n in range(17)]}), "at most 16 strings"),
    ],
)
def test_a_schema_that_would_not_be_enforced_is_refused(schema, said):
    with pytest.raises(Unsupported) as raised:
        check(schema)
    assert said in str(raised.value)


def test_a_discriminated_union_is_taken():
    branches = [
        {"type": "object", "properties": {"kind": {"const": k}, "v": {"type": "integer"}}, "required": ["kind"]}
        for k in ("a", "b")
    ]
    definitions = {"A": branches[0], "B": branches[1]}
    schema = {"$defs": definitions, "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}, {"type": "null"}]}
    assert "anyOf" in json.loads(check(json.dumps(schema)))


@pytest.mark.parametrize(
    ("regex", "said"),
    [
        ("", "bytes"),
        ("(", "a regular expression"),
        ("a" * 5000, "bytes"),
        ("a{129}", "at most 128"),
        ("(?:(?:a{30}){30}){2}", "positions"),
        ("a^b", "^ at the beginning"),
        ("a$b", "$ at the end"),
        (r"x\Z", r"no \Z"),
        (r"(a)\1", r"no \1"),
        (r"\bfoo", r"no \b"),
    ],
)
def test_a_regex_that_would_mean_something_else_is_refused(regex, said):
    with pytest.raises(UnsupportedRegex) as raised:
        check_regex(regex)
    assert said in str(raised.value)
