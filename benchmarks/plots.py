"""The plot of the kernels' times over the context: ours, vLLM's and the floor."""

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Sequences or queries, and the operation of each panel, all with 64 query and 4 KV heads.
PANELS = (
    ("decode, 1 sequence: blocks and attention", {"batch": 1, "queries": 1}, "both"),
    ("prefill, 8 K queries: blocks", {"tokens": 8192, "pattern": "random"}, "index"),
    ("prefill, 8 K queries: attention", {"tokens": 8192, "pattern": "random"}, "attention"),
)
LINES = (("vllm", "vLLM 0.33", "#d95f02"), ("kernels", "ours", "#1b70b5"), ("floor", "floor", "#777777"))


def points(record: dict[str, Any]) -> list[dict[str, list[float]]]:
    """For each panel the contexts in tokens and the microseconds of each line, in order of context."""
    panels = []
    for _, wanted, op in PANELS:
        wanted = wanted | {"kv_heads": 4}
        found = sorted(
            (case.get("context") or case["tokens"] + case["prefix"], *(result[line] for line, _, _ in LINES))
            for result in record["results"]
            if result["op"] == op and wanted.items() <= (case := result["case"]).items()
        )
        names = ("context", *(line for line, _, _ in LINES))
        panels.append({name: [row[i] for row in found] for i, name in enumerate(names)})
    return panels


def digest(record: dict[str, Any]) -> str:
    """A short name of everything that the plot shows, which is written into it."""
    return hashlib.sha256(json.dumps([PANELS, LINES, points(record)]).encode()).hexdigest()[:16]


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the plot as an SVG file, the same one for the same figures."""
    with matplotlib.rc_context({"svg.hashsalt": "m3", "font.size": 9}):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        axes = figure.subplots(1, len(PANELS))
        for axis, (title, _, op), panel in zip(axes, PANELS, points(record), strict=True):
            for line, label, colour in LINES:
                style = "--" if line == "floor" else "-"
                axis.plot(panel["context"], panel[line], style, color=colour, marker="o", markersize=3, label=label)
            axis.set(
                xscale="log", yscale="linear" if op == "attention" else "log", title=title, xlabel="context, tokens"
            )
            axis.set_xticks(panel["context"], [f"{context // 1024} K" for context in panel["context"]], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        # Attention costs much the same at any context.
        axes[-1].set_ylim(bottom=0)
        axes[0].set_ylabel("microseconds")
        axes[0].legend()
        figure.savefig(path, metadata={"Date": None, "Identifier": digest(record)})


def is_of(path: Path, record: dict[str, Any]) -> bool:
    """Whether the file is the plot of these figures."""
    return path.exists() and digest(record) in path.read_text()
