from __future__ import annotations

import pytest
from cli.studies import STUDIES

from grgauge import report


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """The page of each study, by its name."""
    folder = tmp_path_factory.mktemp("pages")
    return {f.__name__: report.write(f(folder / f"{f.__name__}.db"), folder / f"{f.__name__}.html") for f in STUDIES}
