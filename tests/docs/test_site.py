"""The site builds without a warning, and its figures are what the results say."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command, timeout):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_site_builds_without_warnings_and_needs_no_other_server(tmp_path):
    built = run("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"), timeout=120)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "reference" / "grgauge" / "index.html").read_text("utf-8")
    assert 'id="grgauge.Gauge.split_backward"' in page  # the reference is made from the sources
    for html in (tmp_path / "site").rglob("*.html"):
        text = html.read_text("utf-8")
        for loaded in ('src="http', 'rel="stylesheet" href="http', 'rel="preconnect"'):
            assert loaded not in text, f"{html.name} loads something from another server: {loaded}"


def test_the_benchmark_tables_are_what_the_results_say():
    checked = run("bench/tables.py", "--check", timeout=60)
    assert checked.returncode == 0, checked.stderr


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("\n") <= 150
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link.split("#")[0]).is_file(), link
