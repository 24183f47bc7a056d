"""Regenerate the benchmark tables of README and docs from bench/results/adamw.csv and training.csv.

A table stands between <!-- bench:NAME --> and <!-- /bench:NAME -->, its name being adamw, bytes or training. Of adamw,
docs/speed.md has every row and column, README only the sizes that users recognise. Of each device the rows of the
latest date and commit count. With --check nothing is written, and the exit status is 1 if a page is not what the rows
say.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import ttest_rel

ROOT = Path(__file__).resolve().parents[1]

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
    " In parentheses are the 20 and 80 % quantiles of the times themselves, in ms. The last columns are the gauged "
    "step's memory traffic (28 bytes a parameter, 22 in bfloat16) as a share of a plain copy's, and of in-place "
    "arithmetic's in one loop."
)

BYTES = {
    "states": "bf16 moments",
    "clip_states": "clipped, bf16 moments",
    "torch_bf16": "torch, all bf16",
    "torchao_bf16": "torchao, all bf16",
    "stochastic": "all bf16",
}
"""Variant -> its column in the table of steps that move fewer bytes."""

BYTES_LEGEND = (
    "One step of torch's fused AdamW on float32 parameters in ms, and as a ratio to it, from the same run: the gauged"
    " step with moments in bfloat16 (20 bytes a parameter instead of 28); the same clipped, as a ratio to "
    "`clip_grad_norm_` and torch's step; and on bfloat16 parameters (14 bytes) torch's own fused AdamW, torchao's "
    "with stochastic rounding, and ours, gauged, with `state_dtype=torch.bfloat16, stochastic_rounding=True`. The "
    "last column is ours to torch's in bfloat16."
)

METHODS = {
    "torch": "`torch.optim.AdamW`, float32",
    "plain": "`grgauge.AdamW`, float32",
    "states": "`grgauge.AdamW`, moments in bfloat16",
    "torchao_8bit": "torchao `AdamW8bit`",
    "bitsandbytes_8bit": "bitsandbytes `AdamW8bit`",
    "torch_bf16": "`torch.optim.AdamW`, all bfloat16",
    "torchao_bf16": "torchao `_AdamW`, all bfloat16, rounded stochastically",
    "stochastic": "`grgauge.AdamW`, all bfloat16, rounded stochastically",
}
"""Method of bench/training.py -> what the table calls it."""

TRAINING_LEGEND = (
    "Final losses by seed: mean ± standard deviation, and mean of the paired differences to torch's AdamW in float32 "
    "with the same weights and batches, with its 95 % interval. Bytes per parameter: what parameter, gradient and "
    "moments take, and what one pass over them moves. Time is a step's at 50 M parameters in one tensor as a ratio to"
    " torch's fused AdamW in float32, from `bench/results/adamw.csv`; – where it is not measured."
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
            between = f"<br>({digits(row['q20_ms'])} to {digits(row['q80_ms'])})"  # a line of its own: cells are narrow
            cells.append(figure + between * full)
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


def adamw(rows: list[Row], full: bool) -> list[str]:
    """The blocks of the table of float32 and bfloat16 steps."""
    alike = [row for row in rows if row["dtype"] != "mixed"]
    return [LEGEND + MORE * full, *("\n".join(table(own, full)) for own in newest(alike).values())]


def fewer_bytes(rows: list[Row]) -> list[str]:
    """The blocks of the table of steps that move fewer bytes."""
    runs = newest([row for row in rows if row["dtype"] == "mixed"])
    blocks = [BYTES_LEGEND]
    for own in runs.values():
        first, configurations = own[0], dict[tuple[int, str], dict[str, float]]()
        for row in own:
            ratios = configurations.setdefault((int(row["numel"]), row["tensors"]), {})
            ratios[row["variant"]] = float(row["ratio_to_torch_fused"])
            if row["variant"] == "torch":
                ratios["ms"] = float(row["q50_ms"])
        columns = ["parameters", "tensors", "torch fused, ms", *BYTES.values(), "of torch's bf16"]
        lines = [f"{first['device']}, torch {first['torch']}, {first['commit']}, {first['date']}:", ""]
        lines += [f"| {' | '.join(columns)} |", f"|---:|:---|{'---:|' * (len(columns) - 2)}"]
        for (numel, layout), ratios in configurations.items():
            ratios["clip_states"] /= ratios["torch_clip"]
            found = [f"{ratios[v]:.2f}" if v in ratios else "–" for v in BYTES]
            cells = [f"{numel / 1e6:.3g} M", LAYOUTS[layout], digits(str(ratios["ms"])), *found]
            lines.append(f"| {' | '.join(cells)} | {ratios['stochastic'] / ratios['torch_bf16']:.2f} |")
        blocks.append("\n".join(lines))
    return blocks if runs else [*blocks, "Not measured yet: `make bench`."]


def training(rows: list[Row], steps: list[Row]) -> list[str]:
    """The blocks of the table of final losses; `steps` are the rows of adamw.csv."""
    times = step_times(steps)
    blocks = [TRAINING_LEGEND]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        of_method = {method: {row["seed"]: row for row in own if row["method"] == method} for method in METHODS}
        first, fewest = own[0], min(map(len, filter(None, of_method.values())))
        about = f"{int(first['parameters']):,} parameters, {int(first['steps']):,} steps of {first['batch']} samples"
        columns = [
            "method",
            "bytes held",
            "moved",
            "time",
            "training loss",
            "difference",
            "held-out loss",
            "difference",
        ]
        lines = [f"**{task.capitalize()}** ({about}; {fewest} seeds):", ""]
        lines += [f"| {' | '.join(columns)} |", f"|:---|{'---:|' * (len(columns) - 1)}"]
        for method, name in METHODS.items():
            seeds = sorted(of_method[method].keys() & of_method["torch"].keys())
            if len(seeds) < 2:  # no spread, no interval
                lines.append(f"| {name} |{' – |' * (len(columns) - 1)}")
                continue
            row = of_method[method][seeds[0]]
            cells = [name, row["held_bytes"], row["moved_bytes"], times.get(method, "–")]
            for column in ("train_loss", "held_out_loss"):
                ours, theirs = ([float(of_method[m][seed][column]) for seed in seeds] for m in (method, "torch"))
                cells += [
                    f"{fmean(ours):.4g}<br>± {stdev(ours):.2g}",
                    "–" if method == "torch" else apart(ours, theirs),
                ]
            lines.append(f"| {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return blocks


def apart(ours: list[float], theirs: list[float]) -> str:
    """Mean of the paired differences and its 95 % interval."""
    if ours == theirs:
        return "0"
    low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    return f"{fmean(ours) - fmean(theirs):+.2g}<br>({low:+.2g} to {high:+.2g})"


def step_times(rows: list[Row]) -> dict[str, str]:
    """Method -> its step's time at 50 M parameters in one tensor, as a ratio to torch's fused AdamW in float32."""
    at = [row for row in rows if (row["numel"], row["tensors"]) == ("50000000", "1")]
    times: dict[str, str] = {}
    for dtype in ("float32", "mixed"):
        for own in list(newest([row for row in at if row["dtype"] == dtype]).values())[:1]:
            times |= {row["variant"]: f"{float(row['ratio_to_torch_fused']):.2f}" for row in own}
    return times


def put(page: str, name: str, blocks: list[str]) -> str:
    """The page with its table replaced. Raises ValueError if the markers are not there, once each and in order."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"it must hold the lines {begin} and {end} once each, in this order")
    before, rest = page.split(begin)
    return before + "\n\n".join([begin, *blocks, end]) + rest.split(end)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md, docs and bench/results")
    options = parser.parse_args()
    root: Path = options.root
    fresh: dict[Path, str] = {}
    try:
        steps, trainings = (read(root / "bench" / "results" / name) for name in ("adamw.csv", "training.csv"))
        tables: dict[Path, dict[str, Callable[[], list[str]]]] = {
            root / "README.md": {"adamw": lambda: adamw(steps, full=False)},
            root / "docs" / "speed.md": {"adamw": lambda: adamw(steps, full=True), "bytes": lambda: fewer_bytes(steps)},
            root / "docs" / "large-models.md": {"training": lambda: training(trainings, steps)},
        }
        for page, makes in tables.items():
            text = new = page.read_text(encoding="utf-8")
            try:
                for name, make in makes.items():
                    new = put(new, name, make())
            except ValueError as error:
                parser.exit(2, f"cannot make {page}: {error}\n")
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


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())
