"""Writes the README's tables from the committed results.

python benchmarks/tables.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def convert_table(record: dict[str, Any]) -> str:
    """Rates of `convert.json`."""
    names = {
        "copy": "plain copy",
        "convert": "`m3-convert convert`",
        "load": "`load`, Orbax folder",
        "load_hugging_face": "`load`, Hugging Face folder",
    }
    rows = [
        f"| {title} | {record['median_gb_per_s'][name]:.2f} | {record['fraction_of_copy'][name]:.0%} |"
        for name, title in names.items()
    ]
    machine, memory = record["machine"], record["memory"]
    return "\n".join(
        [
            f"| {record['bytes'] / 1e9:.1f} GB | GB/s | of the copy |",
            "|---|---|---|",
            *rows,
            "",
            f"Medians of {len(record['seconds']['copy'])} rounds on {machine['cores']} cores of "
            f"{machine['processor']}, {record['date']}, `{record['command']}`. Converting took at most "
            f"{memory['peak_resident_bytes'] / 1e9:.2f} GB of memory, the largest layer being "
            f"{memory['largest_layer_bytes'] / 1e9:.2f} GB.",
        ]
    )


def kernels_table(record: dict[str, Any]) -> str:
    """Times of `kernels.json`: both operations of a decode step, and each of a prefill."""
    titles = {"both": "blocks and attention", "index": "blocks", "attention": "attention"}
    rows = [
        f"| {result['name']} | {titles[result['op']]} | {result['floor']:,.1f} | {result['vllm']:,.1f} | "
        f"{result['kernels']:,.1f} | {result['call']:,.1f} |"
        for result in record["results"]
        if (result["op"] == "both") == result["name"].startswith("decode")
    ]
    environment = record["environment"]
    return "\n".join(
        [
            "| case | operation | floor | vLLM 0.33 | ours, kernels | ours, call |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Microseconds on one {environment['device']}, bf16, {environment['date']}, jax "
            f'{environment["versions"]["jax"]}, `{environment["command"]}`. "Kernels" is the sum of the kernels\' '
            'durations, "call" the time of the jitted call with the gaps between them, as vLLM\'s CUDA graph has them.',
        ]
    )


TABLES = {"convert": convert_table, "kernels": kernels_table}


def with_tables(readme: str) -> str:
    """The README with what stands between the markers of every table made anew."""
    for name, table in TABLES.items():
        record = json.loads((RESULTS / f"{name}.json").read_text())
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert len(pattern.findall(readme)) == 1, name
        readme = pattern.sub(lambda match: f"{match[1]}{table(record)}\n{match[2]}", readme)  # noqa: B023
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the README is out of date")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text()
    new = with_tables(old)
    if check:
        sys.exit(int(new != old))
    path.write_text(new)


if __name__ == "__main__":
    main()
