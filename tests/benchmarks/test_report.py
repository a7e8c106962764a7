import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import pictures, plots, report, tables
from harness.cli import run_report
from harness.headline import MARKS, headline
from harness.published import ABSENT, PUBLISHED, published_rows, read_references
from harness.records import METRICS, RECORDS, Record, read_records
from ncvsd_inverse.tasks import list_tasks

HOSTILE = '<script>alert("1")</script> & 50%_$x$ | **b**'


def record(method="ncvsd", nfe=10, psnr=24.0, lpips=0.1, images=4, **changes):
    """A row whose metrics spread evenly around the given means."""
    spread = [0.1 * (number - (images - 1) / 2) for number in range(images)]
    values = {
        "psnr": tuple(psnr + each for each in spread),
        "ssim": tuple(0.8 + each / 10 for each in spread),
        "lpips-alex": tuple(lpips + each / 10 for each in spread),
        "lpips-squeeze": tuple(lpips - 0.01 + each / 10 for each in spread),
        "residual": tuple(1 + each for each in spread),
    }
    fields = {
        "key": f"{changes.get('task', 'sr4x')}-{method}-{nfe}-{images}",
        "task": "sr4x",
        "prior": "ncvsd_faces64",
        "prior_sha256": {"student": "aa11", "teacher": "bb22"},
        "method": method,
        "title": "NCVSD (ours)",
        "network": "student",
        "samples": True,
        "reference": "peng2025ncvsd",
        "nfe": nfe,
        "settings": {"weight": 0.25, "steps": 10},
        "tuned": True,
        "data": "test.zip",
        "data_sha256": f"first{images}",
        "size": (16, 16),
        "images": images,
        "draws": 8,
        "sigma_y": 0.05,
        "seed": 0,
        "forward": float(nfe),
        "backward": 0.0,
        "seconds": 0.02 * nfe + 0.001,
        "peak_mib": 512.4,
        "values": values | changes.pop("more", {}),
        "failures": {},
        "environment": {"commit": "abc123", "torch": "2.15", "hardware": "2 cores <fast>"},
    }
    return Record(**fields | changes)


def sampled(coverage, crps, images=4):
    return {"coverage": (coverage,) * images, "crps": (crps,) * images}


@pytest.fixture
def records():
    """Two image sets of super-resolution, and one of box inpainting."""
    dps = {"title": "DPS", "network": "teacher", "reference": "chung2023dps", "tuned": False}
    tv = {"title": "Total variation", "network": "none", "samples": False, "settings": {}}
    tv |= {"reference": "rudin1992tv", "draws": 1, "nfe": 0}
    red = {"title": HOSTILE, "network": "teacher", "samples": False, "draws": 1}
    holes = {name: (None, *row[1:]) for name, row in record("daps", 100, 30.0, 0.01).values.items()}
    return [
        record("tv", psnr=24.5, lpips=0.3, **tv),
        record("ncvsd", 50, 24.2, 0.08, more=sampled(0.85, 0.03)),
        record("ncvsd", 4, 22.1, 0.12, more=sampled(0.7, 0.05)),
        record("reddiff", 100, 24.4, 0.2, **red),
        record("daps", 100, 30.0, 0.01, title="DAPS", network="teacher", values=holes,
               failures={"0": "left the finite numbers at sweep 3 <b>"}),
        record("broken", 20, title="Broken", network="teacher", values={},
               failures={str(number): "out of memory" for number in range(4)}),
        record("ncvsd", 4, 21.5, 0.14, images=2, more=sampled(0.71, 0.05, 2)),
        record("dps", 1000, 23.0, 0.11, images=2, backward=1000.0,
               more=sampled(0.95, 0.04, 2), **dps),
        record("ncvsd", 10, 25.0, 0.06, task="inpaint_box"),
    ]  # fmt: skip


@pytest.fixture
def out(tmp_path):
    """A results folder with pictures of two images; one of them failed."""
    random = np.random.default_rng(0)
    for place in ("truth", "measurement", "ncvsd-4", "ncvsd-50", "tv-0", "dps-1000", "daps-100"):
        for name in ("0", "1"):
            if (place, name) != ("daps-100", "0"):
                side = 4 if place == "measurement" else 16
                file = tmp_path / "pictures" / "sr4x" / place / f"{name}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file)
    return tmp_path


def written(paths, out):
    assert all(path.is_file() for path in paths)
    assert not list(out.rglob("*.part"))
    return sorted(str(path.relative_to(out)) for path in paths)


# Records


WRONG = {
    "key": [None, 3, "a\x00b", "x" * 2000, "\ud800"],
    "task": [None, "../sr4x", "poisson", ["sr4x"]],
    "prior": [[], "\x1b[31m"],
    "prior_sha256": [[], {"student": 3}, {"a\nb": "c"}, None],
    "method": ["../x", "", ".hidden", "a/b", "a b", 1],
    "title": ["a\nb", 1.0, {}],
    "network": ["students", None, 0],
    "samples": [0, 1, "false", None],
    "reference": [None, 2],
    "nfe": [-1, 1.5, True, "10", 10**400, None],
    "settings": [[], {"weight": "1"}, {"weight": None}, {"weight": True}, {"weight": 1e31}],
    "tuned": ["no", 1],
    "data": [None, "a\u009bb"],
    "data_sha256": [1],
    "size": [16, [16], [16, 16, 16], [16, 0], [16, 16.0], "16", [True, 16], None],
    "images": [0, 5, 3, "4", 2**70],
    "draws": [0, None],
    "sigma_y": [-1.0, "0.05", None, 10**400],
    "seed": [-1, 0.0],
    "forward": [-1, "1"],
    "backward": [None, []],
    "seconds": [-0.1, 1e300],
    "peak_mib": ["much"],
    "values": [[], {"psnr": 3}, {"psnr": [1, 2, 3]}, {"psnr": ["a"] * 4}, {"psnr": [True] * 4}],
    "failures": [[], {"0": 3}, {"first": "a"}, {"-1": "a"}, {"9" * 20: "a"}, {"\u0663": "a"}],
    "environment": [None, {"commit": 3}],
    "tuned_calls": [-1, "4", 4.0],
}


@pytest.mark.parametrize("name", WRONG)
def test_every_field_of_a_record_is_typed(name):
    entries = json.loads(record().to_json())
    assert Record.from_json(json.dumps(entries)) == record()
    for value in WRONG[name]:
        with pytest.raises(ValueError, match="must ") as caught:
            Record.from_json(json.dumps({**entries, name: value}))
        assert len(str(caught.value)) < 400
        assert name in str(caught.value)
    del entries[name]
    if name != "tuned_calls":
        with pytest.raises(ValueError, match=f"all its fields, got none of .'{name}'"):
            Record.from_json(json.dumps(entries))


def test_wrong_fields_are_all_fields():
    assert set(WRONG) == set(Record.__dataclass_fields__)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "must be JSON"),
        (b"\xff\xfe{}", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b"1" * 10_000, "must be JSON"),
        (b"[]", "must be an object, got list"),
        (b"{}", "must have all its fields"),
        (b'{"psnr": NaN}', "numbers must be finite, got NaN"),
        (b'{"psnr": -Infinity}', "numbers must be finite, got -Infinity"),
    ],
)
def test_what_is_no_record(line, message):
    with pytest.raises(ValueError, match=message):
        Record.from_json(line)


def test_an_unknown_field_is_named():
    entries = json.loads(record().to_json()) | {"__class__": "os.system"}
    with pytest.raises(ValueError, match=r"a field must be one of .*, got '__class__'"):
        Record.from_json(json.dumps(entries))


def test_damaged_records_are_named_and_skipped(records, tmp_path):
    good = [each.to_json().encode() for each in records]
    (tmp_path / RECORDS).write_bytes(b"\n".join([good[0], b'{"key": 1}', b"\0", *good[1:], b""]))
    with pytest.warns(UserWarning, match="is damaged and left out") as caught:
        found = read_records(tmp_path)
    assert [each.key for each in found] == [each.key for each in records]
    notes = [str(each.message) for each in caught]
    assert len(notes) == 2
    assert "line 2 is damaged and left out: a record must have all its fields" in notes[0]
    assert "line 3 is damaged and left out: a record must be JSON" in notes[1]
    assert not any("\n" in note for note in notes)


@pytest.mark.parametrize("folder", ["faces64", "faces64_draws", "natural"])
def test_the_results_of_this_repository_can_be_read(folder):
    path = Path(__file__).parents[2] / "benchmarks" / "results" / folder
    lines = (path / RECORDS).read_text(encoding="utf-8").splitlines()
    for found, line in zip(read_records(path), lines, strict=True):
        assert json.loads(found.to_json()) == {"tuned_calls": None, **json.loads(line)}


def test_a_file_that_is_no_file_of_records(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / RECORDS)
    assert read_records(tmp_path) == []
    (tmp_path / RECORDS).unlink()
    (tmp_path / RECORDS).write_bytes(b"x" * 101)
    monkeypatch.setattr("harness.records.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="must have at most 100 bytes, got 101"):
        read_records(tmp_path)


# Tables


def test_no_cell_of_a_sheet_is_a_formula():
    text = "=HYPERLINK(1)"
    hostile = record(title=text, data=text, prior="@x", reference="+1", settings={"-a": 1.0})
    (line,) = csv.DictReader(io.StringIO(tables.csv_table([hostile, record()][:1])))
    assert [line[name] for name in ("title", "data")] == [f"'{text}"] * 2
    assert not any(cell.startswith(("=", "@", "+")) for cell in line.values())
    assert line["settings"] == "'-a=1"
    assert next(csv.DictReader(io.StringIO(tables.csv_table([record(psnr=-3.0)]))))["psnr"] == "-3"


def markdown_rows(text, head="| method | kind"):
    """Return the cells of all rows of the tables that begin with `head`, by method and n."""
    rows, names = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith(head):
            names = [re.sub(r" [↑↓→].*", "", cell) for cell in cells]
        elif names and len(cells) == len(names) and not set(cells[0]) <= set("-:"):
            row = dict(zip(names, cells, strict=True))
            rows[row["method"], row["calls"], row.get("n")] = row
        elif not cells:
            names = None
    return rows


def test_every_metric_has_a_column():
    assert {column.name for column in tables.COLUMNS} == {*METRICS, "seconds", "peak_mib"}


def test_tables_hold_every_task(records, tmp_path):
    found = written(tables.write_tables(records, tmp_path), tmp_path)
    assert found == ["references.bib", "tables.csv", "tables.md", "tables.tex"]
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    titles = ["Box inpainting (`inpaint_box`)", "Super-resolution x4 (`sr4x`)", "Notes"]
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == titles
    floats = (tmp_path / "tables.tex").read_text(encoding="utf-8")
    labels = ["inpaint-box", "inpaint-box-published", "sr4x", "sr4x-published"]
    assert re.findall(r"label\{tab:(.*)\}", floats) == labels
    lines = csv.DictReader(io.StringIO((tmp_path / "tables.csv").read_text(encoding="utf-8")))
    assert len(list(lines)) == len(records)


def markdown(records, task):
    return tables.markdown_table(task, tables.split_by_task(records)[task])


def test_markdown_shows_means_errors_and_counts(records):
    rows = markdown_rows(markdown(records, "sr4x"))
    assert len(rows) == 8
    ours = rows["NCVSD (ours)", "4", "4"]
    assert ours["PSNR"] == "22.10 ± 0.06"
    assert (ours["kind"], ours["failures"], ours["coverage"]) == ("sample", "0", "0.700 ± 0.000")
    assert rows["Total variation", "0", "4"]["kind"] == "point"
    assert rows["Total variation", "0", "4"]["coverage"] == ABSENT
    assert rows["DPS", "1000+1000", "2"]["seconds"] == "20.0"
    assert rows["DAPS", "100", "4"]["failures"] == "1"
    assert rows["Broken", "20", "4"]["PSNR"] == ABSENT


def test_best_of_each_image_set_is_bold(records):
    rows = markdown_rows(markdown(records, "sr4x"))
    bold = {
        name: {(key[0], key[1], key[2]) for key, row in rows.items() if row[name].startswith("**")}
        for name in ("PSNR", "LPIPS-alex", "coverage", "CRPS", "residual")
    }
    ours, small = ("NCVSD (ours)", "50", "4"), ("NCVSD (ours)", "4", "2")
    dps = ("DPS", "1000+1000", "2")
    # DAPS has the best means, over three images: it takes no part.
    assert bold["PSNR"] == {("Total variation", "0", "4"), dps}
    assert bold["LPIPS-alex"] == {ours, dps}
    assert bold["coverage"] == {ours, dps}
    assert bold["CRPS"] == {ours, dps}
    assert small in bold["residual"]
    assert len(bold["residual"]) == 6


def test_residual_is_best_at_one_and_there_is_no_best_of_one():
    residual = next(column for column in tables.COLUMNS if column.name == "residual")
    low, high, near = (
        record(name, more={"residual": (value,) * 4})
        for name, value in (("low", 0.2), ("high", 1.5), ("near", 1.1))
    )
    assert tables.best_rows([low, high, near], residual) == {near.key}
    assert tables.best_rows([low], residual) == frozenset()


def test_tie_as_shown_is_a_tie():
    psnr = tables.COLUMNS[0]
    first, second, third = (
        record("a", psnr=20.001),
        record("b", psnr=20.004),
        record("c", psnr=20.006),
    )
    assert tables.best_rows([first, second], psnr) == {first.key, second.key}
    assert tables.best_rows([first, second, third], psnr) == {third.key}


def test_rows_that_are_not_clearly_behind_the_best_are_bold_too():
    psnr = tables.COLUMNS[0]
    best = record("best", more={"psnr": (20.0, 22.0, 24.0, 26.0)})
    near = record("near", more={"psnr": (21.0, 20.0, 25.0, 25.0)})
    behind = record("behind", more={"psnr": (19.8, 21.7, 23.8, 25.7)})
    assert tables.best_rows([best, near, behind], psnr) == {best.key, near.key}
    gap = behind.difference(best, "psnr")
    assert gap.mean == pytest.approx(-0.25)
    # Student's t with three degrees of freedom: 3.182 standard errors.
    assert gap.margin == pytest.approx(3.182 * 0.0577 / 2, rel=1e-3)
    assert gap.is_clear
    assert not near.difference(best, "psnr").is_clear
    alone = record("alone", images=1, more={"psnr": (30.0,)})
    assert alone.difference(best, "psnr") is None
    memory = next(column for column in tables.COLUMNS if column.name == "peak_mib")
    assert tables.best_rows([best, near], memory) == frozenset()


def test_differences_are_to_our_point_of_ten_calls():
    values = (20.0, 22.0, 24.0, 26.0)
    ours = record("ncvsd-point", nfe=10, more={"psnr": values})
    few = record("ncvsd-point", nfe=4, more={"psnr": tuple(v - 2 for v in values)})
    worse = record("dps", nfe=100, title="DPS", more={"psnr": (18.9, 21.1, 22.9, 25.1)})
    level = record("daps", nfe=100, title="DAPS", more={"psnr": (21.0, 21.0, 25.0, 25.0)})
    lines = tables.difference_table([ours, few, worse, level])
    assert "10 calls" in lines[0]
    assert any(line.startswith("| DPS | 100 | **-1.00 ± 0.18** |") for line in lines)
    assert any(line.startswith("| DAPS | 100 | +0.00 ± 1.84 |") for line in lines)
    assert tables.difference_table([worse, level]) == []


def test_the_headline_holds_ours_beside_the_best_other():
    def row(method, nfe, psnr, lpips, **changes):
        steps = (-1.0, 1.0, -0.5, 0.5)
        values = {"psnr": tuple(psnr + step for step in steps)}
        for net in ("alex", "vgg"):
            values[f"lpips-{net}"] = tuple(lpips + step / 100 for step in steps)
        return record(method, nfe, more=values, **changes)

    other = {"network": "teacher"}
    level = row("near", 10, 0.0, 0.2, title="Near", **other)
    crossed = tuple(30.0 + step for step in (1.0, -1.0, 0.5, -0.5))
    level = replace(level, values={**level.values, "psnr": crossed})
    rows = [
        row("ncvsd-point", 10, 30.0, 0.1),
        row("ncvsd", 10, 28.0, 0.12),
        level,
        row("far", 10, 40.0, 0.3, title="Far", **other),
        row("far", 20, 31.0, 0.05, title="Far", **other),
        row("ncvsd-point", 10, 31.0, 0.2, images=2),
        row("teacher-gaussian", 10, 31.0, 0.2, **other),
    ]
    assert headline(rows).splitlines() == [
        "| task | ours, 10 calls | a draw of ours | best other, 10 calls | best other, 20 calls |",
        "|---|---|---|---|---|",
        "| Super-resolution x4 | 30.00 / 0.1000 / 0.1000 | 28.00 / 0.1200 / 0.1200 | "
        "30.00 / 0.2000 / 0.2000 Near | 31.00 / 0.0500 / 0.0500 Far |",
        "",
        "Against the best other of 10 calls, by 95% intervals, ours is "
        "by PSNR ahead in 0, level in 1 and behind in 0; "
        "by lpips-alex ahead in 1, level in 0 and behind in 0; "
        "by lpips-vgg ahead in 1, level in 0 and behind in 0.",
        "",
        "Against the best other of 20 calls, by 95% intervals, ours is "
        "by PSNR ahead in 0, level in 0 and behind in 1; "
        "by lpips-alex ahead in 0, level in 0 and behind in 1; "
        "by lpips-vgg ahead in 0, level in 0 and behind in 1.",
        "",
        "Those of 10 calls are single draws in 1 of 1 tasks; beside them a draw of ours is "
        "by PSNR ahead in 0, level in 1 and behind in 0; "
        "by lpips-alex ahead in 1, level in 0 and behind in 0; "
        "by lpips-vgg ahead in 1, level in 0 and behind in 0.",
        "",
        "Against our own loop with the undistilled teacher it is "
        "by PSNR ahead in 0, level in 0 and behind in 1; "
        "by lpips-alex ahead in 1, level in 0 and behind in 0; "
        "by lpips-vgg ahead in 1, level in 0 and behind in 0.",
    ]
    with pytest.raises(ValueError, match="records must have ncvsd-point at 10 calls"):
        headline(rows[1:])


def test_report_writes_the_headline_into_a_file(tmp_path, capsys):
    other = {"network": "teacher", "title": "Other"}
    vgg = {"lpips-vgg": (0.1, 0.2, 0.1, 0.2)}
    values = record().values
    rows = [
        record("ncvsd-point", 10, more={**values, **vgg}),
        record("other", 10, more={**values, **vgg}, **other),
    ]
    (tmp_path / RECORDS).write_text("".join(row.to_json() + "\n" for row in rows))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{MARKS[0]}\n\nold\n\n{MARKS[1]}\n\nafter\n")
    assert run_report([str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n\n{MARKS[0]}\n")
    assert text.endswith(f"{MARKS[1]}\n\nafter\n")
    assert headline(rows) in text
    assert "old" not in text
    capsys.readouterr()
    assert run_report([str(tmp_path), "--readme", str(tmp_path / "none.md")]) == 2
    assert "none.md" in capsys.readouterr().err


def test_the_readme_says_what_the_records_say():
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text(encoding="utf-8")
    shown = text.split(MARKS[0])[1].split(MARKS[1])[0].strip()
    assert shown == headline(read_records(root / "benchmarks" / "results" / "faces64"))


def test_markdown_escapes_titles(records):
    text = markdown(records, "sr4x")
    assert "<script" not in text
    assert r"&lt;script>alert(" in text
    assert r"50%\_$x$ \| \*\*b\*\*" in text


def test_published_rows_stand_apart(records):
    ours, published = markdown(records, "sr4x").split("### Published, not comparable")
    assert "27.93" not in ours
    assert "LPIPS of VGG" in published
    row = markdown_rows(published, "| method | calls")["PnP-GD (NCVSD)", "50", None]
    assert (row["LPIPS-VGG"], row["PSNR"], row["SSIM"]) == ("0.151", "27.93", "0.805")
    assert row["cite"] == "`peng2025ncvsd`"
    assert "29.07" not in markdown(records, "inpaint_box")
    none = replace(records[-1], task="inpaint_random")
    assert "Published" not in markdown([none], "inpaint_random")


def test_csv_has_a_line_a_record(records):
    lines = list(csv.DictReader(io.StringIO(tables.csv_table(records))))
    assert len(lines) == len(records)
    by_key = {line["key"]: line for line in lines}
    for each in records:
        line = by_key[each.key]
        assert line["title"] == each.title
        assert float(line["forward"]) == each.forward
        assert (int(line["images"]), int(line["failures"])) == (each.images, len(each.failures))
        for metric in METRICS:
            mean, error = each.mean(metric), each.error(metric)
            assert line[metric] == ("" if mean is None else f"{mean:.6g}")
            assert line[f"{metric}-error"] == ("" if error is None else f"{error:.6g}")
    assert by_key["sr4x-ncvsd-4-4"]["settings"] == "steps=10; weight=0.25"
    assert by_key["sr4x-daps-100-4"]["failed"] == "0: left the finite numbers at sweep 3 <b>"


def test_unknown_task_is_named(records, tmp_path):
    wrong = [*records, replace(records[0], task="../sr4x")]
    for write in (
        tables.write_tables,
        plots.write_plots,
        pictures.write_grids,
        report.write_report,
    ):
        with pytest.raises(ValueError, match=r"task must be one of .*, got '\.\./sr4x'"):
            write(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_latex_escapes_and_cites(records):
    text = tables.latex_table("sr4x", tables.split_by_task(records)["sr4x"])
    assert r"\textless{}script\textgreater{}" in text
    assert r"\& 50\%\_\$x\$ \textbar{} **b**" in text
    assert r"DPS~\cite{chung2023dps}" in text
    assert r"\textbf{24.50}" in text
    assert tables.latex("Π→Σ ± 漢") == r"$\Pi$$\rightarrow$$\Sigma$ $\pm$ ?"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_with_booktabs_alone(records, tmp_path):
    tables.write_tables(records, tmp_path)
    head = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (tmp_path / "paper.tex").write_text(rf"{head}\input{{tables}}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# References


def test_every_named_work_is_in_the_references():
    from baselines.registry import METHODS

    known = read_references()
    named = {row.reference for row in PUBLISHED}
    named |= {row.measured_by for row in PUBLISHED if row.measured_by}
    named |= set(report.CITE_FIRST)
    named |= {method.reference for method in METHODS.values()}
    for column in tables.COLUMNS:
        named |= set(re.findall(r"\b[a-z]+\d{4}\w*", column.meaning))
    assert {"wang2004ssim", "zhang2018lpips", "chung2023dps"} <= named
    assert named <= set(known)


def test_references_are_complete():
    known = read_references()
    assert len(known) >= 20
    for key, work in known.items():
        assert {"author", "title"} <= set(work.fields), key
        year = work.fields.get("year", "")
        assert re.fullmatch(r"(19|20)\d\d", year) or key == "ncvsd_inverse", key
        assert year in key, key
        assert re.fullmatch(r"(\d{4}\.\d{4,5})?", work.fields.get("eprint", "")), key
        for name in work.fields["author"].split(" and "):
            assert name.startswith("{") or re.fullmatch(r"[^,]+, [^,]+", name), name
        assert work.plain().count("{") == 0
    assert known["song2023pigdm"].plain() == (
        "Jiaming Song, Arash Vahdat, Morteza Mardani, Jan Kautz. Pseudoinverse-Guided Diffusion "
        "Models for Inverse Problems. International Conference on Learning Representations, 2023."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@misc{a,\n title = {x},\n}\n@misc{a,\n title = {y},\n}\n", "each key once, got a again"),
        ("@misc{a,\n title = {x\n}\n", "a must close its braces"),
        ("@misc{a,\n title = x\n}\n", "a must hold fields"),
        ("@misc{a,\n title = {x},\n title = {y}\n}\n", "a must hold fields"),
    ],
)
def test_damaged_references_are_refused(tmp_path, text, message):
    path = tmp_path / "a.bib"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_references(path)


def test_published_scores_are_plausible():
    for task in list_tasks():
        rows = published_rows(task)
        assert len(rows) == {"inpaint_random": 0, "phase_retrieval": 4, "inpaint_box": 7}.get(
            task, 8
        )
        for _, (lpips, psnr, ssim) in rows:
            assert lpips is None or 0.1 < lpips < 0.5
            assert psnr is None or 15 < psnr < 35
            assert ssim is None or 0.4 < ssim < 0.9


# Plots


def test_pareto_front():
    points = [
        plots.Point("a", calls, value, None)
        for calls, value in ((0, 20.0), (4, 19.0), (10, 25.0), (10, 24.0), (50, 25.0), (99, 26.0))
    ]
    best = [(point.calls, point.value) for point in plots.pareto_front(points, "higher")]
    assert best == [(0, 20.0), (10, 25.0), (99, 26.0)]
    least = [(point.calls, point.value) for point in plots.pareto_front(points, "lower")]
    assert least == [(0, 20.0), (4, 19.0)]


def test_panels_hold_the_points(records):
    figure = plots.draw_tasks(records)["sr4x"]
    assert len(figure.axes) == 4
    large, small = figure.axes[0], figure.axes[2]
    assert large.get_xscale() == "log"
    drawn = {tuple(np.asarray(line.get_xdata(), float)) for line in large.get_lines()}
    assert (4.0, 50.0) in drawn
    level = [
        line for line in large.get_lines() if list(line.get_ydata()) == [pytest.approx(0.3)] * 2
    ]
    assert len(level) == 1
    assert (2000.0,) in {tuple(line.get_xdata()) for line in small.get_lines()}
    assert large.get_xticklabels()[0].get_text() == "0"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[0] == "NCVSD (ours)"
    assert names[-1] == "Pareto front"


def test_no_two_methods_look_alike(records):
    many = [
        record(f"m{number}", title=f"m{number}", network="teacher" if number < 11 else "none")
        for number in range(16)
    ]
    styles = plots._choose_styles(many).values()
    assert len({(style.colour, style.marker) for style in styles}) == 16
    assert len({style.colour for style in styles}) == 16


def test_plots_are_written(records, out):
    none = record("ncvsd", task="deblur_motion", values={})
    paths = plots.write_plots([*records, none], out)
    names = [f"plots/{task}.{kind}" for task in ("inpaint_box", "sr4x") for kind in ("pdf", "png")]
    assert written(paths, out) == names
    with Image.open(out / "plots/sr4x.png") as picture:
        assert picture.width == 1500


def test_titles_are_no_mathematics(records, out):
    hostile = [replace(each, title=r"_$\frac$ \$", data="$$.zip") for each in records]
    assert written(plots.write_plots(hostile, out), out)
    assert written(pictures.write_grids(hostile, out), out)


# Picture grids


def test_grid_has_a_column_a_method_and_a_row_an_image(records, out):
    assert written(pictures.write_grids(records, out), out) == ["grids/sr4x.png"]
    with Image.open(out / "grids/sr4x.png") as picture:
        grid = np.asarray(picture.convert("RGB"))
    step = pictures.CELL + pictures.GAP
    # Truth, measurement, ours with 4 and 50 calls, DAPS, DPS and total variation.
    # Old matplotlib rounds the width of the figure down.
    assert grid.shape[1] in (7 * step - pictures.GAP - 1, 7 * step - pictures.GAP)
    assert len(pictures._columns(pictures.find_pictures(records, out)[0])) == 7
    top = grid.shape[0] - 2 * step
    folder = out / "pictures/sr4x"
    for column, place in ((0, "truth"), (3, "ncvsd-50"), (6, "tv-0")):
        for row in range(2):
            pixels = np.asarray(Image.open(folder / place / f"{row}.png"))
            seen = grid[top + row * step + 4 :: 8, column * step + 4 :: 8][:16, :16]
            assert (seen == pixels).all()


def test_pictures_of_one_method_are_listed_once(records, out):
    (shown,) = pictures.find_pictures(records, out)
    assert [
        (each.record.method, each.record.nfe, each.record.images) for each in shown.estimates
    ] == [
        ("ncvsd", 4, 4),
        ("ncvsd", 50, 4),
        ("daps", 100, 4),
        ("dps", 1000, 2),
        ("tv", 0, 4),
    ]
    assert shown.estimates[2].files[0] is None


def test_damaged_picture_is_named(records, out):
    (out / "pictures/sr4x/ncvsd-4/1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png must be a readable picture"):
        pictures.write_grids(records, out)
    assert not (out / "grids").exists()


# Report


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and whether they are closed."""

    VOID = {"meta", "img", "input", "br", "link", "hr"}  # noqa: RUF012

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in {*self.open}:
            self.texts[tag] = self.texts.get(tag, "") + data


def test_only_small_png_files_are_opened(out, monkeypatch):
    path = out / "0.png"
    for kind in ("EPS", "PPM", "GIF"):
        Image.new("RGB", (4, 4)).save(path, kind)
        with pytest.raises(ValueError, match=r"0\.png must be a readable picture"):
            pictures.open_picture(path)
    Image.new("RGB", (4, 4)).save(path)
    assert pictures.open_picture(path).size == (4, 4)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 15)
    with pytest.raises(ValueError, match="it has more than 15 pixels"):
        pictures.open_picture(path)


@pytest.fixture
def no_plots(monkeypatch):
    """A report without plots, which take most of its time."""
    monkeypatch.setattr(report, "svg_plots", lambda records: {})


def read_report(records, out):
    assert written(report.write_report(records, out), out) == ["report.html"]
    text = (out / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def viewer_data(text):
    return json.loads(re.search(r'id="pictures">(.*?)</script>', text, re.DOTALL)[1])


def test_report_loads_nothing_from_elsewhere(records, out):
    text, page = read_report(records, out)
    assert len(text.encode()) <= report.MAX_BYTES
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "data", "poster", "action", "background", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        if "href" in attributes:
            assert attributes["href"].startswith("#")
        assert tag not in ("link", "iframe", "object", "embed", "base")
    for source in (page.texts["style"], *(each.get("style") or "" for _, each in page.elements)):
        assert "url(" not in source
        assert "@import" not in source
    for word in ("fetch(", "XMLHttpRequest", "import(", "http"):
        assert word not in re.sub(r"data:[^\"]*", "", page.texts["script"])
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {each["href"][1:] for tag, each in page.elements if tag == "a"} <= targets


def test_report_escapes_what_records_say(records, out):
    hostile = [
        replace(
            each,
            title=HOSTILE,
            data=HOSTILE,
            prior=HOSTILE,
            key=f"{each.key}{HOSTILE}",
            settings={HOSTILE: 1.0},
            failures={HOSTILE: HOSTILE},
            environment={HOSTILE: HOSTILE},
            prior_sha256={HOSTILE: HOSTILE},
        )
        for each in records
    ]
    text, page = read_report(hostile, out)
    assert "<script>alert" not in text
    assert [tag for tag, _ in page.elements].count("script") == 2
    titles = [column["title"] for column in viewer_data(text)[0]["columns"]]
    assert f"{HOSTILE}, 50 calls" in titles


def test_report_runs_its_own_script_alone(records, out, no_plots):
    text, page = read_report(records, out)
    policies = [each for tag, each in page.elements if each.get("http-equiv")]
    assert [each["http-equiv"] for each in policies] == ["Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policies[0]["content"].split("; "))
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert not any(name.startswith("on") for _, each in page.elements for name in each)


def test_report_says_what_was_run(records, out):
    dated = [
        replace(each, environment={**each.environment, "date": f"2026-01-0{number + 1}"})
        for number, each in enumerate(records)
    ]
    text, page = read_report(dated, out)
    assert "2026-01-01 to 2026-01-09 (9 different)" in page.texts["dd"]
    for fact in ("abc123", "2.15", "2 cores <fast>", "first2", "aa11", "bb22", "seed 0"):
        assert fact in page.texts["dd"]
    assert "left the finite numbers at sweep 3 <b>" in page.texts["td"]
    assert "steps=10; weight=0.25" in page.texts["td"]
    assert "Not comparable" in text
    assert "@inproceedings{peng2025ncvsd," in page.texts["pre"]
    assert "@article{rudin1992tv," in page.texts["pre"]
    assert page.texts["h2"].count("Super-resolution x4") == 1
    assert sum(tag == "img" and each["class"] == "plot" for tag, each in page.elements) == 2


def test_report_tables_sort_by_the_numbers(records, out, no_plots):
    _, page = read_report(records, out)
    cells = [
        each["data-value"] for tag, each in page.elements if tag == "td" and "data-value" in each
    ]
    assert "2000.0" in cells
    assert str(records[1].mean("psnr")) in cells
    assert "" in cells


def test_report_shows_the_pictures(records, out, no_plots):
    text, _ = read_report(records, out)
    (task,) = viewer_data(text)
    assert task["names"] == ["0", "1"]
    columns = {column["title"]: column for column in task["columns"]}
    assert list(columns)[:3] == ["truth", "measurement", "NCVSD (ours), 4 calls"]
    assert columns["DAPS, 100 calls"]["images"][0] is None
    assert columns["NCVSD (ours), 50 calls"]["notes"][1] == "PSNR 24.15, LPIPS-alex 0.075"
    assert columns["NCVSD (ours), 50 calls"]["chosen"]
    assert not columns["NCVSD (ours), 4 calls"]["chosen"]
    code = columns["truth"]["images"][1].removeprefix("data:image/webp;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
    assert (pixels == np.asarray(Image.open(out / "pictures/sr4x/truth/1.png"))).all()


def test_report_stays_small(records, out, no_plots, monkeypatch):
    text, _ = read_report(records, out)
    pictures_size = len(re.search(r'id="pictures">(.*?)</script>', text, re.DOTALL)[1])
    bare = len(text.encode()) - pictures_size
    monkeypatch.setattr(report, "MAX_BYTES", bare + pictures_size - 100)
    coarse, _ = read_report(records, out)
    assert "Pictures are WebP of quality 90." in coarse
    assert len(viewer_data(coarse)[0]["names"]) == 2
    monkeypatch.setattr(report, "MAX_BYTES", bare + pictures_size // 5)
    few, _ = read_report(records, out)
    assert "Left out" in few
    assert viewer_data(few)[0]["names"] == ["0"]
    monkeypatch.setattr(report, "MAX_BYTES", bare + 100)
    none, _ = read_report(records, out)
    assert "All pictures were left out" in none
    assert viewer_data(none) == []
    monkeypatch.setattr(report, "MAX_BYTES", 1000)
    (out / "report.html").unlink()
    with pytest.raises(ValueError, match=r"report\.html must have at most 1000 bytes"):
        report.write_report(records, out)
    assert not (out / "report.html").exists()


def test_report_without_pictures(records, tmp_path, no_plots):
    text, _ = read_report(records, tmp_path)
    assert "This run left no pictures." in text


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

PROBE = """
<script>
const said = [];
try {
  const table = document.querySelectorAll("table.sortable")[1];
  const order = () => [...table.tBodies[0].rows].slice(1).map(row => row.cells[2].dataset.value);
  table.tHead.rows[0].cells[2].querySelector("button").click();
  said.push(order().join(" "));
  table.tHead.rows[0].cells[2].querySelector("button").click();
  said.push(order().join(" "));
  const psnr = () => [...table.tBodies[0].rows].slice(1).map(row => row.cells[4].dataset.value);
  table.tHead.rows[0].cells[4].querySelector("button").click();
  said.push(psnr().at(-1) === "" ? "missing last" : psnr().join(" "));
  const count = () => document.querySelectorAll("#panels figure").length;
  said.push(count());
  document.querySelector("#methods input").click();
  said.push(count());
  const left = document.querySelector("#lens img").src;
  document.getElementById("image").value = 1;
  document.getElementById("image").dispatchEvent(new Event("change"));
  said.push(document.querySelector("#lens img").src !== left);
  const split = document.getElementById("split");
  split.value = 25;
  split.dispatchEvent(new Event("input"));
  said.push(document.querySelectorAll("#lens img")[1].style.clipPath);
} catch (error) { said.push(error); }
document.title = said.join(";");
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_report_works_in_a_browser(records, out, no_plots):
    text, _ = read_report(records, out)
    digest = base64.b64encode(hashlib.sha256(PROBE[9:-10].encode()).digest()).decode()
    text = text.replace("script-src '", f"script-src 'sha256-{digest}' '")
    (out / "probed.html").write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={out / 'profile'}", (out / "probed.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = re.search(r"<title>(.*?)</title>", done.stdout)[1].split(";")
    assert said[0] == "0.0 4.0 20.0 50.0 100.0 100.0"
    assert said[1] == "100.0 100.0 50.0 20.0 4.0 0.0"
    assert said[2] == "missing last"
    assert said[3:6] == ["6", "7", "true"]
    assert said[6].endswith("25%)")
