"""Pickles, and the streams of them that `torch.save` once wrote, read without running any.

A pickle is a program. Here a machine of our own runs its opcodes: it imports nothing, looks no
attribute up and calls only the functions of this file that `KNOWN` lists, so a file can make
tensors, containers and inert stand-ins, and nothing else. Python's `pickle.Unpickler` does not
serve: it lets a file choose memo sizes, nesting and dictionary keys.

Sources: the opcodes are documented in Python's `pickletools`; the layout of a stream is that which
torch 2 writes.
"""

import math
import mmap
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.errors import CheckpointError

__all__ = [
    "Inert",
    "InertName",
    "Machine",
    "Source",
    "Storage",
    "StorageKind",
    "checked_storage",
    "kind_name",
    "read_stream",
    "storage_bytes",
]

MAX_OBJECTS = 2_000_000
"""Most opcodes and copied items of a file, and most objects of its value when shared ones count
each time."""
MAX_TEXT = 1 << 28
MAX_DIMENSIONS = 32
MAX_ARGUMENTS = 16
INTEGER_BYTES = 32
LINE_BYTES = 1000
VIEW_FACTOR = 8
"""Most bytes of all tensors over the bytes of the file; views of one storage count each time."""
LARGE_BYTES = 1 << 16
SMALL_KEY = 1 << 24
"""Integers below it can be keys as many as there are: few of them meet in a table of their size."""
MAX_LARGE_KEYS = 5000
"""Most other numbers that are keys in a file: they can be chosen so that all meet."""
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


class Source:
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
            "keys that are large numbers": MAX_LARGE_KEYS,
        }
        self.spent = dict.fromkeys(self.limits, 0)

    def spend(self, what: str, amount: int) -> None:
        """Count what a file asks for; CheckpointError if it is too much."""
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
class StorageKind:
    """A type of storage: the dtype of what it holds."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes that tensors view: `flat` has shape (numel,)."""

    flat: Tensor


@dataclass(frozen=True, slots=True)
class _Known:
    """A function of this file that stands where a file names one of another package."""

    build: Callable[[tuple[object, ...], Source], object]


Loader: TypeAlias = Callable[[object], object]


class Machine:
    """Runs one pickle; `load` answers its references to storages, None where it can have none."""

    def __init__(
        self, data: memoryview, start: int, source: Source, load: Loader | None = None
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
        """Return the next bytes."""
        start = self.position
        if count > len(self.data) - start:
            raise CheckpointError("it ends too early: it is truncated")
        self.position = start + count
        return self.data[start : self.position]

    def number(self, layout: str) -> int | float:
        """Return the next number, of a layout of `struct`."""
        value: int | float = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def block(self, layout: str) -> memoryview:
        """Return the next bytes, whose number stands before them."""
        """Take what an unsigned length in front of it announces."""
        return self.take(int(self.number(layout)))

    def text(self, data: memoryview) -> str:
        """Return bytes as text."""
        self.source.spend("bytes of text", len(data))
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError("a text is not UTF-8") from None

    def line(self) -> str:
        """Return the text up to the end of a line."""
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
            target.update(_checked_keys(items, self.source))
        elif not isinstance(target, dict):
            raise CheckpointError(f"items are put in {kind_name(target)}, which has none")
        elif len(items) % 2:
            raise CheckpointError("a key has no value")
        else:
            keys = _checked_keys(items[::2], self.source)
            target.update(zip(keys, items[1::2], strict=True))


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
        raise CheckpointError(f"a name must be text, got {kind_name(module)} and {kind_name(name)}")
    if (module, name) in KNOWN:
        return KNOWN[module, name]
    if len(module) + len(name) < LINE_BYTES and STAND_INS.fullmatch(f"{module}:{name}"):
        return InertName(module, name)
    shown = f"{module[:LINE_BYTES]}.{name[:LINE_BYTES]}".encode("unicode_escape").decode()
    raise CheckpointError(f"it asks for {shown}, which is refused: no weights need it")


def _called(function: object, args: object, source: Source) -> object:
    if not isinstance(args, tuple):
        raise CheckpointError(f"arguments must be a tuple, got {kind_name(args)}")
    if isinstance(function, InertName):
        return Inert(function.module, function.name, args)
    if not isinstance(function, _Known):
        raise CheckpointError(f"it calls {kind_name(function)}")
    # What runs for its arguments' sake must be short: one opcode is one step.
    if len(args) > MAX_ARGUMENTS:
        raise CheckpointError(f"it calls with {len(args)} arguments")
    return function.build(args, source)


def _set_state(target: object, state: object) -> None:
    if isinstance(target, Inert):
        target.state = state if isinstance(state, dict) else {"__setstate__": state}
    elif not isinstance(target, dict):
        raise CheckpointError(f"it sets attributes of {kind_name(target)}")


def _checked_keys(keys: Iterable[object], source: Source) -> list[object]:
    """Return the keys of a dict or set, none of which can make hashing slow or deep."""
    keys = list(keys)
    for key in keys:
        if type(key) not in (str, int, float, bool, type(None)):
            raise CheckpointError(f"a key must be text or a number, got {kind_name(key)}")
        if isinstance(key, int) and key.bit_length() > 63:
            raise CheckpointError("a key must be an integer of at most 64 bits")
        if isinstance(key, float) or (isinstance(key, int) and abs(key) >= SMALL_KEY):
            source.spend("keys that are large numbers", 1)
    return keys


def _opcode_name(code: bytes) -> str:
    names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
    return names.get(code.decode("latin-1"), f"byte {code.hex()}")


def kind_name(value: object) -> str:
    """Return what a value is, for messages."""
    return repr(value) if isinstance(value, Inert) else f"a {type(value).__name__}"


def _wrong(name: str) -> CheckpointError:
    return CheckpointError(f"{name} has arguments that it never has")


def _make_dict(args: tuple[object, ...], source: Source) -> dict[object, object]:
    if args:
        raise _wrong("a dict")
    return {}


def _make_set(args: tuple[object, ...], source: Source) -> set[object]:
    match args:
        case ():
            return set()
        case (list(items),):
            source.spend("steps", len(items))
            return set(_checked_keys(items, source))
    raise _wrong("a set")


def _make_parameter(args: tuple[object, ...], source: Source) -> Tensor:
    match args:
        case (Tensor() as data, bool(), *_):
            return data
    raise _wrong("torch.nn.Parameter")


def _make_tensor(args: tuple[object, ...], source: Source) -> Tensor:
    match args:
        case (Storage(flat), int(offset), tuple(size), tuple(stride), bool(), _, *marks):
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


def _load_storage(args: tuple[object, ...], source: Source) -> Storage:
    """Read a storage out of the bytes of a `torch.save` of its own, as plain pickles have them."""
    match args:
        case (bytes() | memoryview() as content,):
            source.spend("bytes of pickles in pickles", len(content))
        case _:
            raise _wrong("torch.storage._load_from_bytes")
    if source.nested:
        raise CheckpointError("a pickle in a pickle holds a third")
    source.nested = True
    storage = read_stream(memoryview(content), source)
    source.nested = False
    if not isinstance(storage, Storage):
        raise CheckpointError(f"a pickle in a pickle must hold a storage, got {kind_name(storage)}")
    return storage


def _make_persistent(args: tuple[object, ...], source: Source) -> Inert:
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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
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
        (module, name): StorageKind(dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in STORAGES.items()
    },
}
"""All that is rebuilt, by functions of this file."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001


def read_stream(data: memoryview, source: Source) -> object:
    """Read a plain pickle or the older format of `torch.save`, which `data` must end with."""
    value, position = Machine(data, 0, source).run()
    if type(value) is int and value == LEGACY_MAGIC:
        value, position = _read_legacy(data, position, source)
    if position != len(data):
        raise CheckpointError(f"{len(data) - position} bytes follow its end")
    return value


def _read_legacy(data: memoryview, position: int, source: Source) -> tuple[object, int]:
    """Read version, system, value, keys of storages, storages; return the value and its end."""
    version, position = Machine(data, position, source).run()
    system, position = Machine(data, position, source).run()
    if version != LEGACY_VERSION:
        raise CheckpointError("it is of another version of torch's older format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("it must be written on a little-endian machine")
    storages: dict[str, Storage] = {}

    def load(reference: object) -> object:
        match reference:
            case ("storage", StorageKind() as kind, str(key), str(), int(numel), None):
                if key not in storages:
                    size = storage_bytes(kind, numel, source)
                    # Filled below: the values follow the keys, which follow this pickle.
                    content = torch.empty(size, dtype=torch.uint8)
                    storages[key] = Storage(content.view(kind.dtype))
                return checked_storage(storages[key], kind, numel)
            case ("module", InertName() as name, _, _):
                return name
        raise CheckpointError("it refers to what is no storage")

    value, position = Machine(data, position, source, load).run()
    keys, position = Machine(data, position, source).run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("the keys of its storages must be a list of texts")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise CheckpointError("it must hold each storage that it refers to, once")
    for key in keys:
        flat = storages[key].flat
        reader = Machine(data, position, source)
        if reader.number("<q") != flat.numel():
            raise CheckpointError("a storage has another size than its tensors say")
        source.copy(reader.take(flat.numel() * flat.itemsize), flat.view(torch.uint8))
        position = reader.position
    return value, position


def storage_bytes(kind: StorageKind, numel: int, source: Source) -> int:
    """Return the bytes of a storage of `numel` elements, which are counted."""
    if numel < 0:
        raise CheckpointError(f"a storage has {numel} elements")
    source.spend("bytes of storages", numel * kind.dtype.itemsize)
    return numel * kind.dtype.itemsize


def checked_storage(storage: Storage, kind: StorageKind, numel: int) -> Storage:
    """Return `storage`; CheckpointError unless it is of the kind and size that is referred to."""
    if storage.flat.dtype != kind.dtype or storage.flat.numel() != numel:
        raise CheckpointError("a storage has two sizes or types")
    return storage
