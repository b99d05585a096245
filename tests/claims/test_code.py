"""The code that made each result is recorded, and results of other code are told apart."""

import importlib
import pathlib
import shutil
import sys

import faked_claims as faked
import pytest
from etils import epath

import music_jax
from music_jax import registry
from music_jax.claims import code, report
from music_jax.claims.code import fingerprint, made_by_other_code
from music_jax.claims.planning import make_plan
from music_jax.claims.tables import make_tables
from music_jax.config import default_config

_PACKAGE = pathlib.Path(music_jax.__file__).parent


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        *((file, True) for file in ("objectives/music.py", "optim.py", "claims/probe.py")),
        *((file, True) for file in ("data/crops.py", "config/defaults.py", "train/step.py")),
        *((file, False) for file in ("claims/report.py", "report/page.py", "main.py")),
    ],
)
def test_the_hash_changes_with_the_code_of_a_training_and_not_with_that_of_a_report(
    tmp_path, monkeypatch, file, counts
):
    copy = tmp_path / "music_jax"
    shutil.copytree(_PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "_ROOT", epath.Path(copy))
    before = code._hash_package.__wrapped__()
    assert before == code._hash_package()  # of the package itself
    (copy / file).write_text((copy / file).read_text() + "\n# changed\n")
    assert (code._hash_package.__wrapped__() != before) == counts


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
