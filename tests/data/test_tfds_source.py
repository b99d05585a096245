"""Datasets by TFDS name: ours, TFDS's own (mocked), and the ones that do not exist."""

import io
import subprocess
import sys

import cv2
import numpy as np
import pytest
from imagenet_tars import write_tars
from tfds_sets import write_set

from music_jax.config import default_config
from music_jax.data.decode import decode
from music_jax.data.tfds_source import open_split, prepare
from music_jax.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def _dataset(name, data_dir, **fields):
    dataset = default_config().dataset
    dataset.update(name=name, data_dir=data_dir, **fields)
    return dataset


def test_processes_that_prepare_the_same_dataset_at_once_all_succeed(tmp_path):
    program = (
        "import sys\n"
        "import tensorflow_datasets\n"
        "from music_jax.config import default_config\n"
        "from music_jax.data.tfds_source import open_split, prepare\n"
        "dataset = default_config().dataset\n"
        f"dataset.update(name='digits', data_dir={str(tmp_path)!r})\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "prepare(dataset); print(len(open_split(dataset, 'train')))\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        output, errors = run.communicate(timeout=120)
        assert output.split()[-1:] == ["1437"], errors


def test_part_of_a_split_is_that_part(data_dir):
    dataset = _dataset("digits", data_dir)
    prepare(dataset)
    whole, half = open_split(dataset, "train"), open_split(dataset, "train[50%:]")
    assert len(half) == 719
    assert half.example(0) == whole.example(718)


def test_a_dataset_of_tfds_itself_is_read_the_same_way(tmp_path):
    import tensorflow_datasets as tfds

    png = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()

    def records(self, split, decoders):
        assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
        return [{"image": png, "label": i % 10} for i in range(12)]

    with tfds.testing.mock_data(as_data_source_fn=records):
        source = open_split(_dataset("cifar10", str(tmp_path)), "train")
    assert (len(source), source.num_classes) == (12, 10)
    assert source.example(11) == (png, 1)


def test_an_unknown_dataset_is_an_error_with_the_nearest_name(data_dir):
    with pytest.raises(UserError, match=r"no dataset 'cifar1O'.*did you mean 'cifar10'"):
        prepare(_dataset("cifar1O", data_dir))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_key": "picture"}, "no feature 'picture'.*'image', 'label'"),
        ({"label_key": "class"}, "no feature 'class'"),
    ],
)
def test_a_missing_feature_is_an_error(data_dir, fields, message):
    prepare(_dataset("digits", data_dir))
    with pytest.raises(UserError, match=message):
        open_split(_dataset("digits", data_dir, **fields), "train")


def test_a_missing_split_is_an_error(data_dir):
    prepare(_dataset("digits", data_dir))
    with pytest.raises(UserError, match=r"'trian'.*'test', 'train'"):
        open_split(_dataset("digits", data_dir), "trian")


def test_an_unwritable_directory_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"dataset\.data_dir"):
        prepare(_dataset("digits", str(tmp_path / "file")))


def test_a_dataset_that_needs_tensorflow_is_an_error_without_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="preparing dataset 'cifar10' needs TensorFlow"):
        prepare(_dataset("cifar10", str(tmp_path)))


_TENSORS = {
    "float32": np.random.default_rng(0).normal(1000, 300, (3, 6, 5, 13)).astype(np.float32),
    "uint16": np.random.default_rng(0).integers(0, 65536, (3, 6, 5, 2), dtype=np.uint16),
    "uint8": np.random.default_rng(0).integers(0, 256, (3, 6, 5), dtype=np.uint8),
}


@pytest.mark.parametrize("dtype", _TENSORS)
def test_images_that_are_tensors_are_read_as_they_were_written(dtype, tmp_path):
    import tensorflow_datasets as tfds

    images = _TENSORS[dtype]
    feature = tfds.features.Tensor(shape=images.shape[1:], dtype=images.dtype.type)
    write_set(tmp_path, "tensors", {"train": [0, 1, 0]}, make=images.__getitem__, image=feature)
    source = open_split(_dataset("tensors", str(tmp_path)), "train")
    channels = images.shape[3] if images.ndim == 4 else 1
    found = [source.example(i) for i in range(3)]
    decoded = [decode(image, channels, dtype=dtype) for image, _ in found]
    # TFDS shuffles the records of a split.
    order = [[np.array_equal(x.squeeze(), y) for y in images].index(True) for x in decoded]
    assert sorted(order) == [0, 1, 2]
    assert [label for _, label in found] == [[0, 1, 0][i] for i in order]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_images_of_more_than_eight_bits_are_read_as_they_were_written(dtype, tmp_path):
    import tensorflow_datasets as tfds

    values = np.random.default_rng(0).normal(1000, 300, (6, 5, 1)).astype(dtype)
    if dtype == "uint16":
        content = cv2.imencode(".png", values)[1].tobytes()
    else:  # TFDS stores the four bytes of a value as the four channels of a PNG.
        rgba = values.view(np.uint8)
        content = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    feature = tfds.features.Image(
        shape=(None, None, 1), dtype=values.dtype.type, encoding_format="png"
    )
    feature.encode_example = lambda example: example  # which needs TensorFlow
    write_set(tmp_path, "deep", {"train": [0]}, make=lambda i: content, image=feature)
    source = open_split(_dataset("deep", str(tmp_path)), "train")
    np.testing.assert_array_equal(decode(source.example(0)[0], 1, dtype=dtype), values)


def test_a_feature_that_holds_no_images_is_an_error(tmp_path):
    import tensorflow_datasets as tfds

    feature = tfds.features.Tensor(shape=(4,), dtype=np.float32)
    write_set(tmp_path, "vectors", {"train": [0]}, make=lambda i: np.ones(4, "f4"), image=feature)
    with pytest.raises(UserError, match=r"not an Image, nor a Tensor.*; none is$"):
        open_split(_dataset("vectors", str(tmp_path)), "train")


_SYNSETS = ("n01440764", "n01443537", "n15075141")  # labels 0, 1 and 999


def _jpeg(value):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), value, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _imagenet(tmp_path):
    dataset = default_config().dataset
    dataset.update(
        name="imagenet2012", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path / "manual")
    )
    return dataset


def test_our_datasets_are_prepared_and_read_without_tensorflow(tmp_path):
    program = (
        "import importlib.machinery\n"
        "find = importlib.machinery.PathFinder.find_spec\n"
        "importlib.machinery.PathFinder.find_spec = lambda name, *args: (\n"
        "    None if name.partition('.')[0] == 'tensorflow' else find(name, *args))\n"
        "from music_jax.config import default_config\n"
        "from music_jax.data.tfds_source import open_split, prepare\n"
        "dataset = default_config().dataset\n"
        f"dataset.update(name='digits', data_dir={str(tmp_path)!r})\n"
        "prepare(dataset); print(len(open_split(dataset, 'train[:50%]')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["718"], done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TensorFlow's own
def test_imagenet_is_prepared_from_its_tars_and_read_at_random(tmp_path):
    train = {
        synset: {f"{synset}_{i}.JPEG": _jpeg(60 * number + 10 * i) for i in range(2)}
        for number, synset in enumerate(_SYNSETS)
    }
    write_tars(tmp_path / "manual", train, [_jpeg(20 * i) for i in (1, 2, 3)])
    dataset = _imagenet(tmp_path)
    prepare(dataset)

    source = open_split(dataset, "train")
    assert source.num_classes == 1000
    assert source.class_names[999] == "n15075141"
    found = set()
    for i in range(len(source)):
        encoded, label = source.example(i)
        found.add((label, round(decode(encoded, 3).mean())))
    assert found == {(0, 0), (0, 10), (1, 60), (1, 70), (999, 120), (999, 130)}

    source = open_split(dataset, "validation")
    classes = {}
    for i in range(len(source)):
        encoded, label = source.example(i)
        classes[round(decode(encoded, 3).mean())] = source.class_names[label]
    # A sea snake, an alp and a Shetland sheepdog, as every list of the published labels begins.
    assert classes == {20: "n01751748", 40: "n09193705", 60: "n02105855"}
    assert list((tmp_path / "data").rglob("*array_record*"))


def test_missing_tars_are_named_with_the_directory_where_they_are_expected(tmp_path):
    (tmp_path / "manual").mkdir()
    with pytest.raises(UserError) as error:
        prepare(_imagenet(tmp_path))
    for text in ("ILSVRC2012_img_train.tar", str(tmp_path / "manual"), "dataset.manual_dir=DIR"):
        assert text in str(error.value)
