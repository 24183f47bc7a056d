"""The command line as a shell sees it: arguments, exit codes, streams; and `grgauge doctor`."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import pytest
import torch

import grgauge_kernels as gk
from grgauge.cli import console, main
from grgauge.cli.commands import demo
from grgauge_kernels.backends import cpu

WITHOUT_EXTRAS = "import sys; sys.modules['rich'] = sys.modules['matplotlib'] = None; "


def run(*arguments, code="", cwd=None):
    command = [sys.executable, "-c", f"{code}import sys; from grgauge.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, timeout=120, check=False)


@pytest.fixture
def on_terminal(monkeypatch):
    monkeypatch.setattr(console, "on_terminal", lambda: True)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "command"),
        (["dmeo"], "invalid choice"),
        (["demo", "--steps", "9"], "9 is too few"),
        (["demo", "--steps", "many"], "invalid"),
        (["demo", "--seed", "-1"], "out of range"),
        (["doctor", "--steps", "20"], "unrecognized"),
    ],
)
def test_a_wrong_argument_is_exit_code_2_and_says_which(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["doctor", "--help"]])
def test_help_lists_the_exit_codes(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert "130  interrupted" in capsys.readouterr().out


def test_a_closed_stdout_is_no_traceback():
    command = [sys.executable, "-c", "import sys; from grgauge.cli import main; sys.exit(main())", "doctor"]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    assert (closed.returncode, closed.stderr) == (0, "")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("grgauge 0.")


@pytest.mark.parametrize("name", ["nowhere/plane.png", ".", "plane.docx"])
def test_an_unusable_out_is_refused_before_training(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--json", "--out", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("grgauge demo: ")
    assert err.count("\n") == 1
    assert name in err
    assert list(tmp_path.iterdir()) == []


def test_the_check_of_out_leaves_no_trace(tmp_path):
    new, old = tmp_path / "new.png", tmp_path / "old.svg"
    old.write_text("kept")
    assert demo.checked_picture(new) == new
    assert demo.checked_picture(old) == old
    assert not new.exists()
    assert old.read_text() == "kept"


# --- extras that are missing -----------------------------------------------------------------------------------------


def test_json_works_without_rich_and_without_matplotlib(tmp_path):
    one_run = "from grgauge.cli import char_transformer as runs; runs.LEARNING_RATES = (1e-3,); "
    done = run("demo", "--json", "--steps", "10", code=WITHOUT_EXTRAS + one_run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["picture"] is None
    assert done.stderr == f"No picture: it needs matplotlib: {demo.INSTALL}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_picture_asked_for_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--out", "plane.png"]) == 2
    assert capsys.readouterr() == ("", f"grgauge demo: --out needs matplotlib: {demo.INSTALL}\n")


@pytest.mark.usefixtures("on_terminal")
def test_the_live_table_needs_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["demo"]) == 2
    assert capsys.readouterr() == (
        "",
        f"grgauge demo: the live table needs rich: {demo.INSTALL} (or pass --json)\n",
    )


# --- streams ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_exit_code_130_without_a_traceback(tmp_path):
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{hears}; import sys; from grgauge.cli import main; sys.exit(main())", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert "three learning rates" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "grgauge demo: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_an_ascii_terminal_is_no_reason_to_crash(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    main(["doctor"])
    print("2×", end="", flush=True)
    assert sys.stdout.buffer.getvalue().endswith(b"2?")


def test_a_closed_pipe_is_nobodys_mistake():
    command = f"{sys.executable} -c 'import sys; from grgauge.cli import main; sys.exit(main())' doctor | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_json_is_what_is_installed(capsys):
    code = main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["versions"]) == {"grgauge-kernels", "python", "torch", "triton", "numpy"}
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(facts["cuda"]) == torch.cuda.device_count()
    assert facts["cpu"]["model"]
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert {name: state["available"] or state["reason"] for name, state in facts["backends"].items()} == gk.backends()
    assert code == (0 if facts["ok"] else 1)


def test_doctor_names_the_instruction_set_of_the_cpu_backend(capsys):
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["cpu"]["instruction_set"] == cpu.isa()


@pytest.mark.parametrize("rich", [True, False])
def test_doctor_lists_every_backend_with_and_without_rich(rich, on_terminal, monkeypatch, capsys):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    main(["doctor"])
    out = capsys.readouterr().out
    assert all(name in out for name in (*gk.backends(), torch.__version__, "devices"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is not the one that counts")
def test_doctor_fails_without_a_native_backend_and_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "unavailable", lambda device=None: "libgrgauge_cpu.so is not built; run `pip install .`")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "missing: libgrgauge_cpu.so is not built; run `pip install .`" in out
    assert "cpu has no native backend" in out.splitlines()[-1]
