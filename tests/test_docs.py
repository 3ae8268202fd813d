"""The numbers in the docs are those of kept results."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_kept_results():
    command = [sys.executable, str(ROOT / "scripts/write_tables.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_each_folder_of_kept_results_has_its_line_and_each_line_its_folder():
    results = ROOT / "benchmarks/results"
    named = re.findall(r"`(\d{4}-\d\d-\d\d-[a-z0-9-]+)`", (results / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in results.iterdir() if path.is_dir())
