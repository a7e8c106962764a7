"""All methods of the benchmark by name, and those of others that are asked for."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from baselines import classics, daps, ddnm, deepinv_methods, guided, pnpdm, reddiff
from baselines.interface import Method
from baselines.ours import OURS
from ncvsd_inverse.checks import check_choice

__all__ = ["METHODS", "find_methods"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *OURS,
        daps.METHOD,
        pnpdm.METHOD,
        reddiff.METHOD,
        ddnm.METHOD,
        *guided.METHODS,
        *deepinv_methods.METHODS,
        *classics.METHODS,
    )
}


def find_methods(names: Sequence[str], known: Mapping[str, Method]) -> list[Method]:
    """Return the methods that were asked for, each once.

    Args:
        names: of known methods, or module:NAME, where the module is on Python's path, in the
            current folder, or the path of a .py file, and NAME is a `Method` of it or a sequence
            of them.
        known: methods by name.

    Raises:
        ValueError: if there is no such method or module, or it does not hold what it should.
    """
    found: dict[str, Method] = {}
    for name in names:
        if ":" not in name:
            found[name] = known[check_choice("--methods", name, known)]
            continue
        for method in _load(name):
            if method.name in known or found.get(method.name, method) is not method:
                raise ValueError(
                    f"--methods must have names of their own, got {name}, where "
                    f"{method.name} is the name of another method"
                )
            found[method.name] = method
    return list(found.values())


def _load(name: str) -> Sequence[Method]:
    """Return the methods that module:NAME is."""
    source, _, attribute = name.rpartition(":")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else _import(source)
    except Exception as error:
        raise ValueError(
            f"--methods must name a module that can be imported, got {name}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"--methods must name what is in {source}, got {name}")
    value = getattr(module, attribute)
    methods = [value] if isinstance(value, Method) else value
    if not isinstance(methods, list | tuple) or not methods:
        raise ValueError(
            f"--methods must name a Method or a sequence of them, got {name}, "
            f"a {type(value).__name__}{' of none' if methods in ([], ()) else ''}"
        )
    for method in methods:
        if not isinstance(method, Method):
            raise ValueError(
                f"--methods must name a sequence of Method alone, got {name} with a "
                f"{type(method).__name__}"
            )
    return methods


def _import(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """Return the module of a file, which may have the name of another module."""
    name = f"{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
