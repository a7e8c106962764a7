from concurrent.futures import ThreadPoolExecutor

import pytest

from ncvsd_inverse.files import whole_files, write_whole


def half_written(*paths):
    with whole_files(*paths) as parts:
        parts[0].write_bytes(b"half")
        raise OSError("disk full")


def test_files_appear_whole_or_not_at_all(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    with pytest.raises(OSError, match="disk full"):
        half_written(path, other)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"older")
    with pytest.raises(OSError, match="disk full"):
        half_written(path, other)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_with_its_own_line_ends(tmp_path):
    write_whole(tmp_path / "a.txt", "\u00e4\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa4\r\n"
    write_whole(str(tmp_path / "a.txt"), b"newer")
    assert (tmp_path / "a.txt").read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_threads_that_write_one_file_leave_each_other_alone(tmp_path):
    path = tmp_path / "a.txt"
    with ThreadPoolExecutor(1) as other:
        with whole_files(path) as (part,):
            part.write_text("first")
            other.submit(write_whole, path, "second").result()
            assert path.read_text() == "second"
        assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
