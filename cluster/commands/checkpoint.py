"""`expertmesh make-checkpoint`: a seeded random checkpoint of any config, for tests and sizing. Its text is noise."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .serve import read_mapping


def add(commands: Any) -> None:
    parser = commands.add_parser("make-checkpoint", help="write a seeded random checkpoint")
    parser.description = "Write random weights of any Qwen3 configuration. The same seed gives the same files."
    parser.add_argument("--config", required=True, help="a config.json, or a preset: tiny-moe, small-moe, tiny-dense")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder to copy the tokenizer from")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=make_checkpoint)


def make_checkpoint(arguments: argparse.Namespace) -> int:
    from ...make_checkpoint import PRESETS
    from ...make_checkpoint import make_checkpoint as make
    from .console import Stopwatch

    named = arguments.config in PRESETS
    config = arguments.config if named else read_mapping(Path(arguments.config))
    made = make(
        arguments.out,
        config,
        seed=arguments.seed,
        dtype=arguments.dtype,
        tokenizer_folder=arguments.tokenizer or (None if named else _tokenizer_beside(arguments.config)),
        progress=Stopwatch(lambda line: print(line, file=sys.stderr, flush=True)).show,
    )
    if arguments.json:
        print(json.dumps(asdict(made) | {"folder": str(made.folder)}))
    else:
        print(
            f"{made.folder}: {made.num_parameters:,} parameters, {made.num_bytes / 1e6:,.1f} MB, seed {arguments.seed}"
        )
    return 0


def _tokenizer_beside(config_file: str) -> Path | None:
    folder = Path(config_file).parent
    return folder if (folder / "tokenizer.json").exists() else None
