"""Every Python snippet of README and the site runs, and every `>>>` example of a docstring says what comes out.

The snippets of a page share their names and run in order. One that cannot run here is marked in the page with
`<!--- skip: next -->`.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import grgauge
import grgauge_kernels

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_SNIPPETS = [page for page in PAGES if "```python" in page.read_text("utf-8")]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules():
    for package in (grgauge, grgauge_kernels):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            runs = found.name.endswith("__main__")  # the command, when it is imported
            missing = found.name.endswith(".timm") and find_spec("timm") is None  # needs torchvision
            if not (runs or missing):
                yield found.name


def examples(name):
    """The docstrings of a module with an example in them."""
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(name), name) if test.examples]


DOCSTRINGS = [pytest.param(test, id=test.name) for name in modules() for test in examples(name)]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=[page.relative_to(ROOT).as_posix() for page in WITH_SNIPPETS])
def test_the_snippets_of_a_page_run(page):
    document = Sybil([PythonCodeBlockParser(), SkipParser()]).parse(page)
    document.namespace["__name__"] = "__main__"
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("test", DOCSTRINGS)
def test_the_examples_of_a_docstring_say_what_comes_out(test):
    torch.manual_seed(0)
    report: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append)
    assert outcome.failed == 0, "".join(report)
