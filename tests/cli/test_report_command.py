"""`grgauge report` as a command: which storages it reads, what it prints, and what it refuses."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing

import optuna
from cli.pages import words
from cli.studies import segment, stored, typical

from grgauge import report
from grgauge.cli import main
from grgauge.report import study


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
    assert main(["report", "run.db"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "Train with lr 4e-3 and batch 48: GR_T and GR_S are in the zone.",
        f"Report: {tmp_path / 'report.html'}",
    ]
    assert db.read_bytes() == before
    assert "4e-3" in words(tmp_path / "report.html")


def test_json_is_one_document(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(typical(tmp_path / "run.db")), "--out", str(out), "--json"]) == 0
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
    assert main(["report", *map(str, arguments)]) == 2
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
    assert main(["report", str(db), "--study", "second", "--out", str(tmp_path / "page.html")]) == 0
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
