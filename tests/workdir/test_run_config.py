"""config.json: what it accepts, and the data locations of a run of somebody else."""

import hashlib
import hmac
import json
import math
import os
import shutil
import stat
import subprocess
import sys

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from small_runs import save_run, small_config
from tfds_sets import IMAGES, png

from music_jax.config import default_config, from_json
from music_jax.data import tfds_source
from music_jax.errors import UserError
from music_jax.evaluate import evaluate
from music_jax.evaluation.run import load_run
from music_jax.linear_eval import linear_eval
from music_jax.report.page import write_report
from music_jax.version import __version__
from music_jax.workdir import run_config
from music_jax.workdir.run_config import (
    as_json,
    check_same_run,
    exclude_foreign_data,
    is_signed,
    read_config,
    sign,
    write_config,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twelve images of two classes: dark and bright."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.Generator(np.random.Philox(key=1))
    for label, name in enumerate(("dark", "bright")):
        (folder / name).mkdir()
        for i in range(6):
            image = rng.integers(0, 100, (28, 28), np.uint8) + np.uint8(150 * label)
            cv2.imwrite(str(folder / name / f"{i}.png"), image)
    return folder


@pytest.fixture(scope="module")
def saved(photos, tmp_path_factory):
    """A run on that folder, and its user's state directory."""
    directory = tmp_path_factory.mktemp("user")
    config = small_config()
    config.dataset.update({"name": "", "path": str(photos)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory / "state"))
        save_run(directory / "run", config)
    return directory / "run", directory / "state"


@pytest.fixture
def own(saved, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(saved[1]))
    return saved[0]


@pytest.fixture
def foreign(saved, monkeypatch, tmp_path):
    """The same run for another user, who has trained something, too."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    sign(default_config())
    return saved[0]


def _listing(directory):
    """Everything below a directory, with what a write would change."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in directory.rglob("*")}


def _both(photos):
    return {"evaluation.train": str(photos), "evaluation.test": str(photos)}


def test_the_signature_is_an_hmac_of_the_data_locations(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "music_jax").mkdir(mode=0o700)
    (tmp_path / "music_jax" / "key").write_bytes(bytes(range(32)))
    (tmp_path / "music_jax" / "key").chmod(0o600)
    config = default_config()
    config.dataset.update({"name": "digits", "data_dir": "/d"})
    text = b'music_jax places {"dataset.data_dir": "/d", "dataset.name": "digits"}'
    assert sign(config) == hmac.new(bytes(range(32)), text, hashlib.sha256).hexdigest()


def test_a_signature_is_valid_for_its_locations_and_its_user_only(own, monkeypatch, tmp_path):
    record = json.loads((own / "config.json").read_text())
    config, signature = from_json(record["config"]), record["signature"]
    assert is_signed(config, signature)
    config.knn.k = 7  # no place
    assert is_signed(config, signature)
    for wrong in (None, "", 5, "ä", signature[:-1], ["a"]):
        assert not is_signed(config, wrong)
    for field, value in (
        ("dataset.path", "/elsewhere"),
        ("dataset.data_dir", "/elsewhere"),
        ("dataset.manual_dir", "/elsewhere"),
        ("dataset.name", "cifar10"),
        ("evaluation.train", "/elsewhere"),
        ("evaluation.test", "cifar10:test"),
        ("semi_supervised.lists", ("/elsewhere", "")),
    ):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({field: value})
        assert not is_signed(changed, signature), field
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert not is_signed(config, signature), "no key"
    assert not os.listdir(tmp_path), "it is only made to sign"
    sign(config)
    assert not is_signed(config, signature), "another key"


def test_only_this_user_can_read_the_key(saved):
    key = saved[1] / "music_jax" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.stat().st_size == 32
    assert os.listdir(key.parent) == ["key"]
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


def test_a_key_that_others_can_read_signs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    config = default_config()
    config.dataset.path = "/photos"
    signature = sign(config)
    assert is_signed(config, signature)
    (tmp_path / "music_jax" / "key").chmod(0o644)
    assert not is_signed(config, signature)
    assert sign(config) is None
    assert "others can read" in capsys.readouterr().out


@pytest.mark.parametrize("home", ["file", "relative"])
def test_without_a_state_directory_a_run_is_saved_unsigned(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file") if home == "file" else "state"
    monkeypatch.setenv("XDG_STATE_HOME", where)
    monkeypatch.chdir(tmp_path)
    config = default_config()
    assert sign(config) is None
    assert capsys.readouterr().out == "", "it names no place that would be asked for"
    config.dataset.path = "/photos"
    assert sign(config) is None
    assert capsys.readouterr().out.count("the run is not signed: ") == 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_of_this_user_is_opened_with_the_data_it_names(own, photos, tmp_path):
    run = load_run(str(own), output=str(tmp_path / "out"))
    assert run.images.name == str(photos)
    assert len(run.images) == 12


def test_data_of_a_foreign_run_is_read_once_the_user_names_it(foreign, photos, tmp_path):
    output = str(tmp_path / "out")
    with pytest.raises(UserError, match=rf"give these.*: --config\.dataset\.path={photos}$"):
        load_run(str(foreign), output=output)
    assert not os.path.exists(output)
    run = load_run(str(foreign), output=output, overrides={"dataset.path": str(photos)})
    assert run.images.name == str(photos)
    run = load_run(str(foreign), output=output, overrides=_both(photos))
    assert run.config.dataset.path == "", "not needed, and not the user's choice"
    assert (len(run.evaluation_sources().train), len(run.images)) == (12, 12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset.data_dir", "/there"),
        ("dataset.manual_dir", "/there"),
        ("dataset.name", "huggingface:mnist"),
        ("dataset.name", "mnist/data_dir=there"),
        ("dataset.name", "hf:somebody/digits"),
        ("dataset.name", "hf:/there"),
        ("evaluation.train", "mnist:train"),
        ("evaluation.test", "/there"),
        ("semi_supervised.lists", ("/there", "")),
    ],
)
def test_every_data_location_of_a_foreign_run_must_be_named(field, value):
    config = default_config()
    config.dataset.name = "mnist"
    config.update_from_flattened_dict({field: value})
    exclude_foreign_data(
        config.copy_and_resolve_references(), {field}, "runs/a", labels=True, images=True
    )
    with pytest.raises(UserError, match=rf"--config\.{field}=") as error:
        exclude_foreign_data(config, (), "runs/a", labels=True, images=True)
    assert str(error.value).startswith("runs/a was not trained by this user on this machine")


def test_a_tfds_name_needs_no_confirmation():
    for name in ("mnist5k", "mnist", "glue/cola", "mnist:3.0.1", "glue/cola:1.0.*"):
        config = default_config()
        config.dataset.name = name
        exclude_foreign_data(config, (), "runs/a", labels=True, images=True)
        assert config.dataset.name == name


def test_a_location_with_control_characters_is_not_printed():
    config = default_config()
    config.dataset.path = "\x1b]0;title\x07"
    with pytest.raises(UserError, match=r"--config\.dataset\.path=LOCATION$"):
        exclude_foreign_data(config, (), "runs/a", labels=True, images=True)


def test_evaluation_writes_a_dataset_only_where_the_user_names_it(foreign, tmp_path):
    given = {"dataset.path": "", "dataset.data_dir": str(tmp_path / "tfds")}
    record = json.loads((foreign / "config.json").read_text())
    record["config"]["dataset"]["name"] = "digits"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"not prepared.*--config\.dataset\.name=digits"):
        load_run(str(tmp_path / "run"), output=str(tmp_path / "out"), overrides=given)
    assert not (tmp_path / "tfds").exists()
    with pytest.raises(UserError, match="no checkpoint"):  # all images have been opened
        load_run(
            str(tmp_path / "run"),
            output=str(tmp_path / "out"),
            overrides=given | {"dataset.name": "digits"},
        )
    assert (tmp_path / "tfds" / "digits" / "1.0.0" / "dataset_info.json").exists()


def test_a_foreign_run_reads_hugging_face_datasets_only_where_the_user_names_them(
    foreign, tmp_path
):
    (tmp_path / "set").mkdir()
    files = {"image": [png(image) for image in IMAGES[:8]], "label": [0, 1] * 4}
    for split in ("train", "test"):
        pq.write_table(pa.table(files), tmp_path / "set" / f"{split}.parquet")
    record = json.loads((foreign / "config.json").read_text())
    record["config"]["dataset"] |= {"name": f"hf:{tmp_path / 'set'}", "path": ""}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    run, output = str(tmp_path / "run"), str(tmp_path / "out")
    given: dict[str, object] = {"dataset.data_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"not trained by this user.*--config\.dataset\.name=hf:/"):
        load_run(run, output=output, overrides=given)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="no checkpoint"):  # all images have been opened
        load_run(run, output=output, overrides=given | {"dataset.name": f"hf:{tmp_path / 'set'}"})
    assert (tmp_path / "cache" / "parquet").exists()


def test_results_go_to_the_output_and_the_run_is_unchanged(foreign, photos, tmp_path):
    before = _listing(foreign)
    found = evaluate(
        str(foreign),
        protocols=("knn",),
        output=str(tmp_path / "new" / "out"),
        overrides=_both(photos) | {"knn.k": 1, "knn.more_k": ()},
    )
    assert _listing(foreign) == before
    assert sorted(os.listdir(tmp_path / "new" / "out")) == ["features", "knn.json"]
    written = json.loads((tmp_path / "new" / "out" / "knn.json").read_text())
    assert written == found["knn"]
    assert written["top1"] == 1.0, "each image is its own nearest neighbor"
    assert written["data"] == {"train": str(photos), "test": str(photos)}


def test_linear_eval_takes_an_output_too(foreign, photos, tmp_path):
    before = _listing(foreign)
    settings = {"num_epochs": 1, "random_crops": False, "validation_fraction": 0.5}
    linear_eval(
        str(foreign),
        output=str(tmp_path / "out"),
        overrides=_both(photos) | {f"linear_eval.{name}": x for name, x in settings.items()},
    )
    assert _listing(foreign) == before
    written = ["features", "knn.json", "linear_classifier.npz", "linear_eval.json"]
    written.append("linear_eval.npz")
    assert sorted(os.listdir(tmp_path / "out")) == written


def test_a_report_of_a_foreign_run_omits_its_images(foreign, photos, tmp_path, capsys):
    before = _listing(foreign)
    path, _ = write_report([str(foreign)], output=str(tmp_path / "a.html"), num_images=16)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "no images are shown" in x]
    assert f"--config.dataset.path={photos}" in line
    assert b"was not trained by this user" in path.read_bytes()
    assert _listing(foreign) == before
    assert sorted(os.listdir(tmp_path)) == ["a.html", "another"]


@pytest.mark.slow
def test_a_report_shows_the_images_that_the_user_names(foreign, photos, tmp_path, capsys):
    before = _listing(foreign)
    write_report(
        [str(foreign)],
        output=str(tmp_path / "a.html"),
        num_images=16,
        overrides={"dataset.path": str(photos)},
    )
    assert "no images are shown" not in capsys.readouterr().out
    assert _listing(foreign) == before


def _features(name, form):
    feature = {"pythonClassName": f"{name}.Feature"}
    if form == "nested":
        feature = {
            "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
            "featuresDict": {"features": {"image": feature}},
        }
    if form == "python_class_name":
        feature = {"python_class_name": f"{name}.Feature"}
    if form == "legacy":
        feature = {"type": f"{name}.Feature", "content": {}}
    if form == "legacy in legacy":
        feature = {
            "type": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "content": {"feature": {"type": f"{name}.Feature", "content": {}}, "length": None},
        }
    return feature


@pytest.mark.parametrize(
    "form", ["plain", "nested", "python_class_name", "legacy", "legacy in legacy"]
)
def test_no_module_is_imported_because_features_json_names_a_class(form, tmp_path, monkeypatch):
    module = "payload_of_" + form.replace(" ", "_")
    (tmp_path / f"{module}.py").write_text("raise SystemExit('the payload ran')")
    monkeypatch.syspath_prepend(tmp_path)
    where = tmp_path / "tfds" / "evil" / "1.0.0"
    where.mkdir(parents=True)
    (where / "features.json").write_text(json.dumps(_features(module, form)))
    info = {"name": "evil", "version": "1.0.0", "fileFormat": "array_record"}
    info["splits"] = [{"name": "train", "shardLengths": ["1"], "numBytes": "1"}]
    (where / "dataset_info.json").write_text(json.dumps(info))
    dataset = default_config().dataset
    for name in ("evil", "evil:1.0.0"):
        dataset.update({"name": name, "data_dir": str(tmp_path / "tfds")})
        with pytest.raises(UserError, match=f"class '{module}.Feature', which is not one of TFDS"):
            tfds_source.open_split(dataset, "train")
    assert module not in sys.modules


@pytest.mark.parametrize("name", ["huggingface:mnist", "kaggle:cats", "a:b/c:1.0.0"])
def test_community_datasets_are_refused(name, tmp_path):
    dataset = default_config().dataset
    dataset.update({"name": name, "data_dir": str(tmp_path)})
    for action in (tfds_source.prepare, lambda it: tfds_source.open_split(it, "train")):
        with pytest.raises(UserError, match="is a community dataset"):
            action(dataset)
    assert not os.listdir(tmp_path)


def test_a_run_without_a_signature_is_opened_once_its_user_trains_it_again(own, photos, tmp_path):
    record = json.loads((own / "config.json").read_text())
    del record["signature"]
    shutil.copytree(own, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    output = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"give these.*: --config\.dataset\.path="):
        load_run(str(tmp_path / "run"), output=output)
    run = load_run(str(tmp_path / "run"), output=output, overrides={"dataset.path": str(photos)})
    assert run.step == 3
    write_config(epath.Path(tmp_path / "run"), from_json(record["config"]))  # as main does
    assert load_run(str(tmp_path / "run"), output=output).images.name == str(photos)


def test_a_read_only_workdir_is_an_error_that_names_the_output_flag(own, tmp_path):
    shutil.copytree(own, tmp_path / "run")
    (tmp_path / "run" / "features").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"features in the workdir is a link.*--output=DIR$"):
        load_run(str(tmp_path / "run"))
    assert load_run(str(tmp_path / "run"), output=str(tmp_path / "out")).step == 3


@pytest.mark.parametrize("damaged", [b"", b"\xff\xfe", b"{}", b'{"config": 1}', b"[" * 9])
def test_a_damaged_config_is_an_error_that_says_what_to_do(tmp_path, damaged):
    (tmp_path / "config.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"cannot read \S+config.json: .*remove the file") as error:
        read_config(epath.Path(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_saved_by_a_windows_editor_can_be_read(tmp_path, encoding):
    text = json.dumps({"config": {"seed": 3}}, indent=2).replace("\n", "\r\n")
    (tmp_path / "config.json").write_bytes(text.encode(encoding))
    assert read_config(epath.Path(tmp_path)) == {"seed": 3}


def _fields(config, prefix=""):
    for name, value in config.items():
        yield from (
            _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
        )


def _save_without(tmp_path, config, field):
    """Writes config.json as by a version without the field."""
    record = as_json(config)
    part = record
    *parents, last = field.split(".")
    for name in parents:
        part = part[name]
    del part[last]
    (tmp_path / "config.json").write_text(json.dumps({"config": record}))


def test_fields_missing_in_a_saved_config_take_their_defaults(tmp_path):
    config = default_config()
    fields = list(_fields(as_json(config)))
    assert len(fields) > 100
    for field in fields:
        _save_without(tmp_path, config, field)
        check_same_run(epath.Path(tmp_path), config)
    config.optimizer.final_scale = 0.25
    _save_without(tmp_path, config, "optimizer.final_scale")
    with pytest.raises(UserError, match=r"optimizer.final_scale: 0.001 there, 0.25 now"):
        check_same_run(epath.Path(tmp_path), config)


def test_removed_fields_are_ignored_unless_they_decide_what_is_trained(tmp_path):
    config = default_config()
    record = as_json(config)
    record["knn"]["gone"] = 1
    record["evaluation"]["gone"] = {"inner": 2}
    (tmp_path / "config.json").write_text(json.dumps({"config": record}))
    check_same_run(epath.Path(tmp_path), config)
    assert as_json(from_json(record)) == as_json(config)
    record["objective"]["gone"] = 1
    (tmp_path / "config.json").write_text(json.dumps({"config": record}))
    with pytest.raises(UserError, match=r"does not fit this version: .*gone"):
        check_same_run(epath.Path(tmp_path), config)


def test_another_precision_resumes_the_run_with_a_warning(tmp_path, capsys):
    config = default_config()
    (tmp_path / "config.json").write_text(json.dumps({"config": as_json(config)}))
    check_same_run(epath.Path(tmp_path), config)
    assert capsys.readouterr().out == ""
    config.compute_dtype = "bfloat16"
    check_same_run(epath.Path(tmp_path), config)
    assert "computing in bfloat16 from here on, in float32 before" in capsys.readouterr().out


def test_a_run_keeps_all_versions_and_commits_with_which_it_was_started(tmp_path, monkeypatch):
    module = tmp_path / "music_jax" / "workdir" / "run_config.py"
    module.parent.mkdir(parents=True)
    module.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    monkeypatch.setattr(run_config, "__file__", str(module))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))  # as in a hook
    run = epath.Path(tmp_path / "run")
    run.mkdir()

    def start():
        write_config(run, default_config())
        return json.loads((run / "config.json").read_text())

    first = start()
    assert first["versions"]["music_jax"] == __version__
    assert first["versions"]["commit"] == head.stdout[:12]
    assert start()["earlier_versions"] == []
    monkeypatch.setattr(run_config, "__version__", "9.9")
    module.write_text("# changed")
    for _ in range(2):
        later = start()
        assert later["versions"]["music_jax"] == "9.9"
        assert later["versions"]["commit"] == head.stdout[:12] + "-dirty"
        assert later["earlier_versions"] == [first["versions"]]
    shutil.rmtree(tmp_path / ".git")
    last = start()
    assert "commit" not in last["versions"]
    assert last["earlier_versions"] == [first["versions"], later["versions"]]
    strange = {"versions": {"jax": math.nan}, "earlier_versions": [1, {"jax": [2]}, {"jax": "0.1"}]}
    (run / "config.json").write_text(json.dumps(last | strange))
    assert start()["earlier_versions"] == [{"jax": "0.1"}]
