"""Regenerate the benchmark tables of README and docs/speed.md from bench/results/adamw.csv.

A table stands between <!-- bench:adamw --> and <!-- /bench:adamw -->. docs/speed.md has every row and column, README
only the sizes that users recognise. Of each device the rows of the latest date and commit count. With --check nothing
is written, and the exit status is 1 if a page is not what the rows say.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:adamw -->", "<!-- /bench:adamw -->"

LAYOUTS = {
    "flat": "300, flat buffer",
    "1": "1",
    "300": "300",
    "Llama + LoRA": "176, Llama + LoRA",
    "ResNet-18": "62, ResNet-18",
    "GPT-2 124M": "148, GPT-2 124M",
}

SHORT = {"Llama + LoRA", "ResNet-18", "GPT-2 124M"}
"""The rows of the short table: lists of parameters that users recognise."""

RATIOS = {"plain": "plain", "gauged": "gauged", "by_hand": "by hand"}
"""Variant -> its column, for those that are compared with torch's fused step."""

LEGEND = (
    "One step of torch's fused AdamW in ms; of `grgauge.AdamW` without (plain) and with a gauge (gauged), and of "
    "torch's fused AdamW with norms and EMA by foreach ops (by hand), as a ratio to it. Medians of alternating turns. "
    "Clipped: gauged and with `max_grad_norm`, as a ratio to `clip_grad_norm_` and torch's fused step."
)
MORE = (
    " 20 to 80 % quantiles in ms in parentheses. The last columns are the gauged step's memory traffic (28 bytes a "
    "parameter, 22 in bfloat16) as a share of a plain copy's, and of in-place arithmetic's in one loop."
)

Row = dict[str, str]


def newest(rows: list[Row]) -> dict[str, list[Row]]:
    """Device -> its rows of the latest date, and of the commit that was measured last on that date."""
    runs: dict[str, list[Row]] = {}
    measured = [row["device"] for row in rows if row["variant"] == "roof_loop"]  # earlier runs had no such roof
    for device in dict.fromkeys(measured):
        own = [row for row in rows if row["device"] == device]
        date = max(row["date"] for row in own)
        commit = [row["commit"] for row in own if row["date"] == date][-1]
        runs[device] = [row for row in own if (row["date"], row["commit"]) == (date, commit)]
    return runs


def table(rows: list[Row], full: bool) -> list[str]:
    """The lines of one device's table; of several measurements of one configuration the last counts.

    Raises ValueError if a variant is missing.
    """
    configurations: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        configurations.setdefault((row["dtype"], int(row["numel"]), row["tensors"]), {})[row["variant"]] = row
    first = rows[0]
    columns = ["parameters", "tensors", "torch fused, ms", *RATIOS.values(), "clipped"]
    columns += ["of copy roof", "of in-place roof"] if full else []
    lines = [f"{first['device']}, torch {first['torch']}, {first['commit']}, {first['date']}:", ""]
    lines += [f"| {' | '.join(columns)} |", f"|---:|:---|{'---:|' * (len(columns) - 2)}"]
    order = list(LAYOUTS)
    wanted = sorted(configurations, key=lambda key: (key[0] != "float32", key[1], order.index(key[2])))
    for dtype, numel, layout in wanted if full else [key for key in wanted if key[2] in SHORT]:
        by_variant = configurations[dtype, numel, layout]
        missing = {"torch", *RATIOS, "torch_clip", "clip", "roof", "roof_loop"} - set(by_variant)
        if missing:
            raise ValueError(f"{numel} parameters, tensors {layout}: no row for {', '.join(sorted(missing))}")
        cells = [f"{numel / 1e6:.3g} M{'' if dtype == 'float32' else f' {dtype}'}", LAYOUTS[layout]]
        for variant in ("torch", *RATIOS):
            row = by_variant[variant]
            figure = digits(row["q50_ms"]) if variant == "torch" else f"{float(row['ratio_to_torch_fused']):.2f}"
            cells.append(f"{figure} ({digits(row['q20_ms'])} to {digits(row['q80_ms'])})" if full else figure)
        clip, torch_clip = (float(by_variant[variant]["ratio_to_torch_fused"]) for variant in ("clip", "torch_clip"))
        cells.append(f"{clip / torch_clip:.2f}")
        gauged = by_variant["gauged"]
        for roof in (gauged["roof_gbps"], by_variant["roof_loop"]["gbps"]) if full else ():
            cells.append(f"{float(gauged['gbps']) / float(roof):.0%}".replace("%", " %"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def digits(value: str) -> str:
    """Three significant digits, never in scientific notation."""
    number = float(value)
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def render(page: str, rows: list[Row], full: bool) -> str:
    """The page with its tables replaced. Raises ValueError if the markers are not there, once each and in order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"it must hold the lines {BEGIN} and {END} once each, in this order")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    blocks = [LEGEND + MORE * full, *("\n".join(table(own, full)) for own in newest(rows).values())]
    return before + "\n\n".join([BEGIN, *blocks, END]) + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the page with the short table")
    parser.add_argument("--speed", type=Path, default=ROOT / "docs" / "speed.md", help="the page with the full table")
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "results" / "adamw.csv")
    options = parser.parse_args()
    pages = {options.readme: False, options.speed: True}
    fresh: dict[Path, str] = {}
    try:
        with options.csv.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for page, full in pages.items():
            text = page.read_text(encoding="utf-8")
            try:
                new = render(text, rows, full)
            except ValueError as error:
                parser.exit(2, f"cannot make {page} from {options.csv}: {error}\n")
            if new != text:
                fresh[page] = new
    except FileNotFoundError as error:
        parser.exit(2, f"{error.filename} does not exist\n")
    for page, new in fresh.items():
        if options.check:
            print(f"{page} is stale: run python bench/tables.py", file=sys.stderr)
        else:
            page.write_text(new, encoding="utf-8")
    return 1 if fresh and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
