"""Folders and archives of others: links, pipes, damage and lengths."""

import os
import pickle
import zipfile

import pytest

from ncvsd_inverse.sources import FolderFiles, ZipFiles, open_plain, open_source, read_file


def is_text(name):
    return name.endswith(".txt")


@pytest.fixture
def folder(tmp_path):
    """A folder of two texts, beside another file and another folder."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    for name in ("in/b.txt", "in/deep/a.txt", "in/c.md", "out.txt", "beside/d.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path / "in"


def test_files_are_found_by_order_of_name(folder):
    (folder / "folder.txt").mkdir()
    files = open_source(folder, is_text)
    assert (files.names, files.refused) == (["b.txt", "deep/a.txt"], {})
    assert read_file(files, "deep/a.txt", 100) == b"in/deep/a.txt"
    assert [files.has(name) for name in ("c.md", "d.md")] == [True, False]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("../out.txt", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("../beside", "link to a folder"),
        ("deep", "link to a folder"),
        ("..", "link to a folder"),
        ("nowhere", "leads nowhere"),
        ("link.txt", "leads nowhere"),
    ],
)
def test_links_that_lead_elsewhere_are_named(folder, target, reason):
    (folder / "link.txt").symlink_to(target)
    files = FolderFiles(folder, is_text)
    assert files.names == ["b.txt", "deep/a.txt"]
    assert list(files.refused) == ["link.txt"]
    assert reason in files.refused["link.txt"]
    with pytest.raises(ValueError, match=rf"link\.txt in .* cannot be read: .*{reason}"):
        read_file(files, "link.txt", 100)


def test_links_within_a_folder_are_followed(folder):
    (folder / "link.txt").symlink_to("deep/a.txt")
    (folder / "link.md").symlink_to("../out.txt")  # not looked for
    (folder.parent / "whole").symlink_to("in")
    files = FolderFiles(folder.parent / "whole", is_text)
    assert (files.names, files.refused) == (["b.txt", "deep/a.txt", "link.txt"], {})
    assert read_file(files, "link.txt", 100) == b"in/deep/a.txt"


def test_pipes_are_not_opened(folder):
    os.mkfifo(folder / "pipe.txt")
    files = FolderFiles(folder, is_text)
    assert files.refused == {"pipe.txt": "it must be a file, got a pipe or a device"}
    for path in (folder / "pipe.txt", "/dev/zero"):
        with pytest.raises(ValueError, match="it must be a file, got a pipe or a device"):
            open_plain(path)
    with pytest.raises(ValueError, match=r"pipe\.txt must be a folder or a zip .*: it must"):
        ZipFiles(folder / "pipe.txt", is_text)


def test_folders_that_cannot_be_searched_are_named(folder, monkeypatch):
    search = os.scandir

    def scandir(path):
        if path.name == "deep":
            raise PermissionError(13, "Permission denied")
        return search(path)

    monkeypatch.setattr(os, "scandir", scandir)
    files = FolderFiles(folder, is_text)
    assert files.names == ["b.txt"]
    assert files.refused == {"deep": "it cannot be searched: Permission denied"}


@pytest.fixture
def archive(tmp_path):
    """A zip of two texts, a folder, another file, and one without a name."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("b.txt", bytes(10_000))
        made.writestr("../deep/a.txt", b"text")
        made.writestr("folder.txt/", b"")
        nameless = zipfile.ZipInfo("d")
        nameless.filename = ""
        made.writestr(nameless, b"text")
        made.writestr("c.md", b"text")
    return tmp_path / "a.zip"


def test_archives_are_read_and_sent(archive):
    files = pickle.loads(pickle.dumps(open_source(archive, is_text)))
    assert (files.names, files.refused) == (["../deep/a.txt", "b.txt"], {})
    assert read_file(files, "../deep/a.txt", 4) == b"text"
    assert [files.has(name) for name in ("c.md", "d.md")] == [True, False]
    with pytest.raises(ValueError, match=r"b\.txt in .* must have at most 9999 bytes"):
        read_file(files, "b.txt", 9_999)


def marked(content, flags=0, method=None):
    """Return a zip whose first file is marked otherwise."""
    content, central = bytearray(content), content.index(b"PK\x01\x02")
    for place in (6, central + 8):
        content[place] |= flags
    for place in (8, central + 10):
        content[place] = content[place] if method is None else method
    return bytes(content)


def flipped(content):
    """Return a zip whose first file is damaged."""
    return content[:40] + bytes([content[40] ^ 0xFF]) + content[41:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: marked(whole, flags=1), "encrypted"),
        (lambda whole: marked(whole, method=99), "method"),
        (lambda whole: marked(whole, method=12), ""),
        (lambda whole: marked(whole, method=14), ""),
        (lambda whole: marked(whole, method=0), ""),
        (flipped, ""),
    ],
)
def test_damaged_archives_give_one_error(archive, damage, reason):
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match=rf"b\.txt in .*a\.zip cannot be read: .*{reason}"):
        read_file(ZipFiles(archive, is_text), "b.txt", 10**6)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a\.zip must be a folder or a zip archive that is whole"):
        ZipFiles(archive, is_text)
