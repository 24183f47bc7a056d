"""What a study of trials found, as one HTML page that needs no network, and works without scripts.

load   a stored study as plain numbers
page   those as HTML
write  both, into a file
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

from . import charts, numerals
from .numerals import UNKNOWN
from .study import HUES, OUTCOMES, ReportError, Study, Trial, load

__all__ = ["ReportError", "Study", "load", "page", "write"]


def page(study: Study) -> str:
    """The study as one HTML document."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script  # ours
    # the only script that a browser may run here, whatever the study contains
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return Template(template).substitute(
        digest=digest,
        study=escape(study.name),
        finding=escape(f"{numerals.clip(study.headline, 120)} · GR-Gauge"),
        headline=_rich(study.headline),
        rest=charts.tag("p", _rich(study.rest), class_="rest") if study.rest else "",
        tiles=_tiles(study),
        body=_body(study) if study.trials else EMPTY,
        gr_t=f"{study.target.gr_t:g}",
        gr_s=f"{study.target.gr_s:g}",
    )


def write(storage: str | Path | BaseStorage, path: str | Path, study_name: str | None = None) -> Path:
    """Write the report on a stored study to `path` and return it.

    Raises ReportError as `load` does, OSError if the file cannot be written.
    """
    path = Path(path)
    path.write_text(page(load(storage, study_name)), encoding="utf-8")
    return path


def _rich(words: str) -> str:
    """Escaped, with GR_T and GR_S as subscripts, and without line breaks inside numbers."""
    lowered = re.sub(r"GR_([TS])\b", r"GR<sub>\1</sub>", escape(words))
    return re.sub(r"\d[\d.]*e-\d+", r"<span class='whole'>\g<0></span>", lowered)


def _tiles(study: Study) -> str:
    decay = "" if math.isnan(study.decay) else f"weight decay {numerals.scientific(study.decay)}"
    shown = study.best or study.running
    from_trial = f"trial {shown.number}{', running' * (shown is study.running)}" if shown else ""
    lr, batch = (study.running.lr, study.running.batch) if study.running else (study.lr, study.batch)
    if not math.isnan(study.budget) and study.budget > 0.0 and not math.isnan(study.used):
        share = f"{study.used / study.budget:.0%} of {numerals.count(study.budget)} samples"
    else:
        share = "samples"
    counted = [f"{study.outcomes[outcome]} {outcome}" for outcome in OUTCOMES.values() if study.outcomes[outcome]]
    outcomes = ", ".join(words.replace(" ", "\u00a0") for words in counted)
    seconds = [trial.seconds for trial in study.trials if not math.isnan(trial.seconds)]
    took = numerals.duration(sum(seconds)) if seconds else ""
    tiles = [
        ("Learning rate", numerals.scientific(lr), from_trial),
        ("Batch size", numerals.count(batch), decay),
        ("Cost", numerals.count(study.used), share),
        ("Trials", str(len(study.trials)), " · ".join(filter(None, [outcomes, took]))),
    ]
    return "".join(
        charts.tag(
            "div",
            charts.tag("dt", name),
            charts.tag("dd", escape(value)),
            charts.tag("dd", escape(note), class_="note"),
            class_="tile",
        )
        for name, value, note in tiles
    )


def _body(study: Study) -> str:
    target = study.target
    healthy = "GR_T {:g} to {:g} and GR_S {:g} to {:g}".format(*target.gr_t_zone, *target.gr_s_zone)
    legend = "".join(
        charts.tag("li", charts.tag("i", class_=f"swatch {hue}"), words)
        for hue, words in [
            *((f"l{i}", escape(_named(line, study))) for i, line in enumerate(study.lines[:HUES])),
            *([(f"l{HUES}", f"other lines: {len(study.lines) - HUES}")] if len(study.lines) > HUES else []),
        ]
    )
    outcomes = "".join(
        charts.tag("li", charts.tag("i", class_=f"swatch {charts.class_of(outcome)}"), outcome)
        for outcome in OUTCOMES.values()
        if outcome in study.outcomes
    )
    heirs = any(trial.parent is not None for trial in study.trials)
    link = charts.tag("li", charts.tag("i", class_="swatch link"), "inherited weights") if heirs else ""
    lines = charts.tag("ul", legend, class_="legend column")
    aside = charts.tag("div", "<h3>Lines of weights</h3>", lines, ARROWS, class_="aside")
    compared = any(trial.compared for trial in study.trials)
    sections = [
        _section(
            "Where the gauges went",
            _rich(f"The box is health: {healthy}. Each mark is where a trial's gauges ended."),
            charts.tag("div", _twice(charts.plane, study), aside, class_="beside"),
        ),
        _section(
            "What each trial cost",
            "A bar is a trial, as long as the samples it took.",
            charts.tag("ul", outcomes, link, class_="legend"),
            _twice(charts.timeline, study),
        ),
        _section(
            "How training went",
            "Over the same samples, in the colours of the lines of weights; gauges as read, early ones included."
            + " While two learning rates are compared nothing is drawn." * compared,
            _twice(charts.curves, study),
        ),
        _section("Trials", "", _table(study)),
    ]
    return "".join(sections)


ARROWS = """<h3>Arrows and marks</h3><ul class="legend column">
<li><svg class="glyph" viewBox="0 0 34 12" aria-hidden="true"><path class="arrow heir" d="M1 6H27"/>\
<polygon class="head" points="33,6 25,2.5 25,9.5"/></svg>went on with these weights</li>
<li><svg class="glyph" viewBox="0 0 34 12" aria-hidden="true"><path class="arrow fresh" d="M1 6H27"/>\
<polygon class="head" points="33,6 25,2.5 25,9.5"/></svg>proposed next, with other weights</li>
<li><svg class="glyph" viewBox="0 0 34 12" aria-hidden="true"><circle class="dot" cx="17" cy="6" r="4.2"/></svg>\
end of a trial</li>
<li><svg class="glyph" viewBox="0 0 34 12" aria-hidden="true"><path class="cross" d="M13 2l8 8m0 -8l-8 8"/></svg>\
a failed one</li>
<li><span class="glyph">★</span>the recommended one</li></ul>"""


EMPTY = "<section><h2>Nothing to show yet</h2><p>The study is there, but no trial has begun. Write the report again \
once one has.</p></section>"


def _named(line: Sequence[Trial], study: Study) -> str:
    numbers = [str(trial.number) for trial in line]
    shown = numbers if len(numbers) <= 6 else [*numbers[:3], "…", *numbers[-2:]]
    name = ("trials " if len(numbers) > 1 else "trial ") + " → ".join(shown)
    return name + ("\u00a0★" if study.best in line else "")


def _section(title: str, lead: str, *inside: str) -> str:
    return charts.tag("section", f"<h2>{title}</h2>", f"<p class='lead'>{lead}</p>" if lead else "", *inside)


def _twice(draw: Callable[[Study, float], str], study: Study) -> str:
    return "".join(
        charts.tag("div", draw(study, width), class_=name)
        for name, width in (("wide", charts.WIDE), ("narrow", charts.NARROW))
    )


def _table(study: Study) -> str:
    decays = any(not math.isnan(trial.decay) for trial in study.trials)
    head = "".join(charts.tag("th", _rich(name), scope="col") for name in ["#", "outcome", *_numbers(decays), WHY])
    return charts.tag(
        "div",
        charts.tag(
            "table",
            charts.tag("thead", charts.tag("tr", head)),
            charts.tag("tbody", *(_row(t, study, decays) for t in study.trials)),
        ),
        class_="scroller",
        role="region",
        tabindex=0,
        aria_label="Table of trials",
    )


WHY = "why it ended"


def _numbers(decays: bool) -> list[str]:
    """The names of a row's numbers; a phone repeats them on each trial's card."""
    return ["LR", "batch", *(["decay"] if decays else []), "weights", "samples", "loss", "GR_T", "GR_S"]


def _row(trial: Trial, study: Study, decays: bool) -> str:
    best = trial is study.best
    gr_t, gr_s = trial.place or (math.nan, math.nan)
    numbers = [
        numerals.scientific(trial.lr),
        numerals.count(trial.batch),
        *([numerals.scientific(trial.decay)] if decays else []),
        "new" if trial.parent is None else f"from {trial.parent}",
        numerals.count(trial.samples),
        numerals.short(trial.loss),
        numerals.short(gr_t),
        UNKNOWN if math.isnan(gr_s) else f"{gr_s:.2f}",
    ]
    ended = "still running" if trial.outcome == "running" and trial.reason == UNKNOWN else trial.reason
    first, rest = ended[:180], ended[180:]
    reason = _rich(first) if not rest else f"<details><summary>{_rich(first)}…</summary>…{_rich(rest)}</details>"
    asides = [words for words in (trial.evidence, *trial.notes) if words]
    evidence = "".join(charts.tag("small", _rich(numerals.clip(words, 240))) for words in asides)
    return charts.tag(
        "tr",
        charts.tag("th", f"{trial.number}{' ★' if best else ''}", scope="row", class_=study.hues[trial.number]),
        charts.tag("td", charts.tag("span", trial.outcome, class_=f"pill {charts.class_of(trial.outcome)}")),
        *(
            charts.tag("td", escape(number), class_="unknown" if number == UNKNOWN else "number", data_name=name)
            for name, number in zip(_numbers(decays), numbers, strict=True)
        ),
        charts.tag("td", reason, evidence, class_="why"),
        class_="best" if best else None,
        data_trial=trial.number,
    )
