"""The folders for OptunaHub load, run as their examples say, and have what the registry asks for."""

from __future__ import annotations

import os
import re
from pathlib import Path

import optuna
import pytest
import yaml

REGISTRY = Path(__file__).parents[2] / "examples" / "optunahub" / "package"
PACKAGES = ["samplers/gauge", "pruners/gauge"]

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_example_runs_on_the_local_folder(package, monkeypatch, capsys):
    optunahub = pytest.importorskip("optunahub")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    monkeypatch.setattr(
        optunahub, "load_module", lambda name: optunahub.load_local_module(name, registry_root=str(REGISTRY))
    )
    names = {}
    source = (REGISTRY / package / "example.py").read_text()
    exec(compile(source, f"{package}/example.py", "exec"), names)
    study = names["study"]
    assert type(study.sampler).__name__ == "GaugeSampler" or type(study.pruner).__name__ == "GaugePruner"
    assert len(study.trials) == 8
    assert all(any(key.startswith("grgauge:reading:") for key in trial.user_attrs) for trial in study.trials)
    assert "lr" in capsys.readouterr().out


@pytest.mark.parametrize("package", PACKAGES)
def test_the_folder_has_what_the_registry_asks_for(package):
    folder = REGISTRY / package
    names = {"LICENSE", "README.md", "__init__.py", "example.py", "requirements.txt"}
    assert set(os.listdir(folder)) - {"__pycache__"} == names
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert set(fields) == {"author", "title", "description", "tags", "optuna_versions", "license"}
    assert fields["license"] == "MIT License"
    assert (folder / "LICENSE").read_text().startswith("MIT License")
    assert package.split("/")[0].removesuffix("s") in fields["tags"]
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["Abstract", "APIs", "Installation", "Example", "Others"]
    assert (folder / "example.py").read_text() in text
