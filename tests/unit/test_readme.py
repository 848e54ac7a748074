"""The README says what is true of the files beside it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_tables_come_from_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run benchmarks/tables.py"


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_commands_that_ci_runs_stand_first() -> None:
    """.ci/run takes the first line of the first two shell blocks."""
    first, second = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)[:2]
    assert "m3-convert convert examples/tiny-m3" in first
    assert "m3-generate" in first
    assert second.endswith("uv run pytest -n auto")
    assert "\n" not in first + second
