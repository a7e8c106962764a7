"""JSON and TOML from outside, read within bounds, and their text as it is shown."""

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["parse_json", "printable", "read_json", "read_toml"]

MAX_JSON = 1 << 20
MAX_TOML = 64 << 10
MAX_DEPTH = 32
MAX_DOTS = 100
"""Most dots in a line of TOML: a key of many parts takes their square to read."""
MAX_SHOWN = 4000
"""Most characters of a text from outside that are shown."""


def read_json(path: Path) -> object:
    """Return what a JSON file holds.

    Raises:
        OSError: if it is not there or cannot be read.
        ValueError: as for `parse_json`, or if it is no regular file or too large.
    """
    return parse_json(_read_text(path, MAX_JSON))


def parse_json(text: str) -> object:
    """Return what JSON text holds.

    Raises:
        ValueError: if it is no JSON, is nested too deep, or holds half characters or numbers that
            are not finite or need more than 64 bits.
    """
    try:
        found: object = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(f"it must be JSON: {error}") from None
    _check_plain(found)
    return found


def read_toml(path: Path) -> dict[str, object]:
    """Return what a TOML file holds; errors as for `read_json`."""
    text = _read_text(path, MAX_TOML)
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MAX_DOTS:
            raise ValueError(f"a line must have at most {MAX_DOTS} dots, got more in line {number}")
    try:
        found: dict[str, object] = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_plain(found)
    return found


def printable(text: str, *, lines: bool = False) -> str:
    """Return text from outside as it may be shown: no control characters, not endlessly long.

    They are replaced by their escapes, as they could move the cursor of a terminal or turn the
    direction of writing.

    Args:
        text: what is to be shown.
        lines: whether line breaks stay; else each run of white space becomes one blank.
    """
    if lines:
        shown = "\n".join(map(_escaped, text.split("\n")))
    else:
        # Before escaping, so that it takes no time; after it, as escapes are longer.
        shown = _escaped(" ".join(text[: 4 * MAX_SHOWN].split()))
        shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + " ..."
    return shown


_TOO_DEEP = f"it must be nested at most {MAX_DEPTH} deep"


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _read_text(path: Path, most: int) -> str:
    # To open a pipe would wait for who writes to it.
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("it must be a regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it must have at most {most} bytes")
    return content.decode("utf-8")


def _check_plain(value: object) -> None:
    """ValueError unless numbers are finite and of at most 64 bits, and nesting is not deep."""
    levels: list[Iterator[tuple[object, object]]] = [iter([("", value)])]
    names: list[object] = []
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
            if names:
                names.pop()
            continue
        name, item = entry
        if any(isinstance(text, str) and not _is_text(text) for text in entry):
            raise ValueError(f"{_place(names, name)!a} must be text without half characters")
        if isinstance(item, dict | list):
            if len(levels) > MAX_DEPTH:
                raise ValueError(_TOO_DEEP)
            names.append(name)
            levels.append(iter(item.items() if isinstance(item, dict) else enumerate(item)))
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{_place(names, name)} must be finite, got {item}")
        elif isinstance(item, int) and not -(1 << 63) <= item < 1 << 63:
            raise ValueError(
                f"{_place(names, name)} must be an integer of at most 64 bits, got one of "
                f"{item.bit_length() + 1}"
            )


def _is_text(text: str) -> bool:
    """Tell whether UTF-8 can hold a text: JSON can spell halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(names: list[object], last: object) -> str:
    """Return where a number is, as its keys and indices with dots between."""
    return ".".join(str(name)[:100] for name in [*names[1:], last] if name != "") or "the number"
