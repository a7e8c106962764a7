r"""Read damaged and hostile files of every other kind, and count what comes of them.

    python experiments/security/fuzz_files.py --inputs 100000 --seed 0

Valid cards, training configurations, safetensors, archives of pictures, pictures and benchmark
records are mutated as what they are (other values and names in their trees, other headers, other
members) and as bytes, and read as the package reads them, while an audit hook watches what Python
does. Allowed is a value or the error that the reader documents. Everything else is a failure:
another error, a command, an import, a file opened otherwise than to be read, a second of computing,
or more memory than a limit of the system allows. Prints a table, and exits with 1 if there is one.
"""

import argparse
import codecs
import hashlib
import io
import json
import math
import os
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fuzz_unpickle import SLOW_SECONDS, Canary
from ncvsd_inverse import CheckpointError, load_prior
from ncvsd_inverse.images import read_image, read_images, read_picture
from ncvsd_inverse.machine import PeakMemory
from ncvsd_inverse.networks import ConcatDenoiser, UNetShape
from ncvsd_inverse.priors import save_prior
from ncvsd_inverse.training.data import read_data
from ncvsd_inverse.training.presets import load_distill_config, load_teacher_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from harness.records import Record, read_lines

MEMORY_LIMIT = 3 << 30
"""Bytes of address space that reading may take beyond what the process has.

Decoding threads reserve 1.1 GiB of it, of which they use little.
"""
HARMLESS = {
    "array.__new__",
    "object.__getattr__",
    "os.listdir",
    "os.scandir",
    "pathlib.Path.glob",
    "sys._getframe",
}
"""Audit events of looking into a folder, of making an array, and of a log that notes its caller."""
CONTROL = "a\x1b[2J\x07\u202eb"


@dataclass(frozen=True)
class Raw:
    """A text that stands in a tree as it is, whatever the format makes of it."""

    text: str


VALUES: list[object] = [
    None, True, False, 0, 1, -1, -64, 3, 100_000, 2**31, 2**63 - 1, 2**63, 10**400, 0.5, -0.0,
    1e-320, 1e300, math.nan, math.inf, -math.inf, "", "false", "1", "nan", CONTROL, "\ud800",
    "x" * 100_000, "../../etc/passwd", "os.system", [], {}, [[]], [1] * 100_000,
    [0.1, 0.2], ["a", 1], {"a": 1},
    {CONTROL: CONTROL}, {"": None}, Raw("1e999"), Raw("9" * 5000), Raw("[" * 5000),
    Raw('{"a":' * 5000), Raw("0x" + "f" * 5000), Raw("1979-05-27"), Raw("-"),
]  # fmt: skip
"""What takes the place of a value in a tree."""


def places(tree: object) -> list[tuple[Any, Any]]:
    """Return containers of a tree with each of their keys; of a list its first three indices."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < 1000:
        node = waiting.pop()
        if isinstance(node, dict | list):
            # Long lists of numbers would take nearly all of the changes.
            keys = list(node) if isinstance(node, dict) else range(min(len(node), 3))
            found += [(node, key) for key in keys]
            waiting += [node[key] for key in keys]
    return found


def grown(tree: Any, draw: random.Random) -> Any:  # noqa: ANN401 as JSON is
    """Return a copy of a tree with one to four of its places changed."""
    tree = deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        near = places(tree)
        if not near:
            return draw.choice(VALUES)
        node, key = draw.choice(near)
        match draw.randrange(8):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[draw.choice(["surprise", CONTROL, f"{key}x", "__class__", ""])] = node.pop(key)
            case 2 if isinstance(node, dict):
                node[draw.choice(["surprise", "head_channels", "statistics", "points"])] = 1
            case 3:
                node[key] = [deepcopy(node[key]) for _ in range(draw.choice((1, 2, 8)))]
            case 4:
                other, name = draw.choice(near)
                node[key] = deepcopy(other.get(name) if isinstance(other, dict) else node[key])
            case 5 if type(node[key]) in (int, float):
                factor = draw.choice((-1, 0, 2, 1000, 10**9, 0.5, 1e30))
                with suppress(OverflowError):
                    node[key] *= factor
            case _:
                node[key] = deepcopy(draw.choice(VALUES))
    return tree


def as_json(tree: object) -> bytes:
    """Return a tree as JSON."""
    marks: dict[str, str] = {}

    def marked(node: object) -> object:
        if isinstance(node, Raw):
            marks[f"<raw {len(marks)}>"] = node.text
            return f"<raw {len(marks) - 1}>"
        if isinstance(node, dict):
            return {name: marked(item) for name, item in node.items()}
        return [marked(item) for item in node] if isinstance(node, list) else node

    text = json.dumps(marked(tree))
    for mark, raw in marks.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def as_toml(tree: object) -> bytes:
    """Return a tree as TOML, tables within the first inline."""

    def of(node: object) -> str:
        match node:
            case Raw(text):
                return text
            case None:
                return "none"
            case dict():
                return "{" + ", ".join(f"{json.dumps(k)} = {of(v)}" for k, v in node.items()) + "}"
            case list():
                return "[" + ", ".join(map(of, node)) + "]"
            case float():
                return repr(node)
        return json.dumps(node)

    if not isinstance(tree, dict):
        return of(tree).encode(errors="surrogatepass")
    lines = [f"{json.dumps(name)} = {of(item)}" for name, item in tree.items()]
    return "\n".join(lines).encode(errors="surrogatepass")


def scratched(content: bytes, draw: random.Random) -> bytes:
    """Return bytes changed at one to eight places."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at = draw.randrange(len(data) + 1)
        until = at + draw.choice((1, 2, 4, 16, 256))
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at:until]
            case 2:
                data[at:at] = data[at:until] * draw.choice((1, 2, 50))
            case 3 if draw.random() < 0.3:
                del data[at:]
            case 4:
                size = draw.choice((2, 4, 8))
                number = draw.choice((0, 1, 1 << 15, (1 << 16) - 1, 1 << 31, (1 << 63) - 1))
                number = min(number, (1 << 8 * size) - 1)
                data[at : at + size] = number.to_bytes(
                    size, "little" if draw.random() < 0.5 else "big"
                )
            case _:
                data[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
    return bytes(data)


def maybe_scratched(content: bytes, draw: random.Random) -> bytes:
    """Return bytes as they are, and now and then changed."""
    return scratched(content, draw) if draw.random() < 0.2 else content


def pictures() -> dict[str, bytes]:
    """Return small pictures of every kind by name."""
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    made = {}
    for name, mode, form, options in (
        ("rgb.png", "RGB", "PNG", {}),
        ("rgba.png", "RGBA", "PNG", {}),
        ("grey.png", "L", "PNG", {}),
        ("palette.png", "P", "PNG", {}),
        ("one.jpg", "RGB", "JPEG", {"exif": Image.Exif()}),
        ("steps.jpg", "RGB", "JPEG", {"progressive": True}),
        ("one.webp", "RGB", "WEBP", {}),
        ("exact.webp", "RGBA", "WEBP", {"lossless": True}),
        ("one.tif", "RGB", "TIFF", {}),
        ("packed.tif", "RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("one.bmp", "RGB", "BMP", {}),
    ):
        file = io.BytesIO()
        Image.fromarray(values, "RGBA").convert(mode).save(file, form, **options)
        made[name] = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    made["deep.png"] = file.getvalue()
    rows = b"".join(b"\0" + values[row, :, :3].astype(">u2").tobytes() for row in range(8))
    made["colours.png"] = png({b"IHDR": struct.pack(">2I5B", 8, 8, 16, 2, 0, 0, 0),
                               b"IDAT": zlib.compress(rows), b"IEND": b""})  # fmt: skip
    return made


def png(chunks: Mapping[bytes, bytes]) -> bytes:
    """Return a PNG of chunks, their sums right."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks.items():
        parts += [
            struct.pack(">I", len(data)),
            kind,
            data,
            struct.pack(">I", zlib.crc32(kind + data)),
        ]
    return b"".join(parts)


def changed_picture(content: bytes, draw: random.Random) -> bytes:
    """Return a picture changed: a PNG often within its chunks, whose sums are then right."""
    if not content.startswith(b"\x89PNG") or draw.random() < 0.4:
        return scratched(content, draw)
    chunks, at = {}, 8
    while at < len(content):
        (size,) = struct.unpack_from(">I", content, at)
        chunks[content[at + 4 : at + 8]] = content[at + 8 : at + 8 + size]
        at += 12 + size
    kind = draw.choice([*chunks, b"IHDR"])
    if kind == b"IDAT" and draw.random() < 0.5:
        chunks[kind] = zlib.compress(scratched(zlib.decompress(chunks[kind]), draw))
    elif draw.random() < 0.2:
        chunks[draw.choice((b"iCCP", b"tEXt", b"eXIf", b"tRNS", b"acTL"))] = draw.randbytes(40)
    else:
        chunks[kind] = scratched(chunks[kind], draw)
    return png(chunks)


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        write: makes the files of an input in the folder.
        read: reads them.
        error: what reading may raise.
    """

    write: Callable[[random.Random], None]
    read: Callable[[], object]
    error: type[Exception]


def of_cards(folder: Path) -> Kind:
    """Cards of a prior whose weights are as they were."""
    stem, card = saved_prior(folder)
    statistics = {
        "mean": [[[0.1]], [[0.2]], [[0.3]]],
        "mixing": [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]],
        "levels": [0.1, 2.0],
        "radii": [0.0, 0.25],
        "spectra": [[[0.5, 0.25]] * 3] * 3,
    }
    point = {"temperature": 0.5, "noise": 0.7, "first": 3.0, "smallest": 0.05, "last": 0.0}
    more = {
        "noise_scale": [[0.1, 1.2]],
        "statistics": statistics,
        "points": {"other": {"10": point}, "blur": {"4": point}},
    }
    foreign = [
        {"kind": "adm", "arguments": {
            "resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32,
            "channels": [32], "blocks": 1, "attention": [], "heads": ["num_heads", 1],
            "attention_order": "legacy", "block_resampling": True, "scale_shift": True,
            "num_classes": 0}},
        {"kind": "edm", "sigma_data": 0.5, "arguments": {
            "model_type": "ddpm", "img_resolution": 8, "in_channels": 3, "out_channels": 3,
            "label_dim": 0, "augment_dim": 0, "model_channels": 128, "channel_mult": [1],
            "channel_mult_emb": 4, "num_blocks": 1, "attn_resolutions": []}},
    ]  # fmt: skip
    cards = [{**card, **more}] * 4
    cards += [{**card, "kind": "diffusion", "gamma": None, "network": one} for one in foreign]

    def write(draw: random.Random) -> None:
        text = as_json(grown(draw.choice(cards), draw))
        stem.with_suffix(".json").write_bytes(maybe_scratched(text, draw))

    return Kind(write, lambda: repr(load_prior(stem)), CheckpointError)


def of_configurations(folder: Path) -> Kind:
    """Training configurations, of teachers and of students."""
    path = folder / "settings.toml"
    loads = {"teacher": load_teacher_config, "distill": load_distill_config}
    whole = {name: load("faces64").to_dict() for name, load in loads.items()}
    # As JSON has it: what is not set is left out.
    trees = {
        name: json.loads(json.dumps({k: v for k, v in tree.items() if v is not None}))
        for name, tree in whole.items()
    }
    wanted = ["teacher"]

    def write(draw: random.Random) -> None:
        wanted[0] = draw.choice(list(loads))
        path.write_bytes(maybe_scratched(as_toml(grown(trees[wanted[0]], draw)), draw))

    return Kind(write, lambda: loads[wanted[0]](path).to_toml(), ValueError)


def of_safetensors(folder: Path) -> Kind:
    """Weights beside their card, which has their true hash, and without one."""
    stem, card = saved_prior(folder)
    weights, beside = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    dtypes = ["I32", "F16", "BF16", "F64", "F8_E4M3", "F8_E8M0", "F4", "C64", "U8", "BOOL", "F128"]

    def write(draw: random.Random) -> None:
        tree = deepcopy(header)
        part = draw.random()
        if part < 0.5:
            entry = tree[draw.choice(list(tree))]
            entry["dtype"] = draw.choice(dtypes)
            if draw.random() < 0.5:
                start, end = entry["data_offsets"]
                entry["shape"] = [(end - start) // draw.choice((1, 2, 4, 8))]
        elif part < 0.85:
            tree = grown(tree, draw)
        text = as_json(tree)
        length = len(text) if draw.random() < 0.9 else draw.choice((0, 7, 1 << 30, (1 << 63) - 1))
        values = scratched(body, draw) if draw.random() < 0.2 else body
        changed = maybe_scratched(struct.pack("<Q", length) + text + values, draw)
        weights.write_bytes(changed)
        if draw.random() < 0.3:
            beside.unlink(missing_ok=True)
        else:
            digest = hashlib.sha256(changed).hexdigest()
            beside.write_bytes(as_json({**card, "sha256": digest}))

    def read() -> object:
        return repr(load_prior(weights))

    return Kind(write, read, CheckpointError)


def of_archives(folder: Path) -> Kind:
    """Archives of pictures with their labels, read as pictures and as training data."""
    path = folder / "pictures.zip"
    known = pictures()
    labels = {"labels": [[name, number % 3] for number, name in enumerate(known)]}

    def write(draw: random.Random) -> None:
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that come twice
            tree = labels if draw.random() < 0.6 else grown(labels, draw)
            archive.writestr("dataset.json", maybe_scratched(as_json(tree), draw))
            for name in draw.sample(list(known), draw.randrange(1, 6)):
                content = known[name]
                if draw.random() < 0.3:
                    content = changed_picture(content, draw)
                if draw.random() < 0.1:
                    name = draw.choice((f"../{name}", f"/{name}", f"a\x1b[2J{name}", f"x/{name}"))
                packing = draw.choice((0, 8, 12, 14))
                archive.writestr(zipfile.ZipInfo(name), content, packing)
        if draw.random() < 0.7:
            data = bytearray(path.read_bytes())
            end = len(data)
            for _ in range(draw.choice((1, 1, 3))):
                # A field of a header: local, of the directory, or the end of it.
                sign = draw.choice((b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"))
                found = data.find(sign, draw.randrange(end))
                at = max(found, 0) + draw.randrange(4, 46)
                data[at : at + 2] = draw.choice((b"\0\0", b"\1\0", b"\xff\xff", draw.randbytes(2)))
            path.write_bytes(data)
        elif draw.random() < 0.5:
            path.write_bytes(scratched(path.read_bytes(), draw))

    def read() -> object:
        fault = None
        try:
            list(read_images(path))
        except ValueError as error:
            fault = error
        data = read_data(path, workers=0, labels=True)
        next(data.batches(0, 2, seed=0))
        if fault is not None:
            raise fault
        return data

    return Kind(write, read, ValueError)


def of_pictures(folder: Path) -> Kind:
    """Pictures, of whatever name."""
    known = pictures()
    path = folder / "picture.png"

    def write(draw: random.Random) -> None:
        path.write_bytes(changed_picture(draw.choice(list(known.values())), draw))

    return Kind(write, lambda: (read_picture(path), read_image(path)), ValueError)


def of_records(folder: Path) -> Kind:
    """Records of a benchmark."""
    record = {
        "key": "sr4x-ncvsd-10-4", "task": "sr4x", "prior": "ncvsd_faces64",
        "prior_sha256": {"student": "aa11"}, "method": "ncvsd", "title": "NCVSD (ours)",
        "network": "student", "samples": True, "reference": "peng2025ncvsd", "nfe": 10,
        "settings": {"weight": 0.25}, "tuned": True, "tuned_calls": None, "data": "test.zip",
        "data_sha256": "first4", "size": [16, 16], "images": 2, "draws": 8, "sigma_y": 0.05,
        "seed": 0, "forward": 10.0, "backward": 0.0, "seconds": 0.2, "peak_mib": 512.4,
        "values": {"psnr": [24.0, 25.0], "ssim": [0.8, None]}, "failures": {"1": "ValueError"},
        "environment": {"commit": "abc123"},
    }  # fmt: skip
    Record.from_json(as_json(record))
    path = folder / "records.jsonl"

    def write(draw: random.Random) -> None:
        lines = [as_json(record), maybe_scratched(as_json(grown(record, draw)), draw)]
        path.write_bytes(b"\n".join(draw.sample(lines, 2)) + draw.choice((b"\n", b"")))

    def read() -> object:
        held = read_lines(folder)
        if held.notes:
            raise ValueError("damaged lines are left out")
        return [
            (one.to_json(), one.row, one.mean("psnr"), one.error("psnr")) for one in held.records
        ]

    return Kind(write, read, ValueError)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "cards": of_cards,
    "configurations": of_configurations,
    "safetensors": of_safetensors,
    "archives": of_archives,
    "pictures": of_pictures,
    "records": of_records,
}


def saved_prior(folder: Path) -> tuple[Path, dict[str, object]]:
    """Save a tiny prior; return its path without suffix, and its card."""
    torch.manual_seed(0)
    network = ConcatDenoiser(UNetShape(8, channels=(8,), blocks=1, attention=(), head_channels=8))
    texts = ("licence", "data", "weaknesses", "intended_use")
    save_prior(
        folder / "tiny",
        network,
        {
            "name": "tiny", "kind": "ncvsd", "image_shape": [3, 8, 8], "gamma": 0.3,
            "sigma_min": 0.004, "sigma_max": 40.0, "training": {"steps": 0}, "evaluation": {},
            **dict.fromkeys(texts, "text"),
        },
    )  # fmt: skip
    return folder / "tiny", json.loads((folder / "tiny.json").read_text())


def fuzz(kind: Kind, inputs: int, seed: str, folder: Path, canary: Canary) -> Counter[str]:
    """Read so many inputs and count what came of them, by name."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    before = sum(count for event, count in canary.seen.items() if event not in HARMLESS)
    kind.write(random.Random(0))
    for name in ("utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be"):
        codecs.lookup(name)  # which JSON may be written in
    with suppress(kind.error):
        kind.read()  # which imports what the first reading needs
    known = set(folder.parent.rglob("*"))
    for number in range(inputs):
        kind.write(draw)
        begun = time.process_time()
        try:
            with canary.watching():
                kind.read()
            counts["read"] += 1
        except kind.error:
            counts["refused"] += 1
        except Exception as error:
            counts["other errors"] += 1
            print(f"input {number} of {seed}: {error!r:.300}", file=sys.stderr)
        spent = time.process_time() - begun
        if spent > SLOW_SECONDS:
            counts["slow"] += 1
            print(f"input {number} of {seed}: {spent:.1f} s", file=sys.stderr)
    after = sum(count for event, count in canary.seen.items() if event not in HARMLESS)
    counts["events"] = after - before
    counts["stray files"] = len(set(folder.parent.rglob("*")) - known)
    return counts


def table(rows: Mapping[str, Counter[str]], inputs: int) -> Iterator[str]:
    """Yield the lines of a Markdown table of counts."""
    yield (
        f"| {inputs:,} inputs a kind | read | refused | other errors | over a second "
        "| events | files left | memory, MiB | seconds |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    names = ("read", "refused", "other errors", "slow", "events", "stray files", "grown", "seconds")
    for title, counts in rows.items():
        yield f"| {title} | {' | '.join(f'{counts[name]:,}' for name in names)} |"


def main() -> None:
    """Fuzz under a limit of memory, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of files (all)"
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="of a kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    canary = Canary()
    rows: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        os.chdir(name)  # hostile files name relative paths
        kinds = {}
        for title in args.kinds:
            folder = Path(name) / title
            folder.mkdir()
            kinds[title] = KINDS[title](folder)
            # Whatever is imported at its first use is imported here.
            fuzz(kinds[title], 100, f"first {args.seed} {title}", folder, canary)
        canary.seen.clear()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, used + MEMORY_LIMIT))
        memory = PeakMemory(torch.device("cpu"))
        for title, kind in kinds.items():
            before, begun = memory.peak(), time.perf_counter()
            rows[title] = fuzz(
                kind, args.inputs, f"{args.seed} {title}", Path(name) / title, canary
            )
            rows[title]["grown"] = round((memory.peak() - before) / 2**20)
            rows[title]["seconds"] = round(time.perf_counter() - begun)
        os.chdir("/")
    print("\n".join(table(rows, args.inputs)))
    for event, count in sorted(canary.seen.items()):
        print(f"event {event}: {count}", file=sys.stderr)
    failed = ("other errors", "slow", "events", "stray files")
    sys.exit(any(counts[name] for counts in rows.values() for name in failed))


if __name__ == "__main__":
    main()
