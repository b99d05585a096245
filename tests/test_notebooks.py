"""The notebooks of launch/colab: as they are saved, and run from start to end."""

import pathlib
import runpy

import nbformat
import pytest
from processes import ROOT

_COLAB = ROOT / "launch" / "colab"
_NOTEBOOKS = sorted(_COLAB.glob("*.ipynb"))
# Where the project is published; launch/README.md tells how to change it.
_REPOSITORY = "music-jax/music_jax"


def _read(path):
    return nbformat.read(path, nbformat.NO_CONVERT)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _pictures(notebook):
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_all_six_notebooks_exist():
    assert {path.stem for path in _NOTEBOOKS} == {
        "first_steps",
        "loss_in_your_own_optax_loop",
        "own_folder_of_images",
        "own_backbone_and_objective",
        "cifar10_on_colab_tpu_or_gpu",
        "comparing_objectives",
    }


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_with_its_outputs_and_pictures(path):
    notebook = _read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < 500_000
    assert [cell.execution_count for cell in _code(notebook)] == list(
        range(1, len(_code(notebook)) + 1)
    )
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert "application/vnd.jupyter.widget" not in path.read_text(encoding="utf-8")
    assert _pictures(notebook) >= 2
    text = path.read_text(encoding="utf-8")
    assert str(pathlib.Path.home()) not in text
    assert "/tmp/" not in text


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_on_colab_from_the_projects_repository(path):
    first = _read(path).cells[0].source.splitlines()[0]
    assert f"/github/{_REPOSITORY}/blob/main/launch/colab/{path.name})" in first
    assert f"git clone -q https://github.com/{_REPOSITORY}\n" in path.read_text().replace(
        "\\n", "\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_start_to_end(path, monkeypatch):
    monkeypatch.setenv("EPOCHS", "4")
    execute = runpy.run_path(str(_COLAB / "execute.py"))["execute"]
    saved, found = _read(path), execute(path)
    assert _pictures(found) == _pictures(saved)
