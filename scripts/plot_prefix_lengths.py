"""Draws docs/img/prefix-length.svg: decoding speed against the length of the shared prefix, by way of sharing.

    .venv/bin/python scripts/plot_prefix_lengths.py            measure, then draw (about 10 minutes)
    .venv/bin/python scripts/plot_prefix_lengths.py --redraw   draw the figures of the last measurement

The measurement is that of ``gossamer bench decode``; its figures are kept beside the picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from gossamer.bench.decode import bench_decode

OUTPUT = Path(__file__).parent.parent / "docs" / "img" / "prefix-length.svg"
STYLES = {
    "no-attention": ("attention left out (upper bound)", "#999999", "--"),
    "attention": ("sharing attention", "#0b6e4f", "-"),
    "storage": ("sharing storage only", "#c77d0a", "-"),
    "off": ("sharing off", "#a4243b", "-"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    batch = report["results"][0]["batch"]
    for mode, (label, color, line) in STYLES.items():
        rows = [r for r in report["results"] if r["sharing"] == mode and r["error"] is None]
        if not rows:  # the native runner does not leave attention out
            continue
        axes.plot(
            [r["prefix"] for r in rows],
            [r["decode_tokens_per_s"] for r in rows],
            line,
            color=color,
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({r["prefix"] for r in report["results"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("length of the shared prefix, tokens")
    axes.set_ylabel("tokens per second, all sequences")
    machine = report["machine"]
    axes.set_title(
        f"{batch} sequences over one prefix, SmolLM2-135M in fp32, {machine['threads']} threads of {machine['cpu']}",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--redraw", action="store_true")
    arguments = parser.parse_args()
    figures = OUTPUT.with_suffix(".json")
    if not arguments.redraw:
        report = bench_decode(
            arguments.model, batches=[arguments.batch], prefixes=arguments.prefixes, new=12, progress=print
        )
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(report, indent=1) + "\n")
    draw(json.loads(figures.read_text()), OUTPUT)
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
