"""Pages that are made when the site is built: of public names, commands, cards and records."""

import gc
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from typer.models import ArgumentInfo, OptionInfo

from ncvsd_inverse import load_card, load_prior
from ncvsd_inverse.cli import app
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.priors import NCVSDPrior, PriorCard

__all__ = [
    "MODULES",
    "as_restructured_text",
    "public_names",
    "reset_machine",
    "scrape_last_figure",
    "with_colons",
    "write_pages",
]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

MODULES = {
    "ncvsd_inverse": "Top level",
    "ncvsd_inverse.operators": "Operators",
    "ncvsd_inverse.priors": "Priors",
    "ncvsd_inverse.tasks": "Tasks",
    "ncvsd_inverse.metrics": "Metrics",
    "ncvsd_inverse.images": "Pictures",
    "ncvsd_inverse.schedules": "Schedules",
    "ncvsd_inverse.protocols": "Protocols",
    "ncvsd_inverse.sampling": "Sampling",
    "ncvsd_inverse.evaluation": "Evaluation",
    "ncvsd_inverse.training": "Training",
    "ncvsd_inverse.training.data": "Training images",
    "ncvsd_inverse.networks": "Networks",
    "ncvsd_inverse.integrations.deepinv": "deepinv",
}
"""Modules whose public names the reference describes, each with its title."""

SHIPPED = ("ncvsd_faces64", "ncvsd_natural", "ncvsd_faces64_teacher", "ncvsd_natural_teacher")
"""Priors of the zoo."""

SECTIONS = re.compile(
    r"(Args|Attributes|Returns|Yields|Raises|Warns|Source|Sources|Example|Examples|Note):$"
)
"""Headings of docstrings."""

THREADS = torch.get_num_threads()
"""Threads of every example, unless it says otherwise."""

COLON = "\ue000"
"""Stands for a colon while napoleon reads."""


def write_pages(folder: Path) -> None:
    """Write all pages; those that are as they were are left alone, so that builds are quick."""
    folder.mkdir(exist_ok=True)
    for name, title in MODULES.items():
        _write(folder / f"{name}.rst", _describe_module(name, title))
    _write(folder / "commands.inc.md", _describe_commands())
    _write(folder / "zoo.inc.md", "\n\n".join(_describe_prior(name, folder) for name in SHIPPED))
    _write(folder / "results.inc.md", _describe_results())


def _write(path: Path, text: str) -> None:
    text = text.rstrip() + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


# The reference.


def public_names(module: ModuleType) -> list[str]:
    """Return the names in `__all__` that are no modules and are described where they are."""
    names = [name for name in module.__all__ if not name.startswith("__")]
    return [name for name in names if not isinstance(getattr(module, name), ModuleType)]


def _home(module_name: str, name: str) -> str:
    """Return the module of `MODULES` in whose page a name is described in full.

    What the top re-exports from a page of its own is described there, and the top points to it.
    """
    value = getattr(importlib.import_module(module_name), name)
    others = [other for other in MODULES if other != "ncvsd_inverse"]
    for other in [*others, "ncvsd_inverse"]:
        module = importlib.import_module(other)
        if name in module.__all__ and getattr(module, name) is value:
            return other
    return module_name


def _describe_module(name: str, title: str) -> str:
    module = importlib.import_module(name)
    lines = [title, "=" * len(title), "", f".. currentmodule:: {name}", "", f"`{name}`", ""]
    lines += [as_plain_paragraphs(inspect.getdoc(module) or ""), ""]
    here: list[tuple[str, str]] = []
    elsewhere: list[tuple[str, str]] = []
    for entry in public_names(module):
        home = _home(name, entry)
        (here if home == name else elsewhere).append((entry, home))
    if elsewhere:
        lines += ["Also here, described in their own pages:", ""]
        lines += [f"- :py:obj:`{entry} <{home}.{entry}>`" for entry, home in elsewhere] + [""]
    for entry, _ in here:
        value = getattr(module, entry)
        if inspect.isclass(value):
            directive, options = "autoclass", [":members:", ":show-inheritance:"]
            if hasattr(value, "__call__") and "__call__" in vars(value):  # noqa: B004
                options.append(":special-members: __call__")
        elif inspect.isroutine(value):
            directive, options = "autofunction", []
        else:
            directive, options = "autodata", [":no-value:"]
        lines += [f".. {directive}:: {entry}", *(f"   {option}" for option in options), ""]
    return "\n".join(lines)


def as_plain_paragraphs(text: str) -> str:
    """Return a module's docstring as reStructuredText."""
    lines = text.splitlines()
    as_restructured_text(None, "module", "", None, None, lines)
    return "\n".join(lines)


def as_restructured_text(
    app: object, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Turn a docstring of plain text into reStructuredText, in place.

    Our docstrings are plain text: indented blocks are formulas or code, `*` and `|` are
    themselves, single backticks are code. Sections of Google's form stay for napoleon.
    """
    result: list[str] = []
    block: int | None = None  # the indent of the text that a block belongs to
    example = False
    for number, line in enumerate(lines):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if not stripped:
            result.append("")
            example = False
            continue
        if block is not None and indent > block:
            result.append(line)
            continue
        block = None
        if SECTIONS.match(stripped) and indent == 0:
            result.append(line)
            continue
        previous = next((other for other in reversed(lines[:number]) if other.strip()), "")
        gap = number > 0 and not lines[number - 1].strip()
        before = len(previous) - len(previous.lstrip())
        begins_section = SECTIONS.match(previous.strip()) is not None
        if example or stripped.startswith(">>>"):
            # With its output, to the next empty line.
            example = True
            result.append(line)
            continue
        if gap and indent > before and not begins_section:
            block = before
            result += [" " * before + "::", "", line]
            continue
        result.append(_escape(line))
    if what in ("attribute", "data"):
        result = [line.replace(": ", COLON) for line in result]
    lines[:] = result


def with_colons(
    app: object, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Put back the colons that napoleon would have read as the end of an attribute's type."""
    lines[:] = [line.replace(COLON, ": ") for line in lines]


def _escape(line: str) -> str:
    """Escape what reStructuredText would read as markup, outside of backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    for place in range(0, len(parts), 2):
        text = parts[place]
        bullet = re.match(r"\s*[*-] ", text) if place == 0 else None
        start = bullet.group() if bullet else ""
        text = text[len(start) :].replace("\\", "\\\\")
        text = re.sub(r"([*|])", r"\\\1", text)
        text = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", text)
        parts[place] = start + text
    return "".join(parts)


# The command line.


def _describe_commands() -> str:
    parts = []
    for command in app.registered_commands:
        callback = command.callback
        assert callback is not None
        name = command.name or callback.__name__
        text = inspect.getdoc(callback) or ""
        parts += [f"## `ncvsd {name}`", "", text.replace("\b", ""), ""]
        parts += [*_describe_parameters(name, callback), ""]
        if command.epilog:
            parts += ["```text", command.epilog.replace("\b", "").strip(), "```", ""]
    return "\n".join(parts)


def _describe_parameters(name: str, callback: Callable[..., Any]) -> Iterator[str]:
    hints = get_type_hints(callback, include_extras=True)
    arguments, options = [], []
    for parameter in inspect.signature(callback).parameters.values():
        kind, info = hints[parameter.name], None
        if get_args(kind) and hasattr(kind, "__metadata__"):
            info = next(i for i in kind.__metadata__ if isinstance(i, ArgumentInfo | OptionInfo))
            kind = kind.__origin__
        required = parameter.default is inspect.Parameter.empty
        meaning = (info.help if info is not None else "") or ""
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or parameter.name.upper()
            arguments.append((shown, f"`{shown}`", meaning, required, parameter.default))
        else:
            # typer keeps the first flag of an annotation where a default would be.
            given = (info.default, *(info.param_decls or ())) if info is not None else ()
            flags = [flag for flag in given if isinstance(flag, str) and flag.startswith("-")]
            flags = flags or [f"--{parameter.name.replace('_', '-')}"]
            shown = ", ".join(f"`{flag}`" for flag in flags)
            value = _value_name(kind)
            options.append((flags[0] + value, shown + value, meaning, required, parameter.default))
    usage = [f"ncvsd {name}", *(argument[0] for argument in arguments)]
    usage += [option[0] for option in options if option[3]]
    if any(not option[3] for option in options):
        usage.append("[OPTIONS]")
    yield from ("```text", " ".join(usage), "```", "")
    if not arguments and not options:
        return
    yield from ("| | | default |", "| --- | --- | --- |")
    for _, shown, meaning, required, default in (*arguments, *options):
        first = "required" if required else _default(default)
        yield f"| {shown} | {meaning.replace('|', chr(92) + '|')} | {first} |"


def _value_name(kind: object) -> str:
    """Return what stands behind a flag."""
    alternatives = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is not Literal and len(alternatives) == 1:
        kind = alternatives[0]
    if kind is bool:
        return ""
    if get_origin(kind) is Literal:
        return " " + "/".join(map(str, get_args(kind)))
    names = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    return f" {names.get(kind, 'VALUE')}"  # type: ignore[call-overload]


def _default(value: object) -> str:
    if value is None or value is False:
        return "" if value is None else "off"
    return f"`{value}`" if value != float("inf") else ""


# The zoo.


def _describe_prior(name: str, folder: Path) -> str:
    card = load_card(name)
    picture = folder / f"{name}.{card.sha256[:8]}.png"
    if not picture.is_file():
        _draw_pictures(name).savefig(picture, dpi=110)
    weights = ROOT / "ncvsd_inverse" / "priors" / "weights" / f"{name}.safetensors"
    shape = "any size, sides a multiple of 8"
    if card.image_shape is not None:
        shape = " x ".join(map(str, card.image_shape))
    prior = load_prior(name)
    numbers = sum(weight.numel() for weight in prior.network.parameters())
    training: Mapping[str, Any] = card.training or {}
    rows = {
        "kind": "generative denoiser: a draw a call"
        if card.kind == "ncvsd"
        else "teacher: the posterior mean a call",
        "images": shape,
        "weights": f"{numbers / 1e6:.1f} million, {weights.stat().st_size / 1e6:.1f} MB",
        "noise levels": f"{card.sigma_min:g} to {card.sigma_max:g}",
        "trained on": card.data,
        "trained by": f"`{training.get('command', '')}`, {training.get('images_seen', 0):,} "
        f"images, {training.get('hardware', '')}",
        "for": card.intended_use,
        "weaknesses": card.weaknesses,
        "terms": card.licence,
        "SHA-256": f"`{card.sha256}`",
    }
    lines = [
        f"## `{name}`",
        "",
        f"![Images that {name} draws from noise](generated/{picture.name})",
        "",
    ]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value]
    return "\n".join([*lines, "", *_describe_evaluation(card)])


def _describe_evaluation(card: PriorCard) -> Iterator[str]:
    evaluation: Mapping[str, Any] = card.evaluation or {}
    levels: Sequence[Mapping[str, Any]] = evaluation.get("levels", ())
    if not levels:
        return
    yield (
        f"Against its teacher on {evaluation.get('images')} images of `{evaluation.get('data')}`, "
        f"{evaluation.get('draws')} draws each. Perfect draws have ratio 2 and variance 1:"
    )
    yield from (
        "",
        "| sigma | teacher, dB | ratio | variance | CRPS |",
        "| --- | --- | --- | --- | --- |",
    )
    for level in levels:
        parts = level["prior"]
        yield (
            f"| {level['sigma']:g} | {level['teacher_psnr']['value']:.2f} "
            f"| {parts['ratio']['value']:.2f} | {parts['variance']['value']:.2f} "
            f"| {level['crps']['value']:.4f} |"
        )


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")


def _draw_pictures(name: str) -> Any:  # noqa: ANN401  a matplotlib figure
    """Return a figure of images from noise alone."""
    prior = load_prior(name)
    size = (64, 64) if prior.image_shape is None else None
    if isinstance(prior, NCVSDPrior):
        images = prior.generate(6, 4, seed=1, size=size)
    else:
        images = prior.generate(6, seed=1, size=size)
    images = images.clamp(-1, 1)
    return plot_pictures([[images[i : i + 1] for i in range(6)]], [""] * 6)


# The benchmark.


def _describe_results() -> str:
    parts = []
    for path in sorted(RESULTS.glob("*/records.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        priors = sorted({record["prior"] for record in records})
        parts += [f"## {path.parent.name}", ""]
        parts += [f"{len(records)} rows with `{', '.join(priors)}`. {_say_weights(records)}", ""]
        for task in sorted({record["task"] for record in records}):
            rows = [record for record in records if record["task"] == task]
            most = max(record["images"] for record in rows)
            rows = [record for record in rows if record["images"] == most]
            parts += [*_describe_task(task, most, rows), ""]
    return "\n".join(parts)


def _say_weights(records: list[dict[str, Any]]) -> str:
    """Return a warning where rows were measured with weights that are not those that ship."""
    shipped = {load_card(name).weights_digest for name in SHIPPED}
    used = {digest for record in records for digest in record["prior_sha256"].values()}
    if used <= shipped:
        return "All were measured with the weights that ship."
    return (
        "Some were measured with **earlier weights** than those that ship, and some with earlier "
        "versions of the rivals and of motion blur: `benchmarks/results/README.md` says which."
    )


def _describe_task(task: str, images: int, rows: list[dict[str, Any]]) -> Iterator[str]:
    metrics = [
        m
        for m in ("psnr", "psnr-mean", "ssim", "lpips-alex", "crps", "coverage")
        if m in rows[0]["values"]
    ]
    yield from (f"### {task.replace('_', ' ')}, {images} images", "")
    yield "| method | kind | calls | " + " | ".join(metrics) + " | seconds |"
    yield "| --- | --- | ---: | " + " | ".join("---:" for _ in metrics) + " | ---: |"
    for row in sorted(
        rows, key=lambda row: (not row["method"].startswith("ncvsd"), row["title"], row["nfe"])
    ):
        passes = f"{row['forward']:g}"
        if row["backward"]:
            passes += f"+{row['backward']:g}"
        cells = []
        for metric in metrics:
            values = [value for value in row["values"].get(metric, ()) if value is not None]
            digits = 2 if metric.startswith("psnr") else 4
            cells.append(f"{sum(values) / len(values):.{digits}f}" if values else "")
        kind = "draw" if row["samples"] else "point"
        yield f"| {row['title']} | {kind} | {passes} | {' | '.join(cells)} | {row['seconds']:.2g} |"


# The gallery.


def scrape_last_figure(
    block: object, block_vars: Mapping[str, Any], gallery_conf: Mapping[str, Any]
) -> str:
    """Show the figure that a block ends with, as a notebook does: the scraper of sphinx-gallery."""
    from matplotlib.figure import Figure
    from sphinx_gallery.scrapers import figure_rst

    names = block_vars["example_globals"]
    figure = names.get("___")
    if not isinstance(figure, Figure) or getattr(figure, "shown", False):
        return ""
    figure.shown = True  # type: ignore[attr-defined]
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=110)
    text: str = figure_rst([path], gallery_conf["src_dir"])
    return text


def reset_machine(gallery_conf: Mapping[str, Any], fname: str) -> None:
    """Let examples not depend on those before."""
    gc.collect()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
