"""Writes the README's tables, and the plot that it shows, from the committed results.

python benchmarks/tables.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import plots
from kernels import MOST_COMPILE_S  # pyright: ignore[reportAttributeAccessIssue]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = RESULTS / "kernels.svg"
# What an operation of `kernels.json` is called.
TITLES = {"both": "blocks and attention", "index": "blocks", "attention": "attention"}


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
    """Times of `kernels.json`: both operations of a decode step, and each of a prefill; then the compile times."""
    results = [
        result
        for result in record["results"]
        if (result["op"] == "both") == result["name"].startswith("decode")
        and result["vllm"] is not None
        # Scores and choice do not depend on the pattern.
        and (result["op"], result["case"].get("pattern")) != ("index", "smooth")
    ]
    rows, met = [], []
    ratios: dict[str, list[float]] = {"decode": [], "prefill's blocks": [], "prefill's attention": []}
    for result in results:
        goal, ours = result.get("goal"), result["kernels"]
        ratio = result["vllm"] / ours
        ratios["decode" if result["op"] == "both" else f"prefill's {TITLES[result['op']]}"].append(ratio)
        mark = ""
        if goal is not None:
            met.append(ours <= goal)
            mark = f"{goal:,.0f} {'met' if met[-1] else 'missed'}"
        times = (result["floor"], result["vllm"], ours, result["call"])
        shown = " | ".join(f"{time:,.1f}" for time in times)
        rows.append(f"| {result['name']} | {TITLES[result['op']]} | {shown} | {ratio:.2f} | {mark} |")
    ranges = [f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in ratios.items() if values]
    environment = record["environment"]
    lines = [
        "| case | operation | floor | vLLM 0.33 | ours, kernels | ours, call | vLLM / ours | goal |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"![times over the context](benchmarks/results/{PLOT.name})",
        "",
        f"Microseconds on one {environment['device']}, bf16, {environment['date']}, jax "
        f'{environment["versions"]["jax"]}, `{environment["command"]}`. "Kernels" is the sum of the kernels\' '
        "durations, \"call\" the time of a jitted call from an idle GPU on, the host's work included. vLLM's is "
        "that of a CUDA graph. Ratios and goals go by the kernels; "
        "a goal for other sizes than 8 K queries of 64 heads is in proportion to "
        f"the floor. vLLM's time over ours: {', '.join(ranges)}. Of {len(met)} goals {sum(met)} are met.",
    ]
    if record.get("compile"):
        lines += [
            "",
            "Tracing, lowering and compiling all four operations for a new bucket of shapes took "
            f"{_compiled_in(record['compile'])}, one after the other (goal {MOST_COMPILE_S:.0f} s); side by side, in "
            f"threads, {_compiled_in(record['compile-beside'])}. Other lengths in a bucket compile nothing.",
        ]
    return "\n".join(lines)


def _compiled_in(buckets: list[dict[str, Any]]) -> str:
    which = (
        "in a new process",
        "for another bucket",
        "for one of few blocks, where prefill's attention looks for common ones",
    )
    medians = ", ".join(f"{bucket['total']:.1f} s {name}" for bucket, name in zip(buckets, which, strict=True))
    totals = [total for bucket in buckets for total in bucket["totals"]]
    of_processes = f"medians of {len(buckets[0]['totals'])} processes, {min(totals):.1f} to {max(totals):.1f} s"
    return f"{medians} ({of_processes})"


def kernels_triton_table(record: dict[str, Any]) -> str:
    """Times of `kernels_triton.json`."""
    rows, ratios = [], []
    for result in record["results"]:
        ratios.append(result["kernels"] / result["vllm"])
        times = f"{result['vllm']:,.1f} | {result['kernels']:,.1f} | {ratios[-1]:.2f}"
        rows.append(f"| {result['name']} | {TITLES[result['op']]} | {times} |")
    environment = record["environment"]
    return "\n".join(
        [
            "| case | operation | vLLM 0.33 | jax-triton, kernels | ours / vLLM |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Microseconds on one {environment['device']}, {environment['date']}, `{environment['command']}`. "
            f"The slowest takes {max(ratios):.2f} times as long as vLLM's (goal 1.3).",
        ]
    )


def moe_table(record: dict[str, Any]) -> str:
    """Times of `moe.json`: the routed experts of one layer."""
    rows = []
    for result in record["results"]:
        peer, goal = result["torch"] or {}, result["goal"]
        times = [result["floor"], *(peer.get(name) for name in ("matmuls", "activated")), result["matmuls"]]
        shown = [f"{time:,.0f}" if time else "" for time in times]
        mark = f"{goal:,.0f} {'met' if result['call'] <= goal else 'missed'}" if goal else ""
        rows.append(
            f"| {result['tokens']:,} | {' | '.join(shown)} | {result['kernels']:,.0f} | {result['call']:,.0f} | "
            f"{result['call'] / result['floor']:.2f} | {mark} |"
        )
    environment = record["environment"]
    return "\n".join(
        [
            "| tokens | floor | torch, matmuls | torch, with activation | ours, matmuls with activation | "
            "ours, kernels | ours, call | call / floor | goal |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Microseconds of the routed experts of one layer (128, 4 a token, random) on one {environment['device']}, "
            f"bf16, {environment['date']}, jax {environment['versions']['jax']}, torch {environment['torch']} "
            f'(`torch._grouped_mm`, rows sorted already), `{environment["command"]}`. "Kernels" and "call" are all '
            "that happens behind the router, as above; goals go by the call.",
        ]
    )


def decode_step_table(record: dict[str, Any]) -> str:
    """Times of `decode_step.json`, and the ten longest kernels of its longest step's case of one sequence."""
    rows = [
        f"| {result['name']} | {result['floor']:,.0f} | {result['kernels']:,.0f} | "
        f"{result['call']:,.0f} | {result['launches']:,.0f} | {result['kernels'] / result['floor']:.2f} |"
        for result in record["results"]
    ]
    environment = record["environment"]
    lines = [
        "| case | floor | kernels | call | launches | kernels / floor |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Microseconds on one {environment['device']}, bf16, {environment['date']}, jax "
        f"{environment['versions']['jax']}, `{environment['command']}`. A module is a sparse layer's attention from "
        "its input to its output projection; a step is embedding, three dense and three sparse layers and the final "
        'norm, "with head" also the logits and the greedy choice. "Call" is from an idle GPU on, where so few layers '
        "wait for the host.",
    ]
    profiled = next((r for r in record["results"] if r["case"]["what"] == "step" and r["case"]["batch"] == 1), None)
    if profiled is not None:
        lines += ["", f"The longest kernels of {profiled['name']}:", "", "| kernel | launches | us | floor |"]
        lines += ["|---|---|---|---|"]
        for row in profiled["longest"]:
            what = "" if row["what"] == row["kernel"] else f": {row['what']}"
            floor = "" if row["floor"] is None else f"{row['floor']:,.1f}"
            lines.append(f"| `{row['kernel']}`{what} | {row['launches']:.0f} | {row['us']:,.1f} | {floor} |")
    return "\n".join(lines)


def meshes_table(record: dict[str, Any]) -> str:
    """Times of `meshes.json`: steps and prefills over several GPUs, then the reductions in them."""
    lines = [
        "| mesh | layers | what | floor | NCCL | XLA's kernels | ours | best / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sums: dict[tuple[int, str, int], dict[str, float]] = {}
    # With other flags of XLA than its defaults: for whoever looks into the file.
    meshes = [mesh for mesh in record["meshes"] if not mesh["environment"]["xla_flags"]]
    for mesh in meshes:
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for result in mesh["results"]:
            if result["what"] == "step":
                name = f"decode step, {result['batch']} x {result['context'] // 1024} K"
                found.setdefault(name, {})[result["variant"]] = result
            elif result["what"] == "prefill":
                found.setdefault(f"prefill of {result['tokens'] // 1024} K", {})[result["variant"]] = result
            elif result["what"] == "sum":
                key = (result["devices"], result["dtype"], result["rows"])
                sums.setdefault(key, {})[result["variant"]] = result["us"] - result["without"]
        for name, variants in found.items():
            times = " | ".join(f"{variants[v]['us']:,.0f}" if v in variants else "" for v in ("nccl", "xla", "pallas"))
            floor = next(iter(variants.values()))["floor"]
            best = min(result["us"] for result in variants.values())
            lines.append(
                f"| {mesh['mesh']} | {mesh['layers']} | {name} | {floor:,.0f} | {times} | {best / floor:.2f} |"
            )
    lines += ["", "| one all-reduce | rows | NCCL | XLA's kernels | ours |", "|---|---|---|---|---|"]
    for (devices, dtype, rows), times in sorted(sums.items()):
        shown = " | ".join(f"{times[v]:.1f}" if v in times else "" for v in ("nccl", "xla", "pallas"))
        lines.append(f"| {devices} GPUs, {dtype} | {rows} | {shown} |")
    environment = meshes[0]["environment"]
    dates = " and ".join(sorted({mesh["environment"]["date"] for mesh in meshes}))
    commands = " and ".join(dict.fromkeys(f"`{mesh['environment']['command']}`" for mesh in meshes))
    return "\n".join(
        [
            *lines,
            "",
            f"Microseconds on {environment['devices']} {environment['device']}, bf16, random weights, "
            f"{dates}, jax {environment['versions']['jax']}, {commands}. A step has embedding, the first "
            "layers of the model (three dense, the others sparse), head and greedy choice; calls follow one another. "
            "The all-reduces are of rows of 6,144 in a chain, less the chain without them.",
        ]
    )


TABLES = {
    "convert": convert_table,
    "kernels": kernels_table,
    "kernels_triton": kernels_triton_table,
    "moe": moe_table,
    "decode_step": decode_step_table,
    "meshes": meshes_table,
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(readme: str) -> str:
    """The README with what stands between the markers of every table made anew."""

    def made(match: re.Match[str]) -> str:
        record = json.loads((RESULTS / f"{match[2]}.json").read_text())
        return f"{match[1]}{TABLES[match[2]](record)}\n{match[3]}"

    return MARKED.sub(made, readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the README or the plot is out of date")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text()
    new = with_tables(old)
    kernels = json.loads((RESULTS / "kernels.json").read_text())
    if check:
        sys.exit(int(new != old or not plots.is_of(PLOT, kernels)))
    path.write_text(new)
    plots.draw(kernels, PLOT)


if __name__ == "__main__":
    main()
