"""The file table of docs/architecture.md names every file that exists, and says what the file itself says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_file_table_is_the_one_that_the_docstrings_give():
    command = [sys.executable, str(ROOT / "docs" / "file_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
