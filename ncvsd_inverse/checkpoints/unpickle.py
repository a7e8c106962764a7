"""Reads what others pickled (plain, `torch.save`, NVIDIA's networks) without running any of it.

A pickle is a program. Here a machine of our own runs its opcodes: it imports nothing, looks no
attribute up and calls only the functions of this file that `KNOWN` lists, so a file can make
tensors, containers and inert stand-ins, and nothing else. Python's `pickle.Unpickler`
does not serve: it lets a file choose memo sizes, nesting and dictionary keys. This module must
not know any network.

Sources: the opcodes are documented in Python's `pickletools`; the layouts of `torch.save` are
those that torch 2 writes (a zip of stored entries, or a stream of pickles and storages).
"""

import math
import mmap
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.errors import CheckpointError

MAX_BYTES = 1 << 34
MAX_OBJECTS = 2_000_000
"""Most opcodes and copied items of a file, and most objects of its value when shared ones count
each time."""
MAX_DEPTH = 100
MAX_TEXT = 1 << 28
MAX_ENTRIES = 100_000
MAX_DIMENSIONS = 32
MAX_ARGUMENTS = 16
INTEGER_BYTES = 32
LINE_BYTES = 1000
VIEW_FACTOR = 8
"""Most bytes of all tensors over the bytes of the file; views of one storage count each time."""
LARGE_BYTES = 1 << 16
COPY_BYTES = 1 << 24


@dataclass(eq=False, slots=True, repr=False)
class Inert:
    """What stands in for an object whose class is never imported.

    Attributes:
        module: where the file says the class lives.
        name: the name of the class.
        args: the arguments that its construction would have had.
        state: its attributes by name; what is no dict stands under "__setstate__".
    """

    module: str
    name: str
    args: tuple[object, ...] = ()
    state: dict[object, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<inert {self.module}.{self.name}>"


@dataclass(frozen=True, slots=True)
class InertName:
    """What stands in for a class or function itself."""

    module: str
    name: str


def read_checkpoint_file(path: str | Path, *, max_bytes: int = MAX_BYTES) -> object:
    """Read a pickle or a file of `torch.save`, in its zip or its older format, running nothing.

    Tensors of a zip are views of the file, mapped privately: writing to one leaves the file as it
    is, but the file must not shrink while they live. Others are copies of it, made once.

    Args:
        path: the file.
        max_bytes: the largest file to read, bytes.

    Returns:
        Numbers, str, bytes (from 64 KiB on as a read-only memoryview), list, tuple, set,
        dict (also for its subclasses, without their attributes), CPU tensors without gradient
        (also for parameters), and `Inert` and `InertName` for what else weights come with: modules,
        numpy arrays, dtypes; nested at most 100 deep, never within itself.

    Raises:
        CheckpointError: if the file is missing, too large, damaged, of another format, or asks for
            anything else, which the message names.
    """
    path = Path(path)
    try:
        value = _read_file(path, max_bytes)
        _check_value(value)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error.__cause__
    except Exception as error:
        # Damage that no check foresaw must not surface as an error of numpy or torch.
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return value


def state_dict_of(network: Inert) -> dict[str, Tensor]:
    """Return the tensors of an inert `torch.nn.Module` as its own `state_dict()` would.

    Returns:
        Parameters and persistent buffers by dotted name.

    Raises:
        CheckpointError: if what stands at their places is not what a module has there.
    """
    return dict(_named_tensors(network, ""))


def arguments_of(network: Inert) -> dict[str, object]:
    """Return the keyword arguments that built a persistent object; none where none are recorded.

    Raises:
        CheckpointError: if they are recorded but are no keyword arguments.
    """
    arguments = network.state.get("_init_kwargs", {})
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise CheckpointError(f"the arguments of {network.name} must have names")
    return arguments


def _named_tensors(network: Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    kept_out = network.state.get("_non_persistent_buffers_set", set())
    for attribute in ("_parameters", "_buffers"):
        for name, value in _members(network, attribute):
            if attribute == "_buffers" and isinstance(kept_out, set) and name in kept_out:
                continue
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{prefix + name!r} must be a tensor, got {_kind(value)}")
            yield prefix + name, value
    for name, value in _members(network, "_modules"):
        if not isinstance(value, Inert):
            raise CheckpointError(f"{prefix + name!r} must be a module, got {_kind(value)}")
        yield from _named_tensors(value, f"{prefix}{name}.")


def _members(network: Inert, attribute: str) -> Iterator[tuple[str, object]]:
    members = network.state.get(attribute, {})
    if not isinstance(members, dict):
        raise CheckpointError(f"{attribute} of {network.name} must be a dict, got {_kind(members)}")
    for name, value in members.items():
        if not isinstance(name, str) or "." in name:
            raise CheckpointError(f"{attribute} of {network.name} must have names without dots")
        if value is not None:
            yield name, value


class _Source:
    """The bytes of one file, and how much it may still ask for."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self.mapping = mapping
        self.data = memoryview(mapping)
        self.address = np.frombuffer(mapping, np.uint8).ctypes.data
        self.nested = False
        self.limits = {
            "steps": MAX_OBJECTS,
            "bytes of text": MAX_TEXT,
            # Each byte of a file is stored once and read once.
            "bytes of storages": len(mapping),
            "bytes of pickles in pickles": len(mapping),
            "bytes of tensors": VIEW_FACTOR * len(mapping),
        }
        self.spent = dict.fromkeys(self.limits, 0)

    def spend(self, what: str, amount: int) -> None:
        self.spent[what] += amount
        if self.spent[what] > self.limits[what]:
            raise CheckpointError(f"it asks for more than {self.limits[what]} {what}")

    def copy(self, data: memoryview, target: Tensor) -> None:
        """Copy `data` to `target`, uint8 of the same size, keeping few pages of the file."""
        out = target.numpy()
        for start in range(0, len(data), COPY_BYTES):
            part = np.frombuffer(data[start : start + COPY_BYTES], np.uint8)
            out[start : start + COPY_BYTES] = part
            self._release(part)

    def _release(self, part: np.ndarray) -> None:
        """Let the system forget the pages of the file that lie within `part`, where it can."""
        start = part.ctypes.data - self.address
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + part.size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        within = 0 <= start <= len(self.mapping) - part.size
        if within and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED, first, length)


@dataclass(frozen=True, slots=True)
class _StorageKind:
    """A type of storage: the dtype of what it holds."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of bytes that tensors view: `flat` has shape (numel,)."""

    flat: Tensor


@dataclass(frozen=True, slots=True)
class _Known:
    """A function of this file that stands where a file names one of another package."""

    build: Callable[[tuple[object, ...], _Source], object]


Loader: TypeAlias = Callable[[object], object]


class _Machine:
    """Runs one pickle; `load` answers its references to storages, None where it can have none."""

    def __init__(
        self, data: memoryview, start: int, source: _Source, load: Loader | None = None
    ) -> None:
        self.data = data
        self.position = start
        self.source = source
        self.load = load
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> tuple[object, int]:
        """Return the value, and the position behind it."""
        while True:
            self.source.spend("steps", 1)
            code = bytes(self.take(1))
            if code == pickle.STOP:
                break
            try:
                self.step(code)
            except IndexError:
                raise CheckpointError(f"{_opcode_name(code)} finds its stack empty") from None
        if self.below or len(self.stack) != 1:
            raise CheckpointError("a pickle must end with one value")
        return self.stack[0], self.position

    def step(self, code: bytes) -> None:
        """Run one opcode; IndexError where the stack lacks what it takes."""
        if code in CONSTANTS:
            self.stack.append(CONSTANTS[code])
        elif code in CONTAINERS:
            self.stack.append(CONTAINERS[code]())
        elif code in NUMBERS:
            self.stack.append(self.number(NUMBERS[code]))
        elif code in TEXTS:
            self.stack.append(self.text(self.block(TEXTS[code])))
        elif code in BLOBS:
            data = self.block(BLOBS[code])
            self.stack.append(data.toreadonly() if len(data) >= LARGE_BYTES else bytes(data))
        elif code == pickle.LONG1:
            digits = self.block("<B")
            if len(digits) > INTEGER_BYTES:
                raise CheckpointError(f"an integer has {len(digits)} bytes, not {INTEGER_BYTES}")
            self.stack.append(int.from_bytes(digits, "little", signed=True))
        elif code in PUTS:
            self.memo[int(self.number(PUTS[code]))] = self.stack[-1]
        elif code == pickle.MEMOIZE:
            self.memo[len(self.memo)] = self.stack[-1]
        elif code in GETS:
            index = int(self.number(GETS[code]))
            if index not in self.memo:
                raise CheckpointError(f"memo {index} is empty")
            self.stack.append(self.memo[index])
        elif code == pickle.MARK:
            self.below.append(self.stack)
            self.stack = []
        elif code == pickle.POP:
            self.stack.pop()
        elif code == pickle.TUPLE:
            items = self.items()
            self.stack.append(tuple(items))
        elif code in SHORT_TUPLES:
            count = SHORT_TUPLES[code]
            if len(self.stack) < count:
                raise IndexError
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif code == pickle.APPEND:
            item = self.stack.pop()
            self.fill([item])
        elif code == pickle.SETITEM:
            value, key = self.stack.pop(), self.stack.pop()
            self.fill([key, value])
        elif code in (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS):
            self.fill(self.items())
        elif code == pickle.GLOBAL:
            self.stack.append(_look_up(self.line(), self.line()))
        elif code == pickle.STACK_GLOBAL:
            name, module = self.stack.pop(), self.stack.pop()
            self.stack.append(_look_up(module, name))
        elif code == pickle.BINPERSID:
            if self.load is None:
                raise CheckpointError("it refers to storages, which it cannot have here")
            self.stack.append(self.load(self.stack.pop()))
        elif code in (pickle.REDUCE, pickle.NEWOBJ):
            args, function = self.stack.pop(), self.stack.pop()
            self.stack.append(_called(function, args, self.source))
        elif code == pickle.BUILD:
            state = self.stack.pop()
            _set_state(self.stack[-1], state)
        elif code == pickle.FRAME:
            if self.number("<Q") > len(self.data) - self.position:
                raise CheckpointError("it ends too early: it is truncated")
        elif code == pickle.PROTO:
            version = self.number("<B")
            if not 2 <= version <= 5:
                raise CheckpointError(f"its pickle protocol must be 2 to 5, got {version}")
        else:
            raise CheckpointError(f"{_opcode_name(code)} is no opcode that weights need")

    def take(self, count: int) -> memoryview:
        start = self.position
        if count > len(self.data) - start:
            raise CheckpointError("it ends too early: it is truncated")
        self.position = start + count
        return self.data[start : self.position]

    def number(self, layout: str) -> int | float:
        value: int | float = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def block(self, layout: str) -> memoryview:
        """Take what an unsigned length in front of it announces."""
        return self.take(int(self.number(layout)))

    def text(self, data: memoryview) -> str:
        self.source.spend("bytes of text", len(data))
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError("a text is not UTF-8") from None

    def line(self) -> str:
        found = bytes(self.data[self.position : self.position + LINE_BYTES]).find(b"\n")
        if found < 0:
            raise CheckpointError("a name has no end")
        return self.text(self.take(found + 1)[:-1])

    def items(self) -> list[object]:
        """Take the stack down to the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def fill(self, items: list[object]) -> None:
        """Put items, for a dict keys and values in turn, into the container on the stack."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(_checked_keys(items))
        elif not isinstance(target, dict):
            raise CheckpointError(f"items are put in {_kind(target)}, which has none")
        elif len(items) % 2:
            raise CheckpointError("a key has no value")
        else:
            target.update(zip(_checked_keys(items[::2]), items[1::2], strict=True))


CONSTANTS: dict[bytes, object] = {
    pickle.NONE: None,
    pickle.NEWTRUE: True,
    pickle.NEWFALSE: False,
    pickle.EMPTY_TUPLE: (),
}
CONTAINERS: dict[bytes, Callable[[], object]] = {
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_DICT: dict,
    pickle.EMPTY_SET: set,
}
NUMBERS = {
    pickle.BININT: "<i",
    pickle.BININT1: "<B",
    pickle.BININT2: "<H",
    pickle.BINFLOAT: ">d",
}
TEXTS = {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I"}
BLOBS = {
    pickle.SHORT_BINBYTES: "<B",
    pickle.BINBYTES: "<I",
    pickle.BINBYTES8: "<Q",
    pickle.BYTEARRAY8: "<Q",
}
PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
SHORT_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


def _look_up(module: object, name: object) -> object:
    """Return what stands for `module`.`name`; nothing is imported."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise CheckpointError(f"a name must be text, got {_kind(module)} and {_kind(name)}")
    if (module, name) in KNOWN:
        return KNOWN[module, name]
    if len(module) + len(name) < LINE_BYTES and STAND_INS.fullmatch(f"{module}:{name}"):
        return InertName(module, name)
    shown = f"{module[:LINE_BYTES]}.{name[:LINE_BYTES]}".encode("unicode_escape").decode()
    raise CheckpointError(f"it asks for {shown}, which is refused: no weights need it")


def _called(function: object, args: object, source: _Source) -> object:
    if not isinstance(args, tuple):
        raise CheckpointError(f"arguments must be a tuple, got {_kind(args)}")
    if isinstance(function, InertName):
        return Inert(function.module, function.name, args)
    if not isinstance(function, _Known):
        raise CheckpointError(f"it calls {_kind(function)}")
    # What runs for its arguments' sake must be short: one opcode is one step.
    if len(args) > MAX_ARGUMENTS:
        raise CheckpointError(f"it calls with {len(args)} arguments")
    return function.build(args, source)


def _set_state(target: object, state: object) -> None:
    if isinstance(target, Inert):
        target.state = state if isinstance(state, dict) else {"__setstate__": state}
    elif not isinstance(target, dict):
        raise CheckpointError(f"it sets attributes of {_kind(target)}")


def _checked_keys(keys: Iterable[object]) -> list[object]:
    """Return the keys of a dict or set, none of which can make hashing slow or deep."""
    keys = list(keys)
    for key in keys:
        if type(key) not in (str, int, float, bool, type(None)):
            raise CheckpointError(f"a key must be text or a number, got {_kind(key)}")
        if isinstance(key, int) and key.bit_length() > 63:
            raise CheckpointError("a key must be an integer of at most 64 bits")
    return keys


def _opcode_name(code: bytes) -> str:
    names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
    return names.get(code.decode("latin-1"), f"byte {code.hex()}")


def _kind(value: object) -> str:
    return repr(value) if isinstance(value, Inert) else f"a {type(value).__name__}"


def _wrong(name: str) -> CheckpointError:
    return CheckpointError(f"{name} has arguments that it never has")


def _make_dict(args: tuple[object, ...], source: _Source) -> dict[object, object]:
    if args:
        raise _wrong("a dict")
    return {}


def _make_set(args: tuple[object, ...], source: _Source) -> set[object]:
    match args:
        case ():
            return set()
        case (list(items),):
            source.spend("steps", len(items))
            return set(_checked_keys(items))
    raise _wrong("a set")


def _make_parameter(args: tuple[object, ...], source: _Source) -> Tensor:
    match args:
        case (Tensor() as data, bool(), *_):
            return data
    raise _wrong("torch.nn.Parameter")


def _make_tensor(args: tuple[object, ...], source: _Source) -> Tensor:
    match args:
        case (_Storage(flat), int(offset), tuple(size), tuple(stride), bool(), _, *marks):
            pass
        case _:
            raise _wrong("a tensor")
    if not all(mark is None or (isinstance(mark, dict) and not mark) for mark in marks):
        raise CheckpointError("a tensor is marked as conjugate or negative")
    if len(size) > MAX_DIMENSIONS or len(size) != len(stride):
        raise CheckpointError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *size, *stride)):
        raise CheckpointError("the sizes and strides of a tensor must be whole numbers >= 0")
    if math.prod(n for n in size if n) >= 1 << 56:
        raise CheckpointError(f"a tensor has the size {size}")
    numel = math.prod(size)
    if numel == 0:
        return torch.empty(size, dtype=flat.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= flat.numel() or numel > flat.numel():
        raise CheckpointError(
            f"a tensor of size {size}, stride {stride} and offset {offset} must lie within its "
            f"storage of {flat.numel()} elements"
        )
    source.spend("bytes of tensors", numel * flat.itemsize)
    return flat.as_strided(size, stride, offset)


def _load_storage(args: tuple[object, ...], source: _Source) -> _Storage:
    """Read a storage out of the bytes of a `torch.save` of its own, as plain pickles have them."""
    match args:
        case (bytes() | memoryview() as content,):
            source.spend("bytes of pickles in pickles", len(content))
        case _:
            raise _wrong("torch.storage._load_from_bytes")
    if source.nested:
        raise CheckpointError("a pickle in a pickle holds a third")
    source.nested = True
    storage = _read_stream(memoryview(content), source)
    source.nested = False
    if not isinstance(storage, _Storage):
        raise CheckpointError(f"a pickle in a pickle must hold a storage, got {_kind(storage)}")
    return storage


def _make_persistent(args: tuple[object, ...], source: _Source) -> Inert:
    """Return the stand-in of a persistent object; the source code beside it is dropped unread."""
    match args:
        case ({"type": "class", "class_name": str(name), "state": dict(state)},):
            if len(name) <= LINE_BYTES and name.isidentifier():
                return Inert("torch_utils.persistence", name, (), state)
    raise _wrong("a persistent object")


STAND_INS = re.compile(
    r"(torch\.nn|training)(\.\w+)*:\w+"
    r"|torch:(device|Size|bool|u?int\d+|b?float\d+\w*|complex\d+)"
    r"|numpy:(dtype|ndarray)|numpy\._?core\.\w+:(_reconstruct|scalar|_frombuffer)"
    r"|_codecs:encode|(__builtin__|builtins):bytes",
    re.ASCII,
)
"""What may stand as a name or an inert object; `training` is where NVIDIA's networks live."""

STORAGES = {
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}
KNOWN: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Known(_make_dict),
    ("dnnlib.util", "EasyDict"): _Known(_make_dict),
    ("__builtin__", "set"): _Known(_make_set),
    ("builtins", "set"): _Known(_make_set),
    ("torch._utils", "_rebuild_parameter"): _Known(_make_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Known(_make_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_make_tensor),
    ("torch.storage", "_load_from_bytes"): _Known(_load_storage),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Known(_make_persistent),
    **{
        (module, name): _StorageKind(dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in STORAGES.items()
    },
}
"""All that is rebuilt, by functions of this file."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001


def _read_file(path: Path, max_bytes: int) -> object:
    if not path.is_file():
        raise CheckpointError("there is no such file")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if not 0 < size <= max_bytes:
                raise CheckpointError(f"it must have 1 to {max_bytes} bytes, got {size}")
            # Private to this process: what is written to a tensor never reaches the file.
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"it must be readable: {error}") from None
    source = _Source(mapping)
    if bytes(source.data[:4]) == ZIP_LOCAL:
        return _read_zip(source)
    return _read_stream(source.data, source)


def _read_stream(data: memoryview, source: _Source) -> object:
    """Read a plain pickle or the older format of `torch.save`, which `data` must end with."""
    value, position = _Machine(data, 0, source).run()
    if type(value) is int and value == LEGACY_MAGIC:
        value, position = _read_legacy(data, position, source)
    if position != len(data):
        raise CheckpointError(f"{len(data) - position} bytes follow its end")
    return value


def _read_legacy(data: memoryview, position: int, source: _Source) -> tuple[object, int]:
    """Read version, system, value, keys of storages, storages; return the value and its end."""
    version, position = _Machine(data, position, source).run()
    system, position = _Machine(data, position, source).run()
    if version != LEGACY_VERSION:
        raise CheckpointError("it is of another version of torch's older format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("it must be written on a little-endian machine")
    storages: dict[str, _Storage] = {}

    def load(reference: object) -> object:
        match reference:
            case ("storage", _StorageKind() as kind, str(key), str(), int(numel), None):
                if key not in storages:
                    size = _storage_bytes(kind, numel, source)
                    # Filled below: the values follow the keys, which follow this pickle.
                    content = torch.empty(size, dtype=torch.uint8)
                    storages[key] = _Storage(content.view(kind.dtype))
                return _checked_storage(storages[key], kind, numel)
            case ("module", InertName() as name, _, _):
                return name
        raise CheckpointError("it refers to what is no storage")

    value, position = _Machine(data, position, source, load).run()
    keys, position = _Machine(data, position, source).run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("the keys of its storages must be a list of texts")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise CheckpointError("it must hold each storage that it refers to, once")
    for key in keys:
        flat = storages[key].flat
        reader = _Machine(data, position, source)
        if reader.number("<q") != flat.numel():
            raise CheckpointError("a storage has another size than its tensors say")
        source.copy(reader.take(flat.numel() * flat.itemsize), flat.view(torch.uint8))
        position = reader.position
    return value, position


def _storage_bytes(kind: _StorageKind, numel: int, source: _Source) -> int:
    if numel < 0:
        raise CheckpointError(f"a storage has {numel} elements")
    source.spend("bytes of storages", numel * kind.dtype.itemsize)
    return numel * kind.dtype.itemsize


def _checked_storage(storage: _Storage, kind: _StorageKind, numel: int) -> _Storage:
    if storage.flat.dtype != kind.dtype or storage.flat.numel() != numel:
        raise CheckpointError("a storage has two sizes or types")
    return storage


def _read_zip(source: _Source) -> object:
    """Read the zip of a `torch.save`: PREFIX/data.pkl, and the storages PREFIX/data/KEY."""
    entries = _zip_entries(source.data)
    roots = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError("a zip must hold one PREFIX/data.pkl, as torch.save writes it")
    prefix = roots[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and bytes(order[:8]) != b"little":
        raise CheckpointError("it must be written on a little-endian machine")
    storages: dict[str, _Storage] = {}

    def load(reference: object) -> object:
        match reference:
            case ("storage", _StorageKind() as kind, str(key), str(), int(numel)):
                if key not in storages:
                    content = entries.get(f"{prefix}data/{key}")
                    size = _storage_bytes(kind, numel, source)
                    if content is None or len(content) != size:
                        raise CheckpointError(f"it must hold the {size} bytes of its storage")
                    storages[key] = _Storage(_mapped(content, kind.dtype, source))
                return _checked_storage(storages[key], kind, numel)
        raise CheckpointError("it refers to what is no storage")

    root = entries[roots[0]]
    value, position = _Machine(root, 0, source, load).run()
    if position != len(root):
        raise CheckpointError(f"{len(root) - position} bytes follow the end of its pickle")
    return value


def _mapped(content: memoryview, dtype: torch.dtype, source: _Source) -> Tensor:
    """Return bytes of the file as a flat tensor: a view, or a copy where they are not aligned."""
    if not content:
        return torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(content, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = torch.empty(len(content), dtype=torch.uint8)
        source.copy(content, flat)
    return flat.view(dtype)


ZIP_LOCAL = b"PK\x03\x04"
ZIP_CENTRAL = b"PK\x01\x02"
ZIP_END = b"PK\x05\x06"
ZIP64_END = b"PK\x06\x06"
ZIP64_LOCATOR = b"PK\x06\x07"
LOCAL_LAYOUT = "<4s5H3L2H"
CENTRAL_LAYOUT = "<4s6H3L5H2L"
END_LAYOUT = "<4s4H2LH"
END64_LAYOUT = "<4sQ2H2L4Q"
LOCATOR_LAYOUT = "<4sLQL"
UNKNOWN_32 = 0xFFFFFFFF


def _zip_entries(data: memoryview) -> dict[str, memoryview]:
    """Return the entries of a zip by name; names are only compared, nothing is extracted.

    Python's `zipfile` would first make an object of each of as many entries as the file likes.
    """
    end = len(data) - struct.calcsize(END_LAYOUT)
    *_, count, size, start, comment = _record(data, end, END_LAYOUT, ZIP_END)
    locator = end - struct.calcsize(LOCATOR_LAYOUT)
    if locator >= 0 and bytes(data[locator : locator + 4]) == ZIP64_LOCATOR:
        _, _, end, _ = _record(data, locator, LOCATOR_LAYOUT, ZIP64_LOCATOR)
        *_, count, size, start = _record(data, end, END64_LAYOUT, ZIP64_END)
    if comment or start + size > end or count > MAX_ENTRIES:
        raise CheckpointError("its zip directory is damaged")
    entries: dict[str, memoryview] = {}
    position = start
    for _ in range(count):
        fields = _record(data, position, CENTRAL_LAYOUT, ZIP_CENTRAL)
        flags, method, packed, full = fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, offset = *fields[10:13], fields[16]
        position += struct.calcsize(CENTRAL_LAYOUT)
        raw_name = bytes(data[position : position + name_length])
        extra = data[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length + comment_length
        if position > start + size:
            raise CheckpointError("its zip directory is damaged")
        full, packed, offset = _wide(extra, [full, packed, offset])
        if flags & 1 or method or packed != full:
            raise CheckpointError("its zip entries must be stored, not compressed or encrypted")
        try:
            name = raw_name.decode()
        except UnicodeDecodeError:
            raise CheckpointError("a name in its zip is not UTF-8") from None
        if name in entries:
            raise CheckpointError("two entries of its zip have the same name")
        local = _record(data, offset, LOCAL_LAYOUT, ZIP_LOCAL)
        offset += struct.calcsize(LOCAL_LAYOUT)
        if bytes(data[offset : offset + local[9]]) != raw_name:
            raise CheckpointError("its zip directory is damaged")
        offset += local[9] + local[10]
        if offset + full > start:
            raise CheckpointError("it ends too early: it is truncated")
        entries[name] = data[offset : offset + full]
    return entries


def _record(data: memoryview, position: int, layout: str, signature: bytes) -> tuple[int, ...]:
    if not 0 <= position <= len(data) - struct.calcsize(layout):
        raise CheckpointError("its zip directory is damaged")
    fields = struct.unpack_from(layout, data, position)
    if fields[0] != signature:
        raise CheckpointError("it must end with a zip directory: it is truncated or damaged")
    return fields


def _wide(extra: memoryview, values: list[int]) -> list[int]:
    """Return `values` with those that need more than 32 bits taken from the extra field."""
    wide: Iterator[int] = iter(())
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            content = extra[4 : 4 + length]
            wide = iter(struct.unpack_from(f"<{len(content) // 8}Q", content))
        extra = extra[4 + length :]
    full = [next(wide, -1) if value == UNKNOWN_32 else value for value in values]
    if -1 in full:
        raise CheckpointError("its zip directory is damaged")
    return full


LEAVES = (type(None), bool, int, float, str, bytes, memoryview, Tensor, InertName)


def _check_value(value: object) -> None:
    """Check that whoever walks `value`, however plainly, comes to an end soon and not deep down.

    Raises:
        CheckpointError: if it holds what no value has, or itself, or is too deep or too large when
            objects that it holds several times count each time.
    """
    measured: dict[int, tuple[int, int]] = {}
    entered: set[int] = set()
    waiting = [value]
    while waiting:
        node = waiting[-1]
        if id(node) in measured:
            waiting.pop()
            continue
        children = _children(node)
        inner = [child for child in children if not isinstance(child, LEAVES)]
        if id(node) not in entered:
            entered.add(id(node))
            if any(id(child) in entered and id(child) not in measured for child in inner):
                raise CheckpointError("an object holds itself")
            waiting += inner
            continue
        sizes = [measured[id(child)] for child in inner]
        depth = 1 + max((deep for deep, _ in sizes), default=0)
        count = 1 + len(children) + sum(many for _, many in sizes)
        if depth > MAX_DEPTH or count > MAX_OBJECTS:
            raise CheckpointError(
                f"its value must be at most {MAX_DEPTH} deep and have at most {MAX_OBJECTS} objects"
            )
        measured[id(node)] = depth, count
        waiting.pop()


def _children(node: object) -> Collection[object]:
    if isinstance(node, list | tuple | set):
        return node
    if isinstance(node, dict):
        return node.values()
    if isinstance(node, Inert):
        return node.args, node.state
    if isinstance(node, LEAVES):
        return ()
    raise CheckpointError(f"it holds {_kind(node)} where a value must be")
