"""`grgauge report`: real studies in SQLite, and the page they become."""

from __future__ import annotations

import html
import re

import pytest
from cli.pages import parsed, pictures, words
from cli.studies import STUDIES, segment, stored, typical

from grgauge import Target, report


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
        "While two learning rates are compared nothing is drawn.",
    ):
        assert expected in said
    assert all(landmark in said for landmark in ("1 agree", "19 noise", "361 bounce"))


def test_a_page_without_a_comparison_does_not_speak_of_one(tmp_path):
    one = stored(tmp_path / "one.db", [segment(0, "COMPLETE", notes=["a probe was refused"])])
    assert "are compared" not in words(report.write(one, tmp_path / "one.html"))


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


def test_a_study_that_still_trains_says_where_it_is(tmp_path):
    live = segment(1, "RUNNING", lr=1e-3, parent=0, reason=None, decision=None)
    said = words(report.write(stored(tmp_path / "live.db", [segment(0), live]), tmp_path / "live.html"))
    assert "Still training: trial 1, lr 1e-3, batch 64. No verdict yet." in said
    assert "Learning rate 1e-3 trial 1, running" in said
    assert "still running" in said


def test_the_finding_is_the_title_and_a_shared_reason_is_given_once(tmp_path):
    verdict = "lr 1e-3, batch 64: loss 2\nLR and batch: cannot tell (late)."
    path = report.write(stored(tmp_path / "one.db", [segment(0)], verdict=verdict), tmp_path / "one.html")
    assert "<h1>lr 1e-3, batch 64: loss 2</h1>" in path.read_text("utf-8").replace(
        "<span class='whole'>1e-3</span>", "1e-3"
    )
    assert "LR and batch: cannot tell (late)." in words(path)


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
