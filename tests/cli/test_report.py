"""`grgauge report`: real studies in SQLite, the page they become, and that page in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import closing
from html.parser import HTMLParser

import pytest

from grgauge import Target, report
from grgauge.cli import commands as cli
from grgauge.report import study

optuna = pytest.importorskip("optuna")
from optuna.distributions import FloatDistribution, IntDistribution  # noqa: E402
from optuna.trial import TrialState, create_trial  # noqa: E402

SPACE = {
    "lr": FloatDistribution(1e-5, 1.0, log=True),
    "batch_size": IntDistribution(8, 512, log=True),
    "weight_decay": FloatDistribution(0.0, 1.0),
}
ATTACK = (
    """</title></script><script>document.title = "owned"</script><img src=x onerror=alert(1)> "'&amp; \x00\x1b\ud800"""
)
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def reading(samples, gr_t, gr_s, ready=True, **other):
    place = {"samples": samples, "step": samples // 32}
    return {**place, "gr_t": gr_t, "gr_s": gr_s, "ready": ready, **other}


def trial(state="PRUNED", lr=1e-3, batch=64, value=None, **said):
    params = {"lr": lr, "batch_size": batch, "weight_decay": 0.01}
    return create_trial(
        state=TrialState[state],
        params=params,
        distributions=SPACE,
        user_attrs=said,
        value=2.0 if state == "COMPLETE" and value is None else value,
    )


def segment(i, state="PRUNED", lr=1e-3, batch=64, parent=None, gr_t=8.0, gr_s=0.6, **said):
    """A trial that says everything; each costs 4000 samples."""
    readings = [reading(4000 * i + 200 * k, gr_t * (1 + 0.02 * (k % 3)), gr_s, ready=k > 3) for k in range(20)]
    return trial(
        state,
        lr,
        batch,
        **{
            "parent": parent,
            "reason": "GR_T below its zone",
            "decision": {
                "kind": "retune",
                "rule": "too low",
                "evidence": {"rule": "too low", "step": 60, "quantity": "GR_T", "value": gr_t, "interval": [7.1, 9.2]},
            },
            "samples": 4000,
            "start_samples": 4000 * i,
            "seconds": 90.0,
            "readings": readings,
            "losses": [[4000 * i + 40 * k, 4.0 - 0.01 * k - 0.2 * i] for k in range(100)],
            **said,
        },
    )


def stored(path, trials, name="letters", **attributes):
    study = optuna.create_study(storage=f"sqlite:///{path}", study_name=name)
    study.add_trials(trials)
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    study._storage._backend.engine.dispose()
    return path


def typical(path):
    """Up, too far up, back to the saved weights, afresh, and on to the recommendation."""
    return stored(
        path,
        [
            segment(0, lr=1e-4, batch=256, gr_t=1.5, gr_s=0.2),
            segment(1, lr=1e-3, parent=0),
            segment(2, "FAIL", lr=5e-2, parent=1, gr_t=90.0, reason="rolled back", error="loss is nan"),
            segment(3, lr=8e-3, gr_t=35.0),
            segment(4, "COMPLETE", lr=4e-3, batch=48, parent=1, gr_t=19.5, gr_s=0.58, reason="in the zone"),
            segment(5, "RUNNING", lr=4e-3, batch=48, parent=4, gr_t=20.0, gr_s=0.58, reason=None, decision=None),
        ],
        target={"gr_t": 20.0, "gr_s": 0.58, "gr_t_zone": [18.0, 22.0], "gr_s_zone": [0.5, 0.65]},
        verdict="Train with lr 4e-3 and batch 48: GR_T and GR_S are in the zone.",
        recommendation={"lr": 4e-3, "batch_size": 48, "weight_decay": 0.01},
        used=24_000,
        budget=60_000,
    )


def awkward(path):
    """Everything that may be missing, not finite, far too long or hostile."""
    nan, inf = float("nan"), float("inf")
    readings = [reading(0, None, None), reading(50, nan, 0.5), reading(100, inf, inf), reading(150, -1.0, 2.0), {}, 3]
    return stored(
        path,
        [
            create_trial(state=TrialState.FAIL),
            trial("RUNNING"),
            trial("COMPLETE", value=1e30, readings=readings, losses=[[0, nan], [5, inf], [9, 1e30], [10], "x"]),
            trial("PRUNED", reason=ATTACK * 40, error="word" * 3000, decision=[ATTACK], parent=99, samples="many"),
            trial(
                "PRUNED", reason=7, decision={"kind": ATTACK, "rule": ATTACK, "evidence": ATTACK}, parent=0, samples=0
            ),
            trial("PRUNED", decision={"evidence": {"quantity": ATTACK, "value": 1, "interval": [None]}}, samples=1e9),
            trial("WAITING", readings={"a": 1}, losses=None, seconds=nan),
        ],
        name=ATTACK[:-1],
        verdict=ATTACK,
        recommendation={"lr": nan, "batch_size": "all"},
        target={"gr_t": -3, "gr_s_zone": "wide"},
        used=nan,
        budget=0,
    )


def many(path, n=200):
    def each(i):
        state, parent = ("PRUNED", "COMPLETE", "FAIL")[i % 3], None if i % 9 == 0 else i - 1
        return segment(i, state, lr=1e-4 * 1.04**i, parent=parent, gr_t=1.0 + i, gr_s=0.2 + 0.6 * (i % 7) / 7)

    trials = [each(i) for i in range(n)]
    return stored(path, trials, verdict="many")


def one(path):
    return stored(path, [segment(0)])


def empty(path):
    return stored(path, [])


STUDIES = (typical, awkward, many, one, empty)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {f.__name__: report.write(f(folder / f"{f.__name__}.db"), folder / f"{f.__name__}.html") for f in STUDIES}


class Strict(HTMLParser):
    """Fails on tags that do not close in order; gathers scripts, addresses and the visible words."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.words, self.scripts, self.addresses, self.handlers = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("src", "href", "action")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] not in (["style"], []):
            self.words.append(data)


def parsed(page):
    parser = Strict()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def words(page):
    return " ".join(" ".join(parsed(page).words).split())


def pictures(page):
    found = re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL)
    return [ET.fromstring(html_entities_only_of_xml(svg)) for svg in found]


def html_entities_only_of_xml(svg):
    assert set(re.findall(r"&(\w+);", svg)) <= {"amp", "lt", "gt", "quot"}
    return svg


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f.__name__ for f in STUDIES])
def test_every_page_is_well_formed_and_needs_nothing_else(name, pages):
    page = parsed(pages[name])
    assert page.addresses == page.handlers == []
    assert len(page.scripts) == 1
    text = pages[name].read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    for picture in pictures(pages[name]):
        places = ("d", "points", "x", "y", "cx", "cy", "width", "height")
        numbers = " ".join(value for node in picture.iter() for key, value in node.items() if key in places)
        assert "nan" not in numbers
        assert "inf" not in numbers


def test_a_typical_page_says_it_all(pages):
    said = words(pages["typical"])
    for expected in (
        "Train with lr 4e-3 and batch 48: GR T and GR S are in the zone.",
        "Learning rate 4e-3 trial 5",
        "Batch size 48 weight decay 1e-2",
        "Cost 24 000 40% of 60 000 samples",
        "1 completed, 3 stopped early, 1 failed, 1 running · 9 min",
        "trials 0 → 1 → 4 → 5 ★",
        "rolled back: loss is nan",
        "retune · too low: GR T 8 in [7.1, 9.2]",
        "healthy 18 to 22",
        "from 1",
    ):
        assert expected in said
    assert all(landmark in said for landmark in ("1 agree", "19 noise", "361 bounce"))


def test_pictures_hold_a_mark_a_bar_and_curves_for_each_trial(pages):
    wide_and_narrow = [svg for svg in pictures(pages["typical"]) if svg.get("aria-label")]
    assert len(wide_and_narrow) == 6
    plane, _, timeline, _, curves, _ = wide_and_narrow
    assert "6 trials on 3 lines of weights" in plane.get("aria-label")

    def of(picture, kind):
        groups = [g for g in picture.iter("g") if any(kind in node.get("class", "").split() for node in g)]
        return [int(g.get("data-trial")) for g in groups]

    assert sorted(of(plane, "dot") + of(plane, "star") + of(plane, "cross")) == [0, 1, 2, 3, 4, 5]
    assert (of(plane, "star"), of(plane, "cross")) == ([5], [2])
    # 4 went on with 1's weights, and came after 3; 3 began afresh after 2
    assert sorted(of(plane, "heir")) == [1, 2, 4]
    assert sorted(of(plane, "fresh")) == [3, 4]
    assert of(timeline, "bar") == [0, 1, 2, 3, 4, 5]
    assert of(timeline, "elbow") == [1, 2, 4, 5]
    assert sorted(of(curves, "curve")) == sorted([0, 1, 2, 3, 4, 5] * 5)
    bars = list(timeline.iter("rect"))
    assert len({rect.get("width") for rect in bars}) == 1  # equal cost, equal length
    assert [float(a.get("x")) for a in bars] == sorted(float(a.get("x")) for a in bars)
    assert all(g.find("title").text.startswith("#") for g in timeline.iter("g"))


def test_what_a_study_holds_stays_text(pages):
    text = pages["awkward"].read_text(encoding="utf-8")
    assert "<script>document" not in text
    assert "<img" not in text
    assert html.escape('<script>document.title = "owned"</script>') in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    digest = re.search(r"script-src '(sha256-[^']+)'", text)
    assert digest


def test_what_is_missing_is_unknown(pages):
    said = words(pages["awkward"])
    assert "Learning rate unknown Batch size unknown" in said
    assert "Cost unknown" in said
    assert said.count("unknown") > 10
    assert "nan" not in said.lower().replace("nan value", "")
    assert words(pages["one"]).count("No verdict has been stored yet.") == 2  # the title, and on the page
    assert "no trial has begun" in words(pages["empty"])


def test_a_long_last_trial_leaves_the_tuning_its_room(tmp_path):
    """The axis ends at three times what came before it, and says how far the trial goes on."""
    last = segment(2, "COMPLETE", parent=1, samples=200_000)
    long = report.page(report.load(stored(tmp_path / "long.db", [segment(0), segment(1, parent=0), last])))
    assert long.count("samples (the last trial goes on to 208k)") == 4
    even = report.page(report.load(stored(tmp_path / "even.db", [segment(0), segment(1, parent=0)])))
    assert "goes on to" not in even


def test_target_of_the_study_is_drawn(tmp_path):
    target = {"gr_t": 10.0, "gr_s": 0.3, "gr_t_zone": [9.0, 11.0], "gr_s_zone": [0.25, 0.35]}
    db = stored(tmp_path / "run.db", [segment(0)], target=target)
    assert report.load(db).target == Target(10.0, 0.3, (9.0, 11.0), (0.25, 0.35))
    assert "GR T 9 to 11 and GR S 0.25 to 0.35" in words(report.write(db, tmp_path / "page.html"))


def test_lines_of_weights_follow_the_newest_heir(tmp_path):
    study = report.load(typical(tmp_path / "run.db"))
    assert [[trial.number for trial in line] for line in study.lines] == [[0, 1, 4, 5], [2], [3]]
    assert study.best is not None
    assert study.best.number == 5


def test_two_hundred_trials_make_a_page_of_bearable_size(pages):
    assert pages["many"].stat().st_size < 1_000_000
    assert pages["many"].read_text(encoding="utf-8").count("<tr") == 201


# --- storages and the command ----------------------------------------------------------------------------------------


def test_any_storage_will_do(tmp_path):
    db = typical(tmp_path / "run.db")
    by_file = report.page(report.load(db))
    assert report.page(report.load(f"sqlite:///{db}", "letters")) == by_file
    memory = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=memory, study_name="letters").add_trials(
        optuna.load_study(study_name="letters", storage=f"sqlite:///{db}").trials
    )
    assert [t.lr for t in report.load(memory).trials] == [t.lr for t in report.load(db).trials]


def test_command_writes_the_page_and_leaves_the_study_alone(tmp_path, monkeypatch, capsys):
    db = typical(tmp_path / "run.db")
    before = db.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "run.db"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "Train with lr 4e-3 and batch 48: GR_T and GR_S are in the zone.",
        f"Report: {tmp_path / 'report.html'}",
    ]
    assert db.read_bytes() == before
    assert "4e-3" in words(tmp_path / "report.html")


def test_json_is_one_document(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(typical(tmp_path / "run.db")), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "study": "letters",
        "verdict": "Train with lr 4e-3 and batch 48: GR_T and GR_S are in the zone.",
        "recommendation": {"lr": 4e-3, "batch_size": 48, "weight_decay": 0.01},
        "trial": 5,
        "used": 24_000,
        "budget": 60_000,
        "trials": 6,
        "outcomes": {"completed": 1, "stopped early": 3, "failed": 1, "running": 1},
        "report": str(out),
    }


def complaint(capsys, *arguments):
    assert cli.main(["report", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("grgauge report: ")
    assert err.count("\n") == 1
    return err


def test_a_file_that_is_not_there_is_not_made(tmp_path, capsys):
    assert f"there is no file {tmp_path / 'rnu.db'}" in complaint(capsys, tmp_path / "rnu.db")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_storage_is_refused_and_left_alone(tmp_path, capsys):
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("not a database, but long enough to be read as one" * 9)
    with closing(sqlite3.connect(other)) as database:
        database.execute("create table t (x)")
        database.commit()
    before = other.read_bytes()
    out = tmp_path / "page.html"
    assert "not a database" in complaint(capsys, text, "--out", out)
    assert "no such table" in complaint(capsys, other, "--out", out)
    assert "as an Optuna storage" in complaint(capsys, "carrier-pigeon://home", "--out", out)
    assert other.read_bytes() == before
    assert not out.exists()


def test_the_study_must_be_there_and_be_one(tmp_path, capsys):
    db = stored(tmp_path / "run.db", [], name="first")
    assert "holds no study 'third', only first" in complaint(capsys, db, "--study", "third")
    stored(db, [segment(0)], name="second")
    assert "2 studies, choose one of them: first, second" in complaint(capsys, db)
    assert cli.main(["report", str(db), "--study", "second", "--out", str(tmp_path / "page.html")]) == 0
    assert "second" in words(tmp_path / "page.html")


def test_an_unwritable_page_is_a_wrong_argument(tmp_path, capsys):
    err = complaint(capsys, typical(tmp_path / "run.db"), "--out", tmp_path / "nowhere" / "page.html")
    assert "choose another file with --out" in err


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert study.INSTALL in complaint(capsys, tmp_path / "run.db")


def test_optuna_is_not_imported_before_it_is_used():
    code = "import sys; from grgauge import cli, report; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# --- a real browser --------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
PHONE, DESK = (390, 844), (1280, 900)

PROBE = """<script>
addEventListener("load", () => {
  const all = (root, what) => [...root.querySelectorAll(what)];
  const seen = all(document, "svg[aria-label]").filter(svg => svg.clientWidth);
  const outside = all(document, "main *").filter(
    part => !part.closest(".scroller") && part.getBoundingClientRect().right > innerWidth + 1);
  const over = (p, q) => Math.min(p.x + p.width, q.x + q.width) - Math.max(p.x, q.x) > 2
    && Math.min(p.y + p.height, q.y + q.height) - Math.max(p.y, q.y) > 5;
  const collide = seen.flatMap(svg => {
    const boxes = all(svg, "text").map(text => [text.textContent, text.getBBox()]).filter(([, box]) => box.width);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) => over(p, q)).map(([b]) => a + " / " + b));
  });
  const scroller = document.querySelector(".scroller");
  seen[0]?.querySelector(".dot")?.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  parent.document.documentElement.dataset.probe = JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, collide, pictures: seen.length,
    outside: outside.map(part => part.outerHTML.slice(0, 80)),
    background: getComputedStyle(document.body).backgroundColor,
    letters: Math.min(...seen.flatMap(svg => all(svg, "text")).map(
      text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)),
    table: scroller && [scroller.scrollWidth, scroller.clientWidth],
    tip: document.getElementById("tip").textContent, title: document.title});
});
</script></body>"""


def opened(page, folder, size, *flags):
    """What the probe saw in the page, and what the console said."""
    text = page.read_text(encoding="utf-8")
    # the probe may run only where the page's own ban on foreign scripts is lifted
    text = re.sub(r"script-src '[^']+'", "script-src 'unsafe-inline'", text).replace("</body>", PROBE)
    # in a frame, since no window of chromium's is narrower than 500 pixels
    frame = f'<iframe srcdoc="{html.escape(text)}" style="border: 0; width: {size[0]}px; height: {size[1]}px"></iframe>'
    outside = folder / "frame.html"
    outside.write_text(f'<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">{frame}')
    dom, console = browser(outside, folder, DESK, "--dump-dom", *flags)
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, console
    return json.loads(html.unescape(found[1])), console


def browser(page, folder, size, *flags):
    window = f"--window-size={size[0]},{size[1]}"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", window, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize("size", [PHONE, DESK])
@pytest.mark.parametrize("name", [f.__name__ for f in STUDIES])
def test_no_page_overflows_its_window(name, size, pages, tmp_path):
    seen, console = opened(pages[name], tmp_path, size)
    assert seen["inner"] == size[0]
    assert seen["scroll"] <= size[0]
    assert seen["outside"] == []
    assert console == []
    assert seen["title"].endswith(" · GR-Gauge")
    if name != "empty":
        assert seen["pictures"] == 3  # of each the one that was drawn for this width
        assert seen["letters"] > 8.5
        assert seen["collide"] == []
    if name == "typical":
        assert seen["table"][0] <= seen["table"][1]  # cards on a phone
        assert seen["title"].startswith("Train with lr 4e-3 and batch 48")
        assert re.match(r"#\d stopped early", seen["tip"])


@needs_browser
def test_dark_follows_the_reader(pages, tmp_path):
    light, _ = opened(pages["typical"], tmp_path, DESK)
    dark, console = opened(pages["typical"], tmp_path, DESK, "--blink-settings=preferredColorScheme=0")
    brightness = [sum(map(int, re.findall(r"\d+", seen["background"])[:3])) for seen in (light, dark)]
    assert brightness[0] > 700 > 100 > brightness[1]
    assert console == []


@needs_browser
@pytest.mark.parametrize("name", ["typical", "awkward"])
def test_the_page_as_written_runs_its_own_script_and_no_other(name, pages, tmp_path):
    dom, console = browser(pages[name], tmp_path, DESK, "--dump-dom")
    assert console == []
    assert re.search(r'<g class="trial[^>]*aria-label="#0 ', dom)  # made by the script out of a title
    foreign = tmp_path / "foreign.html"
    text = pages[name].read_text(encoding="utf-8")
    foreign.write_text(text.replace("</body>", "<script>document.title = 'owned'</script></body>"), encoding="utf-8")
    dom, console = browser(foreign, tmp_path, DESK, "--dump-dom")
    assert "<title>owned" not in dom
    assert "Content Security Policy" in " ".join(console)


@needs_browser
def test_it_can_be_looked_at_and_printed(pages, tmp_path):
    picture, paper = tmp_path / "page.png", tmp_path / "page.pdf"
    browser(pages["typical"], tmp_path, PHONE, f"--screenshot={picture}")
    browser(pages["typical"], tmp_path, DESK, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    assert paper.read_bytes().startswith(b"%PDF")
