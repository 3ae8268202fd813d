"""The numbers in the docs are those of kept results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_kept_results():
    command = [sys.executable, str(ROOT / "scripts/write_tables.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
