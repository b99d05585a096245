"""Lists of images by file name, as SimCLR's are for ImageNet."""

import cv2
import numpy as np
import pytest

from music_jax.data.folder import open_folder
from music_jax.data.sources import Source
from music_jax.errors import UserError
from music_jax.evaluation.image_lists import rows_of_list


@pytest.fixture
def source(tmp_path):
    for wordnet in ("n01", "n02"):
        (tmp_path / "train" / wordnet).mkdir(parents=True)
        for i in range(4):
            path = tmp_path / "train" / wordnet / f"{wordnet}_{i}.JPEG"
            cv2.imwrite(str(path.with_suffix(".jpg")), np.zeros((4, 4, 3), np.uint8))
            path.with_suffix(".jpg").rename(path)
    return open_folder(str(tmp_path / "train"))


def _list(tmp_path, *lines):
    path = tmp_path / "list.txt"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def test_images_are_found_by_the_name_of_their_file(source, tmp_path):
    path = _list(tmp_path, "n02_1.JPEG", "n01_3.JPEG", "", "n02/n02_0.JPEG")
    rows = rows_of_list(source, path)
    assert [source.record_name(i) for i in rows] == [
        "n01/n01_3.JPEG",
        "n02/n02_0.JPEG",
        "n02/n02_1.JPEG",
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_that_was_written_on_windows(source, tmp_path, encoding, newline):
    text = newline.join(["n02_1.JPEG", "n01_3.JPEG"])
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    rows = rows_of_list(source, str(tmp_path / "list.txt"))
    assert [source.record_name(i) for i in rows] == ["n01/n01_3.JPEG", "n02/n02_1.JPEG"]


def test_records_of_tfds_are_found_by_their_file_name(tmp_path):
    records = [{"file_name": f"n03_{i}.JPEG".encode(), "image": b"", "label": 0} for i in range(5)]
    source = Source("tfds", records, "image", "label", 2)
    np.testing.assert_array_equal(
        rows_of_list(source, _list(tmp_path, "n03_4.JPEG", "n03_2.JPEG")), [2, 4]
    )


class _Damaged(list):
    def __getitem__(self, index):
        if index == 2:
            raise ValueError("array_record: corrupted chunk")
        return super().__getitem__(index)


def test_an_image_whose_record_is_damaged_is_left_out(tmp_path, capsys):
    records = _Damaged({"file_name": f"n03_{i}.JPEG", "image": b"", "label": 0} for i in range(5))
    source = Source("tfds", records, "image", "label", 2)
    path = _list(tmp_path, "n03_4.JPEG", "n03_2.JPEG")
    np.testing.assert_array_equal(rows_of_list(source, path), [4])
    assert "1 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 of the 3 images"):
        rows_of_list(source, _list(tmp_path, "n03_4.JPEG", "n03_2.JPEG", "n09_1.JPEG"))


def test_a_list_that_does_not_fit_is_an_error_that_names_an_image(source, tmp_path):
    with pytest.raises(UserError, match=r"1 of the 2 images .* such as 'n09_1.JPEG'.*n01_0.JPEG"):
        rows_of_list(source, _list(tmp_path, "n09_1.JPEG", "n01_0.JPEG"))
    with pytest.raises(UserError, match="is empty"):
        rows_of_list(source, _list(tmp_path))
    with pytest.raises(UserError, match="cannot read the list"):
        rows_of_list(source, str(tmp_path / "nowhere.txt"))
