"""Write docs/files.md, the table file -> what it answers, from the docstrings. `--check` only compares."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "",
    "router",
    "router/client",
    "router/gateway",
    "experts",
    "cluster",
    "cluster/attention",
    "cluster/commands",
    "kernels",
)
FOLDERS += ("proto", "deploy", "deploy/demo_model", "bench")


def first_sentence(path: Path) -> str:
    """The docstring's first paragraph, up to its first full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.split(". ")[0].removesuffix(".").replace("|", "\\|")


def table() -> str:
    lines = ["# Files", "", "Made from the docstrings by `python docs/file_table.py`.", ""]
    for folder in FOLDERS:
        files = [p for p in sorted((ROOT / folder).glob("*.py")) if p.name != "__init__.py" and "_pb2" not in p.name]
        rows = [f"| `{p.relative_to(ROOT)}` | {first_sentence(p)} |" for p in files]
        lines += [f"## {folder or 'root'}", "", "| file | answers |", "|---|---|", *rows, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    target = ROOT / "docs" / "files.md"
    if "--check" not in sys.argv:
        target.write_text(table())
    elif not target.exists() or target.read_text() != table():
        sys.exit("docs/files.md is not what the docstrings give; run `python docs/file_table.py`")
