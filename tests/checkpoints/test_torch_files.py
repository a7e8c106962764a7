"""Checkpoints of others are read whole or refused in words, and nothing of theirs ever runs."""

import copy
import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fuzz_unpickle import (
    Canary,
    Filter,
    call,
    failures,
    foreign_modules,
    fuzz,
    hostile_opcodes,
    persistent_pickle,
    rezipped,
    saved,
    text,
)
from ncvsd_inverse.checkpoints.pickles import Inert, InertName
from ncvsd_inverse.checkpoints.state_dicts import arguments_of, state_dict_of
from ncvsd_inverse.checkpoints.torch_files import MAX_DEPTH, read_checkpoint_file
from ncvsd_inverse.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
FORMATS = {
    "zip": saved,
    "legacy": lambda value: saved(value, zipped=False),
    "protocol 3": lambda value: pickle.dumps(value, 3),
    "protocol 4": lambda value: pickle.dumps(value, 4),
    "protocol 5": lambda value: pickle.dumps(value, 5),
}
HEAD = b"\x80\x04"


@pytest.fixture(scope="session")
def canary():
    return Canary()


@pytest.fixture
def read(tmp_path, monkeypatch, canary):
    """Return a reader of bytes that fails where reading did anything but to read."""
    monkeypatch.chdir(tmp_path)

    def read(content, **options):
        path = tmp_path / "checkpoint"
        path.write_bytes(content)
        before = set(tmp_path.iterdir()), canary.seen.copy()
        try:
            with canary.watching():
                return read_checkpoint_file(path, **options)
        finally:
            assert (set(tmp_path.iterdir()), canary.seen) == before

    return read


def refused(read, content, match, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        read(content, **options)
    assert caught.value.__cause__ is None, "refused by luck, not by a check"


def assert_same(got, expected):
    if isinstance(expected, torch.Tensor):
        assert type(got) is torch.Tensor
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert got.stride() == expected.stride() or expected.numel() < 2
        assert not got.requires_grad
        as_bytes = [x.detach().contiguous().view(-1).view(torch.uint8) for x in (got, expected)]
        assert torch.equal(*as_bytes)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key, value in expected.items():
            assert_same(got[key], value)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        assert isinstance(got, list if isinstance(expected, list) else tuple)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got == expected
        assert type(got) is type(expected)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_values_come_back_as_they_were(read, write):
    base = torch.arange(24.0).reshape(4, 6)
    value = {
        "dtypes": [torch.arange(5).to(dtype) for dtype in DTYPES],
        "views": [base, base.t(), base[1:3, ::2], base[2], base[3, 4]],
        "odd": [torch.zeros(0, 3), torch.tensor(2.5), torch.ones(1, 1, 1)],
        "parameter": nn.Parameter(base.clone()),
        "containers": [
            (1, -2, 1 << 40, 1 << 69),
            {"a": None, 3: True},
            {1, "x"},
            0.1,
            "ü",
        ],
        "nested": {"deep": [[[{"a": ()}]]]},
    }
    got = read(write(value))
    value["parameter"] = value["parameter"].detach()
    assert_same(got, value)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_tensors_that_share_still_do(read, write):
    base = torch.zeros(4, 4)
    shared = read(write([base, base]))
    assert shared[0] is shared[1]
    if write in (FORMATS["zip"], FORMATS["legacy"]):
        whole, row = read(write([base, base[2]]))
        row += 1
        assert whole.sum() == 4


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_state_dicts_and_optimizers(read, write):
    network = Filter(3)
    optimizer = torch.optim.Adam(network.parameters())
    network.inner(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    value = {"net": network.state_dict(), "optimizer": optimizer.state_dict()}
    assert_same(read(write(value)), value)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_what_is_no_weight_is_inert(read, write):
    value = [torch.float16, np.ones(3), np.float64(0.5), torch.Size([2]), torch.device("cuda:1")]
    got = read(write({"rest": value, "weight": torch.ones(1)}))
    assert got["weight"] == 1
    assert got["rest"][0] == InertName("torch", "float16")
    names = [(thing.module.replace("_core", "core"), thing.name) for thing in got["rest"][1:]]
    assert names[0][0].startswith("numpy.core.")
    assert names[1:] == [
        ("numpy.core.multiarray", "scalar"),
        ("torch", "Size"),
        ("torch", "device"),
    ]
    assert got["rest"][-1].args == ("cuda", 1)


def test_files_stay_as_they_are(read, tmp_path):
    content = saved([torch.zeros(1000)])
    (tensor,) = read(content)
    tensor += 1
    assert (tmp_path / "checkpoint").read_bytes() == content
    assert tensor.sum() == 1000


def test_zip_without_alignment(read):
    value = [torch.randn(5), torch.randn(7, dtype=torch.float64)]
    for length in range(1, 9):
        content = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(saved(value))) as old, zipfile.ZipFile(content, "w") as new:
            new.writestr("x" * length, "")
            for name in old.namelist():
                new.writestr(name, old.read(name))
        assert_same(read(content.getvalue()), value)


def test_large_bytes_are_views(read):
    for size in (1000, 100_000):
        got = read(pickle.dumps([bytes(size)]))[0]
        assert bytes(got) == bytes(size)
        assert isinstance(got, bytes) == (size == 1000)
        assert not isinstance(got, memoryview) or got.readonly


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_persistent_networks(read, tmp_path, protocol):
    network = Filter(3).half()
    network.inner.append(Filter(2))
    source = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    content = persistent_pickle(
        {"ema": network, "dataset_kwargs": {"resolution": 64}}, source=source, protocol=protocol
    )
    assert source.encode() in content
    got = read(content)
    assert got["dataset_kwargs"] == {"resolution": 64}
    assert repr(got["ema"]) == "<inert torch_utils.persistence.Filter>"
    assert_same(state_dict_of(got["ema"]), dict(network.state_dict()))
    assert arguments_of(got["ema"]) == {"gain": 2.0}
    assert source not in repr(vars_of(got["ema"]))
    assert not {"torch_utils", "dnnlib"} & {name.split(".")[0] for name in sys.modules}


def test_the_source_would_run_if_anything_ran_it(tmp_path):
    # What the pickle of the test above holds is no empty threat.
    content = persistent_pickle(Filter(1), source=f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with foreign_modules():
        persistence = sys.modules["torch_utils.persistence"]
        persistence._reconstruct_persistent_obj = lambda meta: exec(meta["module_src"], {})
        pickle.loads(content)
    assert (tmp_path / "ran").exists()


def vars_of(inert):
    return inert.module, inert.name, inert.args, inert.state


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_modules_become_stand_ins(read, write):
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU())
    got = read(write(network))
    assert isinstance(got, Inert)
    assert (got.module, got.name) == ("torch.nn.modules.container", "Sequential")
    assert_same(state_dict_of(got), dict(network.state_dict()))
    assert arguments_of(got) == {}
    convolution = got.state["_modules"]["0"]
    assert convolution.state["kernel_size"] == (3, 3)
    assert read(write({"act": nn.functional.silu})) == {
        "act": InertName("torch.nn.functional", "silu")
    }


def test_state_dict_of_odd_modules():
    tensor = torch.zeros(1)
    for attribute, value, match in [
        ("_parameters", {"w": 1}, "'w' must be a tensor, got a int"),
        ("_parameters", [1], "_parameters of N must be a dict, got a list"),
        ("_modules", {"a": tensor}, "'a' must be a module, got a Tensor"),
        ("_buffers", {"a.b": tensor}, "without dots"),
        ("_buffers", {1: tensor}, "without dots"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            state_dict_of(Inert("m", "N", (), {attribute: value}))
    assert state_dict_of(Inert("m", "N")) == {}
    for arguments in (3, [1], {1: 2}):
        with pytest.raises(CheckpointError, match="arguments of N must"):
            arguments_of(Inert("m", "N", (), {"_init_kwargs": arguments}))


def storage_stream(opcodes):
    """Return a stream of torch's older format with another value, and no storages."""
    parts = pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)
    system = pickle.dumps({"little_endian": True}, 2)
    return b"".join([*parts, system, b"\x80\x02", opcodes, b".", pickle.dumps([], 2)])


def nested(content):
    return call(
        "torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(content)) + content
    )


HOSTILE = hostile_opcodes("ran")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_act_are_refused_wherever_they_stand(read, name):
    opcodes = HOSTILE[name]
    match = rf"asks for {name}, which is refused".replace(".", r"\.")
    plain = HEAD + opcodes + b"."
    refused(read, plain, match)
    refused(read, storage_stream(opcodes), match)
    refused(read, rezipped(saved([]), lambda data: plain), match)
    refused(read, HEAD + nested(plain) + b".", match)
    refused(read, HEAD + nested(storage_stream(opcodes)) + b".", match)
    # Behind a value, as an attribute, as an argument, and as the keys of storages.
    refused(read, HEAD + b"]" + opcodes + b"a.", match)
    refused(read, HEAD + b"}" + text("__reduce__") + opcodes + b"s.", match)
    refused(read, HEAD + call("collections", "OrderedDict", opcodes) + b".", match)
    refused(read, storage_stream(b"N")[:-3] + opcodes + b".", match)


def test_the_hostile_corpus_acts_when_python_unpickles_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "posix.system", "builtins.eval", "builtins.exec"):
        pickle.loads(HEAD + HOSTILE[name] + b".")
        (tmp_path / "ran").unlink()


NN_LINEAR = b"ctorch.nn.modules.linear\nLinear\n)\x81"
ORDERED = b"ccollections\nOrderedDict\n)R"
ODD = {
    "extension code 1": (b"\x82\x01", "EXT1 is no opcode"),
    "extension code 2": (b"\x83\x01\x01", "EXT2 is no opcode"),
    "extension code 4": (b"\x84\x01\x01\x01\x01", "EXT4 is no opcode"),
    "INST": (b"(" + text("true")[5:] + b"ios\nsystem\n", "byte 74|INST|opcode"),
    "INST of a command": (b"(ios\nsystem\n", "INST is no opcode"),
    "OBJ": (b"(cos\nsystem\no", "asks for os.system"),
    "OBJ of a stand-in": (b"(ctorch.nn\nLinear\no", "OBJ is no opcode"),
    "NEWOBJ_EX": (b"ctorch.nn\nLinear\n)}\x92", "NEWOBJ_EX is no opcode"),
    "text reference": (b"Pos.system\n", "PERSID is no opcode"),
    "reference": (text("os.system") + b"Q", "refers to storages"),
    "dotted attribute": (text("torch.nn") + text("Module.__init__") + b"\x93", "Module.__init__"),
    "dotted attribute of a known name": (
        text("collections") + text("OrderedDict.__class__") + b"\x93",
        r"collections\.OrderedDict\.__class__, which is refused",
    ),
    "name that is no text": (b"K\x01K\x02\x93", "must be text"),
    "torch.nn that is not": (b"ctorch.nnx\nLinear\n", "torch.nnx.Linear, which is refused"),
    "name with line": (text("torch.nn") + text("a\nb") + b"\x93", r"torch\.nn\.a\\nb, which"),
    "calls a value": (b"])R", "calls a list"),
    "calls a storage kind": (b"ctorch\nFloatStorage\n)R", "calls a StorageKind"),
    "calls a result": (NN_LINEAR + b")R", "calls <inert torch.nn.modules.linear.Linear>"),
    "arguments that are no tuple": (b"ccollections\nOrderedDict\n]R", "must be a tuple"),
    "attributes of a tuple": (b")}b", "sets attributes of a tuple"),
    "attributes of a function": (b"ccollections\nOrderedDict\n}b", "sets attributes of a _Known"),
    "attributes of a class": (b"ctorch.nn\nLinear\n}b", "sets attributes of a InertName"),
    "items of an object": (NN_LINEAR + b"K\x01K\x02s", "items are put in <inert"),
    "append to a tuple": (b")K\x01a", "items are put in a tuple"),
    "key that hashes for long": (b"}(" + b")\x85" * 3 + b"K\x01u", "key must be text or a number"),
    "odd items": (b"}(K\x01u", "key has no value"),
    "keys that collide": (b"}\x8a\x09" + b"\xff" * 8 + b"\x00K\x01s", "at most 64 bits"),
    "set of stand-ins": (b"\x8f(" + NN_LINEAR + b"\x90", "key must be text or a number"),
    "function as a value": (b"ccollections\nOrderedDict\n", "holds a _Known"),
    "storage kind as a value": (b"ctorch\nFloatStorage\n", "holds a StorageKind"),
    "value that holds itself": (b"]\x94h\x00a", "holds itself"),
    "dict that holds itself": (b"}\x94K\x01h\x00s", "holds itself"),
    "stand-in that holds itself": (NN_LINEAR + b"\x94}" + text("a") + b"h\x00sb", "holds itself"),
    "deep tuple": (b")" + b"\x85" * MAX_DEPTH, "deep"),
    "very deep tuple": (b")" + b"\x85" * 20_000, "deep"),
    "very deep list": (b"]" * 20_000 + b"a" * 19_999, "deep"),
    "many marks": (b"(" * 20_000, "stack empty|one value"),
        "billion laughs": (b"]\x940" + b"".join(
        (b"h" + bytes([n])) * 2 + b"\x86\x940" for n in range(60)
    ) + b"h\x3c", "at most"),
    "billion lists": (b"N\x940" + b"".join(
        b"](" + (b"h" + bytes([n])) * 10 + b"e\x940" for n in range(12)
    ) + b"h\x0c", "at most"),
    "huge integer": (b"\x8a\x28" + bytes(40), "integer has 40 bytes"),
    "huge integer of four": (b"\x8b" + struct.pack("<i", 1 << 30), "LONG4 is no opcode"),
    "announced integer": (b"\x8a\xff", "truncated"),
    "announced bytes": (b"\x8e" + struct.pack("<Q", 1 << 62), "truncated"),
    "announced text": (b"X" + struct.pack("<I", (1 << 32) - 1), "truncated"),
    "frozen set": (b"(\x91", "FROZENSET is no opcode"),
    "announced frame": (b"\x95" + struct.pack("<Q", 1 << 40), "truncated"),
    "far memo": (b"N" + b"r" + struct.pack("<I", (1 << 32) - 1) + b"0h\x01", "memo 1 is empty"),
    "empty stack": (b"0", "POP finds its stack empty"),
    "two values": (b"NN", "one value"),
    "no value": (b"", "one value"),
    "protocol 0": (b"I1\n", "INT is no opcode"),
    "protocol 9": (b"\x80\x09", "protocol must be 2 to 5, got 9"),
    "text": (b"X\x01\x00\x00\x00\xff", "not UTF-8"),
    "name without end": (b"c" + b"a" * 2000, "name has no end"),
    "persistent object without state": (
        call("torch_utils.persistence", "_reconstruct_persistent_obj", b"}"),
        "persistent object has arguments that it never has",
    ),
    "pickle in a pickle in a pickle": (nested(HEAD + nested(b"N.") + b"."), "holds a third"),
    "value in a pickle": (nested(b"\x80\x02N."), "must hold a storage, got a NoneType"),
    "pickle in a pickle without end": (nested(b""), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_opcodes_are_refused(read, name):
    opcodes, match = ODD[name]
    refused(read, HEAD + opcodes + b".", match)


def test_opcodes_are_counted(read, monkeypatch):
    monkeypatch.setattr("ncvsd_inverse.checkpoints.pickles.MAX_OBJECTS", 1000)
    assert read(HEAD + b"N0" * 490 + b"N.") is None
    refused(read, HEAD + b"N0" * 500 + b"N.", "more than 1000 steps")
    refused(read, HEAD + nested(b"\x80\x02" + b"N0" * 500 + b"N.") + b".", "more than 1000 steps")


def test_attributes_of_stand_ins_are_only_data(read):
    names = ["__class__", "__dict__", "__setstate__", "__reduce__", "module", "state"]
    state = b"}" + b"".join(text(name) + text("changed") + b"s" for name in names)
    assert read(HEAD + NN_LINEAR + b")b.").state == {"__setstate__": ()}
    got = read(HEAD + NN_LINEAR + state + b"b.")
    assert type(got) is Inert
    assert (got.module, got.name) == ("torch.nn.modules.linear", "Linear")
    assert got.state == dict.fromkeys(names, "changed")
    assert read(HEAD + ORDERED + state + b"b.") == {}
    assert not callable(got)
    assert not callable(InertName("os", "system"))


def test_depth_up_to_the_limit_can_be_used_plainly(read):
    got = read(HEAD + b")" + b"\x85" * (MAX_DEPTH - 1) + b".")
    assert copy.deepcopy(got) == got
    assert pickle.loads(pickle.dumps(got)) == got


def tensor_opcodes(
    offset=0, size=(4,), stride=(1,), numel=4, storage="FloatStorage", legacy=False, mark=b""
):
    """Return the opcodes of a tensor in storage "0" of `numel` elements."""

    def number(value):
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    reference = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text("0") + text("cpu")
    reference += number(numel) + (b"N" if legacy else b"") + b"tQ"
    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride)]
    start = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return start + reference + number(offset) + b"".join(sizes) + b"\x89" + ORDERED + mark + b"tR"


BAD_TENSORS = {
    "outside": ({"size": (5,)}, "must lie within its storage of 4"),
    "offset": ({"offset": 1}, "must lie within its storage"),
    "stride": ({"size": (2, 2), "stride": (3, 1)}, "must lie within its storage"),
    "gigabytes of one value": ({"size": (1 << 40,), "stride": (0,)}, "must lie within its storage"),
    "negative offset": ({"offset": -1}, "whole numbers >= 0"),
    "negative stride": ({"stride": (-1,)}, "whole numbers >= 0"),
    "negative size": ({"size": (-4,)}, "whole numbers >= 0"),
    "huge size": ({"size": (1 << 50, 1 << 50), "stride": (1, 1)}, "a tensor has the size"),
    "huge empty size": ({"size": (0, 1 << 61), "stride": (1, 1)}, "a tensor has the size"),
    "sizes without strides": ({"size": (2, 2)}, "2 sizes and 1 strides"),
    "dimensions": ({"size": (1,) * 40, "stride": (1,) * 40}, "40 sizes"),
    "larger storage": ({"numel": 5}, "it must hold the 20 bytes of its storage"),
    "huge storage": ({"numel": 1 << 40}, "more than [0-9]+ bytes of storages"),
    "negative storage": ({"numel": -1}, "storage has -1 elements"),
    "conjugate": ({"mark": b"}" + text("conj") + b"\x88s"}, "conjugate"),
    "a tensor as mark": (
        {
            "mark": b"ctorch._utils\n_rebuild_parameter\n"
            + tensor_opcodes()
            + b"\x89"
            + ORDERED
            + b"\x87R"
        },
        "conjugate",
    ),
    "wider storage": ({"storage": "DoubleStorage"}, "it must hold the 32 bytes of its storage"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_lie_within_their_bytes(read, name):
    content = saved(torch.arange(4.0))
    good = rezipped(content, lambda data: b"\x80\x02" + tensor_opcodes() + b".")
    assert_same(read(good), torch.arange(4.0))
    options, match = BAD_TENSORS[name]
    bad = rezipped(content, lambda data: b"\x80\x02" + tensor_opcodes(**options) + b".")
    refused(read, bad, match)


def test_storages_of_the_older_format_are_all_there(read):
    def stream(numel, keys, content, tensor=None):
        head = storage_stream(b"")[: -len(b"." + pickle.dumps([], 2))]
        opcodes = tensor or tensor_opcodes(numel=numel, legacy=True)
        return head + opcodes + b"." + pickle.dumps(keys, 2) + content

    values = struct.pack("<q4f", 4, 0, 1, 2, 3)
    assert_same(read(stream(4, ["0"], values)), torch.arange(4.0))
    refused(read, stream(4, ["0"], values + b"x"), "1 bytes follow its end")
    refused(read, stream(4, ["0"], values[:-1]), "truncated")
    refused(read, stream(4, ["0", "0"], values + values), "each storage that it refers to, once")
    refused(read, stream(4, ["1"], values), "each storage that it refers to, once")
    refused(read, stream(4, [], values), "each storage that it refers to, once")
    refused(read, stream(4, 3, values), "must be a list of texts")
    refused(read, stream(5, ["0"], values), "a storage has another size")
    refused(read, stream(1 << 40, ["0"], values), "bytes of storages")
    kinds = [tensor_opcodes(storage=kind, legacy=True) for kind in ("FloatStorage", "IntStorage")]
    two = b"".join(kinds) + b"\x86"
    refused(read, stream(4, ["0"], values, two), "two sizes or types")


def test_bytes_are_read_once(read):
    # The same storage again and again would cost its size each time, for three bytes.
    opcodes = b"ctorch.storage\n_load_from_bytes\n\x940"
    stream = pickle.dumps(torch.zeros(1000), 4)
    start = stream.index(b"\x80\x02\x8a\x0a")
    content = stream[start : stream.rindex(b"\x00" * 100) + 100]
    opcodes += b"B" + struct.pack("<I", len(content)) + content + b"\x940"
    refused(read, HEAD + opcodes + b"h\x00h\x01\x85R0" * 3 + b"N.", "bytes of pickles in pickles")
    views = b"".join(tensor_opcodes() + b"0" for _ in range(5000))
    zipped = rezipped(saved(torch.arange(4.0)), lambda data: b"\x80\x02" + views + b"N.")
    assert read(zipped) is None


def zipped(entries, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return file.getvalue()


MANY = b"".join(text(str(n)) for n in range(5000))
COPIES = {
    "sets": (b"](" + MANY + b"e", b"c__builtin__\nset\nh\x00\x85R", "steps"),
    "arguments": (
        b"(" + MANY + b"t", b"ctorch._utils\n_rebuild_tensor_v2\nh\x00R", "calls with 5000 arg"
    ),
    "arguments of stand-ins": (
        b"(" + MANY + b"t", b"ctorch.nn\nLinear\nh\x00\x81\x94", "at most 100000 objects"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_what_is_there_once_are_counted(read, monkeypatch, name):
    # A few bytes each would cost as much as what they copy.
    for module in ("pickles", "torch_files"):
        monkeypatch.setattr(f"ncvsd_inverse.checkpoints.{module}.MAX_OBJECTS", 100_000)
    first, again, match = COPIES[name]
    refused(read, HEAD + first + b"\x940(" + again * 50 + b"t.", match)


def test_zips_that_are_odd(read, tmp_path):
    value = b"\x80\x02N."
    good = [("archive/data.pkl", value)]
    assert read(zipped(good)) is None
    # Names are only compared: whatever they are, nothing is written.
    for name in ("../ran", "/ran", "..\\ran", "C:\\ran", "archive/../../ran", "archive/data.pkl/x"):
        assert read(zipped([(name, b"x"), *good])) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    for entries, match in [
        ([], "must end with|one PREFIX|1 to"),
        ([("data.pkl", value)], "one PREFIX/data.pkl"),
        ([("a/b/data.pkl", value)], "one PREFIX/data.pkl"),
        ([*good, ("other/data.pkl", value)], "one PREFIX/data.pkl"),
        ([*good, ("archive/byteorder", "big")], "little-endian"),
        ([("archive/data.pkl", value + b"more")], "4 bytes follow"),
    ]:
        content = zipped(entries)
        refused(read, content, match if entries else "byte 50|UTF-8|opcode|truncated")
    bomb = zipped([("archive/data.pkl", value + bytes(10**7))], compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 20_000
    refused(read, bomb, "stored, not compressed")
    with pytest.warns(UserWarning, match="Duplicate name"):
        double = zipped([*good, *good])
    refused(read, double, "same name")


def test_zip_directories_that_lie(read):
    content = zipped([("archive/data.pkl", b"\x80\x02N.")])
    central, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")

    def changed(at, layout, value):
        data = bytearray(content)
        struct.pack_into(layout, data, at, value)
        return bytes(data)

    for at, layout, value, match in [
        (central + 8, "<H", 1, "encrypted"),
        (central + 10, "<H", 8, "stored, not compressed"),
        (central + 20, "<L", 3, "stored, not compressed"),
        (central + 42, "<L", 7, "directory"),
        (central + 42, "<L", 0xFFFFFFFF, "directory is damaged"),
        (central + 28, "<H", 60_000, "directory is damaged"),
        (central + 46, "<B", 0xFF, "not UTF-8"),
        (central + 46, "<B", 0x62, "directory is damaged"),
        (28, "<H", 60_000, "truncated"),
        (end + 10, "<H", 2, "directory"),
        (end + 10, "<H", 0xFFFF, "directory"),
        (end + 12, "<L", 1 << 30, "directory is damaged"),
        (end + 16, "<L", 0, "directory"),
        (end + 20, "<H", 5, "directory is damaged"),
    ]:
        refused(read, changed(at, layout, value), match)
    larger = bytearray(content)
    struct.pack_into("<2L", larger, central + 20, 1 << 31, 1 << 31)
    refused(read, bytes(larger), "truncated")


def test_zip_with_wide_sizes(read):
    # As in files of 4 GiB and more: sizes and offset stand in the extra field.
    content = bytearray(zipped([("archive/data.pkl", b"\x80\x02K\x07.")]))
    central, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    extra = struct.pack("<2H3Q", 1, 24, 5, 5, 0)
    struct.pack_into("<2L", content, central + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<L", content, central + 42, 0xFFFFFFFF)
    struct.pack_into("<H", content, central + 30, len(extra))
    struct.pack_into("<L", content, end + 12, end - central + len(extra))
    assert read(bytes(content[:end] + extra + content[end:])) == 7
    short = extra.replace(struct.pack("<2H", 1, 24), struct.pack("<2H", 2, 24))
    refused(read, bytes(content[:end] + short + content[end:]), "directory is damaged")


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_cut_anywhere(read, write):
    content = write({"a": torch.arange(3.0), "b": [np.ones(2), "text", (1, 2.5)]})
    read(content)
    for length in range(len(content)):
        refused(read, content[:length], "cannot be read")
    assert length > 400


def test_files_that_are_none(tmp_path, read):
    with pytest.raises(CheckpointError, match="absent cannot be read: there is no such file"):
        read_checkpoint_file(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_checkpoint_file(str(tmp_path))
    refused(read, b"", "must have 1 to")
    refused(read, pickle.dumps([1] * 100), "must have 1 to 100 bytes", max_bytes=100)
    refused(read, b"\x89PNG\r\n\x1a\n", "no opcode that weights need")
    refused(read, b"version https://git-lfs.github.com/spec/v1\n", "no opcode that weights need")
    refused(read, b"<!DOCTYPE html>", "no opcode that weights need")


def test_what_no_check_foresaw_is_still_one_error(read, monkeypatch):
    def broken(value):
        raise RecursionError("too deep")

    monkeypatch.setattr("ncvsd_inverse.checkpoints.torch_files._check_value", broken)
    with pytest.raises(CheckpointError, match="is damaged: RecursionError: too deep"):
        read(pickle.dumps(1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("write", [FORMATS["zip"], FORMATS["legacy"], FORMATS["protocol 4"]])
def test_memory_stays_below_one_and_a_half_files(tmp_path, write):
    path = tmp_path / "large"
    value = {str(n): torch.full((1 << 20,), float(n)) for n in range(16)}
    path.write_bytes(write(value))
    expected = {name: tensor.mean() for name, tensor in value.items()}
    del value

    def memory(line):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(f"{line}:")[1].split()[0])

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    got = read_checkpoint_file(path)
    assert memory("VmHWM") - before < 1.5 * path.stat().st_size
    assert {name: tensor.mean() for name, tensor in got.items()} == expected


def test_mutated_files(tmp_path, canary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "fuzz"
    folder.mkdir()
    counts = fuzz(4000, 1, folder, canary)
    assert failures(counts) == 0, counts
    assert counts["refused without a check of its own"] == 0
    assert counts["read"] > 200
    assert counts["refused"] > 2000
    assert list(tmp_path.iterdir()) == [folder]


def test_the_canary_hears(canary, tmp_path):
    before = canary.seen.total()
    with canary.watching():
        pickle.loads(b"\x80\x04N.")
        assert canary.seen.total() == before
        pickle.loads(HEAD + call("os", "system", text("true")) + b".")
        (tmp_path / "file").write_text("")
    assert canary.seen["os.system"] == 1
    assert canary.seen["open"] == 1
    canary.seen.clear()


@pytest.mark.parametrize("make", [dict.fromkeys, set], ids=["dict", "set"])
@pytest.mark.parametrize("kind", [int, float])
def test_keys_that_can_be_chosen_to_collide_are_few(tmp_path, make, kind):
    """Numbers whose hashes share their low bits: each is compared with all before it."""
    path = tmp_path / "keys.pkl"
    path.write_bytes(pickle.dumps(make([kind(number << 40) for number in range(1, 5001)])))
    assert len(read_checkpoint_file(path)) == 5000
    path.write_bytes(pickle.dumps(make([kind(number << 40) for number in range(1, 5002)])))
    with pytest.raises(CheckpointError, match="more than 5000 keys that are large numbers"):
        read_checkpoint_file(path)
    path.write_bytes(pickle.dumps(make(range(-10_000, 10_000))))
    assert len(read_checkpoint_file(path)) == 20_000
