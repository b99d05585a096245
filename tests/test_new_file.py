"""Files are written whole and never through a link."""

import os
import threading

import pytest
from etils import epath

from music_jax.new_file import new_file, new_path, write_new


def test_the_content_is_there_with_the_usual_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        write_new(tmp_path / "a", b"one")
        write_new(epath.Path(tmp_path / "a"), b"two")
    finally:
        os.umask(umask)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_replaced_and_its_target_stays(link, tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "run").mkdir()
    link(tmp_path / "outside", tmp_path / "run" / "a.json")
    write_new(tmp_path / "run" / "a.json", b"new")
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "run" / "a.json").is_symlink()
    assert (tmp_path / "run" / "a.json").read_text() == "new"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail_halfway():
        with new_file(tmp_path / "a") as file:
            file.write(b"half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail_halfway()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_many_writers_of_one_file_all_succeed(tmp_path):
    failed = []

    def write(number):
        try:
            for _ in range(50):
                write_new(tmp_path / "a", bytes([number]) * 10_000)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    content = (tmp_path / "a").read_bytes()
    assert content in [bytes([number]) * 10_000 for number in range(8)]
    assert os.listdir(tmp_path) == ["a"]


def test_a_library_is_given_a_new_name_each_time(tmp_path):
    names = []
    for _ in range(2):
        with new_path(tmp_path / "a") as path:
            names.append(path.name)
            assert path.parent == tmp_path
            assert path.stat().st_size == 0
            path.write_text("written")
    assert names[0] != names[1]
    assert (tmp_path / "a").read_text() == "written"
