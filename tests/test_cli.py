"""Configs and fields that a command cannot take: one line on standard error, exit code 2."""

import pytest
from processes import run

_FIELDS = "this command takes no config file, only fields of one"
_EMPTY = "from ml_collections.config_dict import ConfigDict as get_config"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("main", ("--config={file}",), "{file}' is no config file, such as configs/digits.py"),
        ("main", ("--config", "nowhere.py"), "cannot read the config file 'nowhere.py'"),
        ("main", ("--config={nothing}",), "must return a config"),
        ("main", ("--config={empty}",), "the config lacks the field 'accumulation_steps'"),
        ("main", ("--config={typo}",), 'Did you mean "batch_size" instead of "batchsize"?'),
        (
            "main",
            ("--config=configs/digits.py", "--config.objectve.name=vicreg"),
            "no field 'objectve.name'; the nearest known one is 'objective.name'",
        ),
        (
            "main",
            ("--config=configs/digits.py", "--config.objective=vicreg"),
            "config.objective is a group of fields; give one of them, such as "
            "--config.objective.name=VALUE",
        ),
        ("evaluate", ("--config.knn.kk=3",), "no field 'knn.kk'; the nearest known one is 'knn.k'"),
        ("linear_eval", ("--config.knnn.k=3",), "the nearest known one is 'knn.k'"),
        ("import_weights", ("--config.dataset.nam=x",), "the nearest known one is 'dataset.name'"),
        ("evaluate", ("--config=configs/digits.py",), _FIELDS),
        ("evaluate", ("--config=configs/digits.py", "--config.knn.k=3"), _FIELDS),
    ],
)
def test_a_config_or_field_that_is_none(command, arguments, message, tmp_path):
    files = {
        "file": "",
        "nothing": "def get_config(): pass",
        "empty": _EMPTY,
        "typo": "from music_jax.config import *\ndef get_config(): default_config().batchsize = 3",
    }
    paths = {name: str(tmp_path / f"{name}.py") for name in files}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    arguments = [argument.format(**paths) for argument in arguments]
    code, out, err = run(f"music_jax.{command}", f"--workdir={tmp_path}", *arguments)
    assert code == 2, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert message.format(**paths) in err
    assert not out
