"""TFDS's imagenet2012 from tars of the real layout: a handful of images, placed by hand."""

import io

import numpy as np
import pytest
from imagenet_tars import write_tars

from music_jax.config import default_config
from music_jax.data.decode import decode
from music_jax.data.sources import open_source, prepare
from music_jax.errors import UserError

_SYNSETS = ("n01440764", "n01443537", "n15075141")  # labels 0, 1 and 999


def _jpeg(value):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), value, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _dataset(tmp_path):
    dataset = default_config().dataset
    dataset.update(
        name="imagenet2012", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path / "manual")
    )
    return dataset


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TensorFlow's own
def test_imagenet_is_prepared_from_its_tars_and_read_at_random(tmp_path):
    train = {
        synset: {f"{synset}_{i}.JPEG": _jpeg(60 * number + 10 * i) for i in range(2)}
        for number, synset in enumerate(_SYNSETS)
    }
    write_tars(tmp_path / "manual", train, [_jpeg(20 * i) for i in (1, 2, 3)])
    dataset = _dataset(tmp_path)
    prepare(dataset)

    source = open_source(dataset, "train")
    assert source.num_classes == 1000
    assert source.class_names[999] == "n15075141"
    found = set()
    for i in range(len(source)):
        encoded, label = source.example(i)
        found.add((label, round(decode(encoded, 3).mean())))
    assert found == {(0, 0), (0, 10), (1, 60), (1, 70), (999, 120), (999, 130)}

    source = open_source(dataset, "validation")
    classes = {}
    for i in range(len(source)):
        encoded, label = source.example(i)
        classes[round(decode(encoded, 3).mean())] = source.class_names[label]
    # A sea snake, an alp and a Shetland sheepdog, as every list of the published labels begins.
    assert classes == {20: "n01751748", 40: "n09193705", 60: "n02105855"}
    assert list((tmp_path / "data").rglob("*array_record*"))


def test_missing_tars_are_named_with_the_place_where_they_are_looked_for(tmp_path):
    (tmp_path / "manual").mkdir()
    with pytest.raises(UserError) as error:
        prepare(_dataset(tmp_path))
    for text in ("ILSVRC2012_img_train.tar", str(tmp_path / "manual"), "dataset.manual_dir=DIR"):
        assert text in str(error.value)
