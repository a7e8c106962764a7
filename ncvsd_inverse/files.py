"""Files that appear whole or not at all, their digests, and the folder for what is kept."""

import errno
import hashlib
import os
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "cache_folder",
    "clear_parts",
    "file_sha256",
    "whole_files",
    "write_between",
    "write_whole",
]


@contextmanager
def whole_files(*paths: str | Path) -> Iterator[list[Path]]:
    """Yield a temporary path beside each file; at the end they are renamed in order.

    What was written is on the disk before a file takes its name. After an error within the context
    none is renamed, older files stay, and no temporary one does.

    Args:
        paths: the files; their folders must exist.

    Raises:
        OSError: if a file cannot be written.
    """
    targets = [Path(path) for path in paths]
    for target in targets:
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "There is no such folder", str(target.parent))
    # Processes and threads that write one file do not share what they have written so far.
    writer = f"{os.getpid()}.{threading.get_ident()}"
    temporary = [path.with_name(f".{path.name}.{writer}.part") for path in targets]
    try:
        yield temporary
        for written in temporary:
            with written.open("rb") as file:
                os.fsync(file.fileno())
        for written, path in zip(temporary, targets, strict=True):
            written.replace(path)
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text as UTF-8, line ends as they are.

    Args:
        path: the file; an older one is replaced.
        content: what it holds.

    Raises:
        OSError: if the file cannot be written.
    """
    with whole_files(path) as (part,):
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def clear_parts(folder: Path, names: Collection[str]) -> None:
    """Remove what killed processes left half-written of files of these names in a folder."""
    for path in folder.glob(".*.part"):
        found = re.fullmatch(r"\.(.+)\.(\d+)\.\d+\.part", path.name)
        if found and found[1] in names and not _is_running(int(found[2])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Tell whether there is another process of a number; where it is not known, that there is."""
    if process == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # signal 0 is none
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def cache_folder() -> Path:
    """Return the folder of what is downloaded, converted or measured on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ncvsd_inverse"


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, 64 lower-case hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_between(path: Path, marks: tuple[str, str], text: str) -> None:
    """Put text between two marks of a text file, a blank line around it, whole or not at all.

    Raises:
        ValueError: if the file does not hold each mark once, in their order.
    """
    content = path.read_text(encoding="utf-8")
    before, first, rest = content.partition(marks[0])
    old, last, after = rest.partition(marks[1])
    if not (first and last) or any(mark in before + old + after for mark in marks):
        raise ValueError(f"{path} must hold the marks {' and '.join(marks)} once each")
    write_whole(path, f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}")
