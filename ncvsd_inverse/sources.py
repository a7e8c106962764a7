"""Files that others made, in a folder or a zip archive: found, and opened within bounds.

Nothing is unpacked to disk, so names inside an archive are only names. A folder is left by no link,
and what never ends, as pipes and devices do, is not opened.
"""

import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

__all__ = [
    "UNREADABLE",
    "FolderFiles",
    "SourceFiles",
    "ZipFiles",
    "open_plain",
    "open_source",
    "read_at_most",
    "read_file",
]

UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What is raised by files and archives that are damaged, encrypted or of an unknown method."""

Wanted = Callable[[str], bool]
"""Tells of a file's name, without folders, whether it is looked for."""


def open_plain(path: str | Path, most: int | None = None) -> BinaryIO:
    """Open a file for reading.

    Args:
        path: the file.
        most: its greatest length, bytes; None: any.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is longer, or a folder, a pipe or a device; the reason alone.
    """
    path = Path(path)
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise ValueError(f"it must be a file, got {kind}")
    if most is not None and found.st_size > most:
        raise ValueError(f"it must have at most {most} bytes, got {found.st_size}")
    return path.open("rb")


def read_at_most(file: BinaryIO, most: int) -> bytes:
    """Read the rest of an open file; ValueError, with no more read, if it is over `most` bytes."""
    content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it must have at most {most} bytes, and has more")
    return content


class FolderFiles:
    """The files below a folder, by name.

    Args:
        source: the folder.
        wanted: which files are looked for.

    Attributes:
        names: paths within the folder, in order.
        refused: why what was found is not opened, by name: links that lead out of the folder or to
            folders, pipes, devices, folders that cannot be searched.
    """

    def __init__(self, source: Path, wanted: Wanted) -> None:
        self.source = source
        self.names: list[str] = []
        self.refused: dict[str, str] = {}
        folders = [source]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                self.refused[self._name(folder)] = f"it cannot be searched: {error.strerror}"
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif reason := self._why_not(entry, wanted):
                    self.refused[self._name(entry.path)] = reason
                elif wanted(entry.name):
                    self.names.append(self._name(entry.path))
        self.names.sort()

    def open(self, name: str) -> BinaryIO:
        """Open a file; OSError or ValueError if it cannot be."""
        path = self.source / name
        if path.is_symlink() and (reason := self._why_not_link(path)):
            raise ValueError(reason)
        return open_plain(path)

    def has(self, name: str) -> bool:
        """Tell whether there is a file of this name, wanted or not."""
        return os.path.lexists(self.source / name)

    def _name(self, path: str | Path) -> str:
        return Path(path).relative_to(self.source).as_posix()

    def _why_not(self, entry: os.DirEntry[str], wanted: Wanted) -> str | None:
        if entry.is_symlink():
            path = Path(entry.path)
            return self._why_not_link(path) if wanted(entry.name) or path.is_dir() else None
        if wanted(entry.name) and not entry.is_file():
            return "it must be a file, got a pipe or a device"
        return None

    def _why_not_link(self, path: Path) -> str | None:
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):  # the latter for links in a circle
            return "it is a link that leads nowhere"
        if target.is_dir():
            return "it is a link to a folder, which is not followed: name that folder itself"
        if not target.is_relative_to(self.source.resolve()):
            return "it is a link that leads out of the folder: put the file itself there"
        return None if target.is_file() else "it must be a file, got a pipe or a device"


class ZipFiles:
    """The files of a zip archive, by name; can be sent to another process.

    Args:
        source: the archive.
        wanted: which files are looked for.

    Attributes:
        names: of the files, in order.
        refused: empty, as nothing in an archive leads elsewhere.

    Raises:
        ValueError: if the file is no whole zip archive.
    """

    def __init__(self, source: Path, wanted: Wanted) -> None:
        try:
            open_plain(source).close()
            self._archive = zipfile.ZipFile(source)
        except UNREADABLE as error:
            raise ValueError(
                f"{source} must be a folder or a zip archive that is whole: {error}"
            ) from error
        self.source = source
        self.refused: dict[str, str] = {}
        self._wanted = wanted
        self.names = sorted(
            {
                entry.filename
                for entry in self._archive.infolist()
                if not entry.filename.endswith("/") and wanted(Path(entry.filename).name)
            }
        )

    def __reduce__(self) -> tuple[type["ZipFiles"], tuple[Path, Wanted]]:
        return ZipFiles, (self.source, self._wanted)  # an open file does not travel

    def open(self, name: str) -> BinaryIO:
        """Open a file; one of `UNREADABLE` if it cannot be."""
        return cast("BinaryIO", self._archive.open(name))

    def has(self, name: str) -> bool:
        """Tell whether there is a file of this name, wanted or not."""
        return name in self._archive.NameToInfo


SourceFiles = FolderFiles | ZipFiles


def open_source(source: Path, wanted: Wanted) -> SourceFiles:
    """Return the files of a folder or a zip archive; ValueError if it is neither."""
    return FolderFiles(source, wanted) if source.is_dir() else ZipFiles(source, wanted)


def read_file(files: SourceFiles, name: str, most: int) -> bytes:
    """Return what a file holds; ValueError if it cannot be read or has more than `most` bytes."""
    try:
        with files.open(name) as file:
            return read_at_most(file, most)
    except UNREADABLE as error:
        raise ValueError(f"{name} in {files.source} cannot be read: {error}") from error
