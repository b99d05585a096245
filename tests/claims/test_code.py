"""The code that made each result is recorded, and results of other code are told apart."""

import importlib
import pathlib
import shutil
import subprocess
import sys

import faked_claims as faked
import pytest

import music_jax
from music_jax import registry
from music_jax.claims import report
from music_jax.claims.code import fingerprint, made_by_other_code
from music_jax.claims.planning import make_plan
from music_jax.claims.tables import make_tables
from music_jax.config import default_config

_PACKAGE = pathlib.Path(music_jax.__file__).parent


def _fingerprint_of_a_copy(tmp_path, edited):
    """Returns the hash that a copy of the package gives after a change of one file."""
    copy = tmp_path / "music_jax"
    shutil.copytree(_PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if edited:
        (copy / edited).write_text((copy / edited).read_text() + "\n# changed\n")
    script = (
        "from music_jax.claims.code import fingerprint\n"
        "from music_jax.config import default_config\n"
        "print(fingerprint(default_config()))"
    )
    environment = {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu", "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return found.stdout.strip()


@pytest.mark.slow
def test_the_hash_changes_with_the_code_of_a_training_and_not_with_that_of_a_report(tmp_path):
    own = fingerprint(default_config())
    assert _fingerprint_of_a_copy(tmp_path / "same", "") == own
    assert _fingerprint_of_a_copy(tmp_path / "report", "claims/report.py") == own
    for file in ("objectives/music.py", "optim.py", "claims/probe.py", "data/crops.py"):
        assert _fingerprint_of_a_copy(tmp_path / file.replace("/", "-"), file) != own


def test_the_file_of_a_registered_objective_counts_for_its_own_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    config, found = faked.load("digits"), []
    music = fingerprint(config)
    config.objective.name = "mine"
    for number in range(2):
        name = f"module_{number}"
        source = f"def make():\n    return lambda a, b: ({number} * (a * b).mean(), {{}})\n"
        (tmp_path / f"{name}.py").write_text(source)
        module = importlib.import_module(name)
        registry.OBJECTIVES["mine"] = registry.RegisteredObjective(module.make)
        found.append(fingerprint(config))
    assert found[0] != found[1]
    assert {code.partition("+")[0] for code in found} == {music}


@pytest.mark.parametrize("name", ["make", "Make"])
def test_an_objective_without_a_file_has_no_hash_of_its_own(monkeypatch, name):
    """As in a notebook or a shell."""
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    names = {"__name__": "__main__"}
    exec("def make():\n    pass\nclass Make:\n    pass\n", names)
    config = default_config()
    music = fingerprint(config)
    config.objective.name = "mine"
    registry.OBJECTIVES["mine"] = registry.RegisteredObjective(names[name])
    assert fingerprint(config) == music


def test_the_page_names_objectives_whose_file_has_changed(tmp_path):
    sweep = faked.make_sweep(tmp_path, methods=("music", "vicreg"))
    for i, cell in enumerate(make_plan(sweep).cells):
        own = "+first" if i == 0 else "+second"
        is_own = sweep.cell_config(cell).objective.name == "music"
        faked.finish(sweep, cell, code="0123456789ab" + own * is_own)
    report.write_report(sweep, make_tables(sweep), sweep.results.directory)
    page = (tmp_path / "claims.md").read_text()
    assert "**Changed between results**: the files that define music." in page
    assert "different code" not in page


def test_the_page_counts_results_of_different_code(tmp_path):
    sweep = faked.make_sweep(tmp_path, methods=("music", "vicreg"))
    cells = make_plan(sweep).cells
    same = fingerprint(sweep.cell_config(cells[0]))
    for i, cell in enumerate(cells):
        faked.finish(sweep, cell, code="0123456789ab" if i < 2 else same)
    assert made_by_other_code(sweep, cells) == [cell.name for cell in cells[:2]]
    report.write_report(sweep, make_tables(sweep), sweep.results.directory)
    page = (tmp_path / "claims.md").read_text()
    assert f"**Results of different code**: {same} {len(cells) - 2}, 0123456789ab 2." in page


def test_results_of_the_same_code_are_not_mentioned(tmp_path):
    sweep = faked.make_sweep(tmp_path)
    for cell in make_plan(sweep).cells:
        faked.finish(sweep, cell, code=fingerprint(sweep.cell_config(cell)))
    assert not made_by_other_code(sweep, make_plan(sweep).cells[:8])
    report.write_report(sweep, make_tables(sweep), sweep.results.directory)
    page = (tmp_path / "claims.md").read_text()
    assert "different code" not in page
    assert "Changed between results" not in page
