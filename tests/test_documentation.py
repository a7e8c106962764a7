"""Every documented command and Python block runs, in its shortest form and from a clean folder.

Each command in README.md and CONTRIBUTING.md, in the Markdown files under benchmarks/, docs/ and
experiments/, in the docstrings of the scripts there and in the help of `ncvsd` has a row in
`COMMANDS`: as it is documented, and as it is run here.
To document a command, add its row. Those marked documented take more than ten seconds, and
`pytest -m documented` runs them, about 6 minutes on two idle cores.
"""

import ast
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncvsd_inverse.cli.examples import EXAMPLES

ROOT = Path(__file__).parent.parent
PROGRAMS = {"python", "ncvsd", "pip", "torchrun", "accelerate", "..."}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("benchmarks/**/*.md"),
    *ROOT.glob("experiments/**/*.md"),
]
SITE = [
    path
    for path in ROOT.glob("docs/**/*.md")
    if not {"_build", "gallery", "generated"} & {*path.relative_to(ROOT).parts}
]
"""Pages of the site, whose Python tests/test_docs.py runs."""
SCRIPTS = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/**/*.py")]
SECONDS = 600


@dataclass(frozen=True)
class Short:
    """The short form of a documented command.

    Attributes:
        command: what is run.
        makes: files or folders that are there afterwards, none of which may be there before.
        needs: inputs that are dear to make (`INPUTS`), or documented commands that run before.
        slow: whether it takes more than ten seconds.
        lpips: whether it needs weights of LPIPS that do not ship.
    """

    command: str
    makes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    slow: bool = False
    lpips: bool = False


@dataclass(frozen=True)
class Skipped:
    """Why a documented command is not run."""

    reason: str


INSTALLS = Skipped("it installs packages")
SERVES = Skipped("it serves for ever; tests/cli/test_app.py opens the page in a browser")
RUN = "python benchmarks/run.py"
FIVE = f"{RUN} --task inpaint_box inpaint_random sr4x deblur_gaussian deblur_motion"
ONE = "--images 1 --methods ncvsd pinv --nfe 1"
TRAIN = "ncvsd train faces64 --data pictures.zip -o runs/teacher"
DISTILL = "ncvsd distill faces64 --teacher runs/teacher --data pictures.zip -o runs/student"
JUDGE = "ncvsd evaluate ncvsd_natural --data DIR/natural/test.zip --size 96 -o runs/judged"
FOLDER = Short(
    "ncvsd solve FOLDER --task sr --scale 4 --prior ncvsd_faces64 -o OUT --nfe 1",
    makes=("OUT/a_restored.png", "OUT/b_restored.png"),
)
COMMANDS: dict[str, Short | Skipped] = {
    # docs
    "python -m sphinx docs docs/_build/html": Skipped("tests/test_docs.py runs it"),
    'pip install ".[train]"': INSTALLS,
    'pip install ".[data]"': INSTALLS,
    'pip install ".[app]"': INSTALLS,
    'pip install -e ".[docs]"': INSTALLS,
    "ncvsd convert ffhq_10m.pt converted": Skipped("the file is its authors'"),
    "ncvsd solve face.png --task deblur --blur-std 3 --prior converted": Skipped("as above"),
    "ncvsd solve FOLDER --task sr --scale 4 -o OUT": Skipped("as with --prior ncvsd_faces64"),
    "ncvsd train --show-config faces64": Short("ncvsd train --show-config faces64"),
    "ncvsd evaluate ncvsd_faces64 --data faces64/test.zip --train faces64/train.zip "
    "--teacher-samples 1000": Skipped("it takes an hour"),
    "python benchmarks/report.py results": Skipped("as for benchmarks/results/faces64"),
    # README.md
    "pip install .": INSTALLS,
    'pip install -e ".[test]"': INSTALLS,
    'pip install ".[latents]"': INSTALLS,
    "python -m pytest": Skipped("this test is among those"),
    # CONTRIBUTING.md
    'pip install -c .ci/locked.txt -e ".[test,app,release]"': INSTALLS,
    "python -m pytest tests/operators": Skipped("they run beside this one"),
    "python -m pytest -n auto": Skipped("this test is among those"),
    "python -m pytest -m documented": Skipped("these are"),
    "ncvsd demo": Short("ncvsd demo --nfe 1 --samples 2", makes=("ncvsd_demo/demo.png",)),
    "ncvsd demo --prior ncvsd_natural -o photographs": Short(
        "ncvsd demo --prior ncvsd_natural -o photographs --nfe 1 --samples 1",
        makes=("photographs/demo.png",),
    ),
    "ncvsd priors": Short("ncvsd priors"),
    "ncvsd app": SERVES,
    "ncvsd app --prior ncvsd_faces64 --port 8000": SERVES,
    "ncvsd doctor": Short("ncvsd doctor"),
    "ncvsd doctor -o report.txt": Short("ncvsd doctor -o report.txt", makes=("report.txt",)),
    "ncvsd convert checkpoint.pt mine": Short(
        "ncvsd convert checkpoint.pt mine --no-check --no-statistics",
        makes=("mine.safetensors", "mine.json"),
        needs=("checkpoint.pt",),
    ),
    "ncvsd statistics PRIOR --data val.zip --images 256": Short(
        "ncvsd statistics measured/ncvsd_faces64 --data DIR/faces64/val.zip --images 2"
    ),
    **{
        f"ncvsd solve {words}": Short(
            f"ncvsd solve {words} --nfe 2" + ("" if "-o" in words else f" -o {place}"),
            makes=(made if "-o" in words else f"{place}/{made}",),
        )
        for words, place, made in (
            ("photo.jpg --task denoise", "denoised", "photo_restored.png"),
            ("photo.jpg --task deblur --blur-std 2", "deblurred", "photo_restored.png"),
            ("photo.jpg --task deblur --kernel kernel.png -o sharp.png", "", "sharp.png"),
            ("photo.jpg --task deblur --blind", "found_too", "photo_kernel.png"),
            ("photo.jpg --task sr --scale 2", "enlarged", "photo_restored.png"),
            ("photo.jpg --task inpaint --mask known.png --samples 8", "filled", "photo_std.png"),
            (
                "face.png --simulate --task sr4x --prior ncvsd_faces64 --samples 8",
                "simulated",
                "face_std.png",
            ),
        )
    },
    "ncvsd solve FOLDER --task sr --scale 4 --prior ncvsd_faces64 -o OUT": FOLDER,
    "python experiments/photographs/photographs.py --data DIR/natural/val.zip --out FOLDER": Short(
        "python experiments/photographs/photographs.py --data DIR/natural/val.zip --out shown "
        "--images 1 --every 1 --cases 12",
        makes=("shown/photographs.json",),
    ),
    "python experiments/few_step/point.py --prior NAME --data DIR/natural/val.zip --images 24 "
    "--size 96 --calls 10 --judge --out points.json": Short(
        "python experiments/few_step/point.py --prior ncvsd_natural --data DIR/natural/val.zip "
        "--images 1 --size 64 --calls 2 --judge --out points.json"
    ),
    "python experiments/few_step/point.py --prior ncvsd_natural --data DIR/natural/val.zip "
    "--images 48 --size 96 --families blur --calls 10 --judge --out points.json": Skipped(
        "as with NAME"
    ),
    "python experiments/photographs/noise.py --data DIR --images 20": Short(
        "python experiments/photographs/noise.py --data DIR --images 1 --levels 0.05"
    ),
    "python experiments/few_step/further.py --prior ncvsd_faces64 --data DIR/faces64/val.zip "
    "--train DIR/faces64/train.zip": Short(
        "python experiments/few_step/further.py --prior ncvsd_faces64 --data DIR/faces64/val.zip "
        "--train DIR/faces64/val.zip --images 1 --fit 1 --tasks sr4x --steps 1"
    ),
    "python experiments/few_step/further.py --prior ncvsd_natural --data DIR/natural/val.zip "
    "--train DIR/natural/train.zip --size 128 --images 24": Short(
        "python experiments/few_step/further.py --prior ncvsd_natural --data DIR/natural/val.zip "
        "--train DIR/natural/val.zip --size 64 --images 1 --fit 1 --tasks sr4x --steps 1"
    ),
    "python experiments/blind/blind.py faces --data DIR/faces64/val.zip --out FOLDER": Short(
        "python experiments/blind/blind.py faces --data DIR/faces64/val.zip --out found "
        "--images 1 --calls 2",
        makes=("found/blind.json",),
        slow=True,
        lpips=True,
    ),
    "python experiments/blind/blind.py photographs --data DIR/natural/val.zip --out FOLDER": Short(
        "python experiments/blind/blind.py photographs --data DIR/natural/val.zip --out seen "
        "--images 1 --calls 2",
        makes=("seen/blind.json",),
        slow=True,
        lpips=True,
    ),
    "python experiments/blind/blind.py --out FOLDER --write": Skipped(
        "it writes into the project's notes"
    ),
    "python experiments/blind/oracle.py": Skipped("as with options"),
    "python experiments/blind/oracle.py --trials 30": Short(
        "python experiments/blind/oracle.py --trials 2 --calls 2", slow=True
    ),
    "python experiments/photographs/photographs.py --out FOLDER --write": Skipped(
        "it writes into the project's notes"
    ),
    "ncvsd statistics PRIOR": Short("ncvsd statistics measured/ncvsd_faces64 --images 2"),
    "ncvsd statistics ncvsd_inverse/priors/weights/NAME --data val.zip --images 256": Short(
        "ncvsd statistics measured/ncvsd_faces64 --data DIR/faces64/val.zip --images 2"
    ),
    "ncvsd priors ncvsd_faces64": Short("ncvsd priors ncvsd_faces64"),
    "ncvsd priors NAME": Short("ncvsd priors ncvsd_natural_teacher"),
    "ncvsd convert SRC DST": Short(
        "ncvsd convert checkpoint.pt converted --no-check --no-statistics",
        makes=("converted.safetensors", "converted.json"),
        needs=("checkpoint.pt",),
    ),
    "ncvsd encode pictures.zip latents.zip": Short(
        "ncvsd encode pictures.zip latents.zip --vae vae --size 32 --no-labels --workers 0",
        makes=("latents.zip",),
        needs=("vae",),
    ),
    TRAIN: Short(
        "ncvsd train tiny.toml --data pictures.zip -o runs/teacher",
        makes=("runs/teacher/prior.safetensors",),
    ),
    DISTILL: Short(
        "ncvsd distill tiny.toml --teacher runs/teacher --data pictures.zip -o runs/student",
        makes=("runs/student/prior.safetensors",),
        needs=(TRAIN,),
    ),
    "ncvsd evaluate runs/student/prior --teacher runs/teacher/prior --data held_out.zip "
    "--train pictures.zip -o judged": Short(
        "ncvsd evaluate runs/student/prior --teacher runs/teacher/prior --data held_out.zip "
        "--train pictures.zip -o judged --images 2 --draws 2 --levels 0.5 --samples 8",
        makes=("judged/evaluation.md",),
        needs=(TRAIN, DISTILL),
        lpips=True,
    ),
    "torchrun --nproc_per_node 2 -m ncvsd_inverse.cli train ...": Short(
        "torchrun --nproc_per_node 1 -m ncvsd_inverse.cli train tiny.toml --data pictures.zip "
        "-o runs/spread",
        makes=("runs/spread/prior.safetensors",),
        slow=True,
    ),
    "ncvsd evaluate ncvsd_faces64 --data faces64/test.zip --images 100 --draws 32": Short(
        "ncvsd evaluate ncvsd_faces64 --data faces64/test.zip --images 2 --draws 2 --levels 0.5",
        makes=("ncvsd_evaluation/evaluation.md",),
    ),
    "python experiments/natural/denoising.py --data standard/cbsd68.zip": Short(
        "python experiments/natural/denoising.py --data natural/test.zip"
    ),
    "python experiments/few_step/phase_retrieval.py --data faces64/test.zip": Short(
        "python experiments/few_step/phase_retrieval.py --data faces64/test.zip --images 1 "
        "--nfe 2 --restarts 2"
    ),
    # benchmarks
    f"{RUN} --task sr4x --data faces64/test.zip": Short(
        f"{RUN} --task sr4x --data faces64/test.zip {ONE}", makes=("benchmark/report.html",)
    ),
    f"{RUN} --task sr4x": Short(
        f"{RUN} --task sr4x {ONE} --out shipped_pictures", makes=("shipped_pictures/report.html",)
    ),
    f"{RUN} --task all --nfe 4 10 20 100 --out results": Short(
        f"{RUN} --task all --nfe 1 --out results --images 1 --methods ncvsd",
        makes=("results/report.html",),
        slow=True,
    ),
    "accelerate launch benchmarks/run.py --task all --out results": Short(
        "accelerate launch --cpu --num_processes 1 benchmarks/run.py --task sr4x "
        f"--out results_launched {ONE}",
        makes=("results_launched/report.html",),
        slow=True,
    ),
    f"{FIVE} --nfe 10 --out benchmarks/results/faces64": Short(
        f"{FIVE} --nfe 1 --out benchmarks/results/faces64 --images 1 --methods pinv",
        makes=("benchmarks/results/faces64/report.html",),
        slow=True,
    ),
    "... --task sr4x deblur_gaussian deblur_motion inpaint_random --prior ncvsd_natural "
    "--images 20": Short(
        f"{RUN} --task sr4x deblur_gaussian deblur_motion inpaint_random --prior ncvsd_natural "
        "--images 1 --methods ncvsd --nfe 1 --size 64 --out results_natural",
        makes=("results_natural/report.html",),
        slow=True,
    ),
    "... --images 8 --draws 32 --methods ncvsd --nfe 10": Short(
        f"{RUN} --task sr4x --images 1 --draws 2 --methods ncvsd --nfe 2 --out results_draws",
        makes=("results_draws/report.html",),
    ),
    "python benchmarks/report.py benchmarks/results/faces64": Short(
        "python benchmarks/report.py benchmarks/results/faces64",
        needs=(f"{FIVE} --nfe 10 --out benchmarks/results/faces64",),
        slow=True,
    ),
    "python benchmarks/tune.py --prior ncvsd_faces64": Short(
        "python benchmarks/tune.py --prior ncvsd_faces64 --task sr4x --data DIR/faces64/val.zip "
        "--images 1 --out tuned.json --methods tv --trials 2",
        makes=("tuned.json",),
        lpips=True,
    ),
    f"{RUN} --task sr4x --methods my_methods.py:METHOD ncvsd": Short(
        f"{RUN} --task sr4x --methods my_methods.py:METHOD ncvsd --images 1 --nfe 1 --out plugged",
        makes=("plugged/report.html",),
        needs=("my_methods.py",),
    ),
    "python benchmarks/sanity.py": Short(
        "python benchmarks/sanity.py --methods pinv --size 8 --replicas 4"
    ),
    "python benchmarks/sanity.py [--methods daps ddnm] [--most-calls 1000]": Short(
        "python benchmarks/sanity.py --methods daps ddnm --most-calls 20 --size 8 --replicas 4"
    ),
    "python benchmarks/speed.py": Short("python benchmarks/speed.py --repeats 1", slow=True),
    "python benchmarks/speed.py [--device cuda]": Short(
        "python benchmarks/speed.py --repeats 1 --device cpu", slow=True
    ),
    "python benchmarks/training.py --repeats 7": Short(
        "python benchmarks/training.py --repeats 1 --batch 1 --ways float32", slow=True
    ),
    "python benchmarks/training.py [--preset faces64] [--batch 32] [--repeats 5] "
    "[--out figures.json]": Short(
        "python benchmarks/training.py --preset natural --batch 1 --repeats 1 "
        "--out figures.json --ways bfloat16",
        makes=("figures.json",),
        slow=True,
    ),
    # experiments
    "python experiments/few_step/oracle.py": Short(
        "python experiments/few_step/oracle.py --chains 20 --measurements 2 --truths 4 --out .",
        makes=("oracle.md", "oracle.json"),
        slow=True,
    ),
    "python experiments/few_step/oracle.py --chains 4000": Skipped("it is what runs without it"),
    "python experiments/few_step/phase_retrieval.py --data DIR/faces64/test.zip --images 100": (
        Short(
            "python experiments/few_step/phase_retrieval.py --data DIR/faces64/test.zip "
            "--images 1 --nfe 1 --restarts 1 --from-truth"
        )
    ),
    "python experiments/few_step/phase_retrieval.py --data DIR/faces64/test.zip --images 100 "
    "--temperature ...": Short(
        "python experiments/few_step/phase_retrieval.py --data DIR/faces64/test.zip --images 1 "
        "--temperature 0.1 --nfe 1 --restarts 1"
    ),
    "python experiments/few_step/schedules.py --data DIR/faces64/val.zip --images 16 "
    "--out experiments/few_step/schedules.json": Short(
        "python experiments/few_step/schedules.py --data DIR/faces64/val.zip --images 1 "
        "--out schedules.json --tasks sr4x --calls 1",
        makes=("schedules.json",),
        lpips=True,
    ),
    "python experiments/few_step/point.py --prior ncvsd_faces64 --data DIR/faces64/val.zip "
    "--out experiments/few_step/points.json": Short(
        "python experiments/few_step/point.py --prior ncvsd_faces64 --data DIR/faces64/val.zip "
        "--out points.json --images 1 --calls 1 --trials 2",
        makes=("points.json",),
        lpips=True,
    ),
    "python experiments/few_step/point.py --prior ncvsd_faces64 --write "
    "--out experiments/few_step/points.json": Skipped("it changes the package"),
    "python experiments/few_step/point.py --prior ncvsd_natural --write --tie 1.035 "
    "--families inpainting superres motion_blur other --out experiments/few_step/points.json": (
        Skipped("it changes the package")
    ),
    "python experiments/few_step/point.py --prior ncvsd_natural --write --tie 1 --families blur "
    "--out experiments/few_step/points.json": Skipped("it changes the package"),
    "python benchmarks/report.py benchmarks/results/faces64 --readme README.md": Skipped(
        "it changes README; tests/benchmarks/test_report.py writes another file"
    ),
    "python experiments/statistics/self_measured.py --data DIR/faces64/test.zip --images 16 "
    "--out experiments/statistics/records.jsonl": Short(
        "python experiments/statistics/self_measured.py --data DIR/faces64/test.zip --images 1 "
        "--out faces64.json --tasks sr4x --calls 1 --draws 2 --rows shipped 2",
        makes=("faces64.json",),
        lpips=True,
    ),
    "python experiments/statistics/self_measured.py --prior ncvsd_natural --size 96 --images 12 "
    "--data DIR/natural/test.zip --out experiments/statistics/records.jsonl": Short(
        "python experiments/statistics/self_measured.py --prior ncvsd_natural --size 96 --images 1 "
        "--data DIR/natural/test.zip --out natural.json --tasks sr4x --calls 1 --draws 2 "
        "--rows teacher",
        makes=("natural.json",),
        lpips=True,
    ),
    "python experiments/statistics/self_measured.py --data DIR/faces64/val.zip --images 16 "
    "--draws 2 --rows shipped 4 8 16 32 128 --calls 10 "
    "--out experiments/statistics/records.jsonl": Skipped("as above"),
    "python experiments/statistics/self_measured.py --prior ncvsd_natural --size 256 "
    "--data DIR/natural/val.zip --images 3 --draws 2 --measure-at 256 --rows shipped 2 4 8 16 "
    "--calls 10 --tasks inpaint_random sr4x deblur_gaussian "
    "--out experiments/statistics/records.jsonl": Skipped("as above"),
    "python experiments/published/conversions.py --shapes FOLDER": Short(
        "python experiments/published/conversions.py --shapes SHAPES", needs=("SHAPES",), slow=True
    ),
    "python experiments/large/load_memory.py --millions 550": Short(
        "python experiments/large/load_memory.py --millions 20", slow=True
    ),
    "python experiments/large/tiles.py --data DIR/natural/val.zip --out experiments/large": Short(
        "python experiments/large/tiles.py --data DIR/natural/val.zip --out . --images 1 --nfe 1",
        makes=("tiles.json",),
        slow=True,
    ),
    "python experiments/large/tiles.py --data DIR/natural/val.zip --out experiments/large "
    "--images 1 --nfe 4": Skipped("as above"),
    "python experiments/large/tiles.py --data DIR/natural/val.zip --out DIR --images 1 --nfe 10 "
    "--tiles 256 128": Short(
        "python experiments/large/tiles.py --data DIR/natural/val.zip --out DIR --images 1 "
        "--nfe 1 --tiles 256 128",
        makes=("DIR/tiles.json",),
        slow=True,
    ),
    "python experiments/large/folder.py --data DIR/faces64/test.zip --out experiments/large": Short(
        "python experiments/large/folder.py --data DIR/faces64/test.zip --out . --images 1 "
        "--tasks sr4x inpaint_random",
        makes=("folder.json",),
    ),
    "python experiments/large/folder.py --data DIR/faces64/test.zip --out experiments/large "
    "--images 96": Skipped("as above"),
    "python experiments/natural/denoising.py --data DIR/natural/test.zip": Short(
        "python experiments/natural/denoising.py --data DIR/natural/test.zip"
    ),
    "python experiments/natural/denoising.py --data DIR/natural/val.zip "
    "--prior runs/natural_teacher/prior": Skipped("as above"),
    "python experiments/natural/denoising.py --data DIR/faces64/val.zip "
    "--prior runs/faces_teacher/prior": Skipped("as above"),
    "ncvsd train teacher.toml --data all.zip --out runs/natural_teacher": Skipped("it takes days"),
    "ncvsd distill student.toml --teacher ncvsd_natural_teacher --data all.zip "
    "--out runs/natural_student": Skipped("it takes days"),
    "ncvsd train teacher.toml --data DIR/faces64/train.zip --out runs/faces_teacher": Skipped(
        "it takes days"
    ),
    "python experiments/operators/motion_kernels.py": Short(
        "python experiments/operators/motion_kernels.py --draws 2 --picture kernels.jpg",
        makes=("kernels.jpg",),
    ),
    "python experiments/operators/motion_kernels.py --authors DIR/motionblur": Skipped(
        "the authors' code is theirs"
    ),
    "python experiments/rivals/authors.py daps --code DAPS": Skipped("the authors' code is theirs"),
    "python experiments/rivals/authors.py --table": Short(
        "python experiments/rivals/authors.py --table"
    ),
    "python experiments/rivals/standing.py --data DIR/faces64/val.zip --out standing": Short(
        "python experiments/rivals/standing.py --data DIR/faces64/val.zip --out standing "
        "--images 1 --skip 1 --nfe 4",
        makes=("standing/results/records.jsonl",),
        slow=True,
        lpips=True,
    ),
    "python experiments/rivals/standing.py --out standing --write": Skipped(
        "it writes the tables of a long run"
    ),
    "python experiments/operators/pictures.py --data DIR/faces64/val.zip": Short(
        "python experiments/operators/pictures.py --data DIR/faces64/val.zip --nfe 1"
    ),
    "python experiments/oracle/distillation.py": Short(
        "python experiments/oracle/distillation.py --out . --steps 4",
        makes=("distillation.md", "distillation.json", "distillation.png"),
        slow=True,
    ),
    "python experiments/security/fuzz_unpickle.py --inputs 150000 --seed 0": Short(
        "python experiments/security/fuzz_unpickle.py --inputs 20 --seed 0"
    ),
    "python experiments/security/fuzz_unpickle.py --inputs 100000": Skipped("as above"),
    "python experiments/security/fuzz_files.py --inputs 100000 --seed 0": Short(
        "python experiments/security/fuzz_files.py --inputs 10 --seed 0 --kinds cards "
        "configurations safetensors"
    ),
    "python experiments/security/convert_memory.py --megabytes 600 --layout nvidia": Short(
        "python experiments/security/convert_memory.py --megabytes 100 --layout nvidia", slow=True
    ),
    "python experiments/security/kill.py --kills 50": Short(
        "python experiments/security/kill.py --kills 1 --commands statistics solve"
    ),
    "python experiments/one_gpu/train.py teacher --init ncvsd_faces64_teacher --seconds 85 "
    "--data DIR/faces64/train.zip --val DIR/faces64/val.zip --out faces_teacher.safetensors": Short(
        "python experiments/one_gpu/train.py teacher --init ncvsd_faces64_teacher --seconds 0 "
        "--data DIR/faces64/val.zip --val DIR/faces64/val.zip --out faces_teacher.safetensors "
        "--batch 2 --held-out 2 --no-compile",
        makes=("faces_teacher.safetensors",),
    ),
    "python experiments/one_gpu/train.py student --init ncvsd_faces64 --seconds 185 "
    "--data DIR/faces64/train.zip --val DIR/faces64/val.zip --out faces_student.safetensors": Short(
        "python experiments/one_gpu/train.py student --init ncvsd_faces64 --seconds 0 "
        "--data DIR/faces64/val.zip --val DIR/faces64/val.zip --out faces_student.safetensors "
        "--batch 2 --held-out 2 --no-compile",
        makes=("faces_student.safetensors",),
    ),
    "ncvsd statistics ncvsd_inverse/priors/weights/ncvsd_natural --data DIR/natural/val.zip": Short(
        "ncvsd statistics measured/ncvsd_faces64 --data DIR/faces64/val.zip --images 2"
    ),
    "python experiments/ship.py natural --teacher-run runs/natural/teacher "
    "--run runs/natural/distill --val DIR/natural/val.zip "
    "--out ncvsd_inverse/priors/weights": Short(
        "python experiments/ship.py natural --teacher-run runs/teacher --run runs/student "
        "--val DIR/natural/test.zip --out shipped --images 2",
        makes=("shipped/ncvsd_natural.json", "shipped/ncvsd_natural_teacher.safetensors"),
        needs=(TRAIN, DISTILL),
        slow=True,
    ),
    JUDGE: Short(
        "ncvsd evaluate ncvsd_natural --data DIR/natural/test.zip --size 96 -o runs/judged "
        "--images 2 --draws 2 --levels 0.5",
        makes=("runs/judged/evaluation.json",),
    ),
    "python experiments/ship.py natural --judged runs/judged/evaluation.json "
    "--out ncvsd_inverse/priors/weights": Short(
        "python experiments/ship.py natural --judged runs/judged/evaluation.json "
        "--out ncvsd_inverse/priors/weights",
        needs=(JUDGE,),
    ),
}


def documented_commands(text):
    """Return the commands in Markdown: lines of blocks, and spans of at least three words."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    blocks += ["\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [part.split() for line in lines for part in line.removeprefix("$ ").split("&&")]
    spans = [span.split() for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    found += [words for words in spans if len(words) > 2 or words[0] == "python"]
    return {" ".join(words) for words in found if len(words) > 1 and words[0] in PROGRAMS}


def all_documented_commands():
    texts = [path.read_text() for path in (*PAGES, *SITE)]
    texts += [ast.get_docstring(ast.parse(path.read_text())) or "" for path in SCRIPTS]
    return set().union(*map(documented_commands, texts), *EXAMPLES.values())


def python_blocks():
    for path in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S)):
            yield pytest.param(code, id=f"{path.relative_to(ROOT)}-{number}")


def options(command):
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-_]*", command))


def test_the_table_holds_what_is_documented():
    documented = all_documented_commands()
    without_row = sorted(documented - set(COMMANDS))
    without_page = sorted(set(COMMANDS) - documented)
    assert not without_row, "documented, but no row in COMMANDS"
    assert not without_page, "in COMMANDS, but documented nowhere"


def test_a_short_form_is_the_command_with_other_values_and_more_options():
    for documented, form in COMMANDS.items():
        if isinstance(form, Skipped):
            continue
        if not documented.startswith("..."):
            assert form.command.split()[:2] == documented.split()[:2]
        assert options(documented) <= options(form.command), documented
        assert all(need in COMMANDS or need in INPUTS for need in form.needs), documented


def test_commands_are_found_in_text():
    text = """
See `ncvsd demo` and `python a.py`, or `ncvsd solve IN
--task sr4x`; `--nfe 4` is an option.

    pip install . && ncvsd demo -o x
    python b.py --long \\
        --longer
    no command

```bash
torchrun x.py
```

```python
python = 1
```
"""
    assert documented_commands(text) == {
        "python a.py",
        "ncvsd solve IN --task sr4x",
        "pip install .",
        "ncvsd demo -o x",
        "python b.py --long --longer",
        "torchrun x.py",
    }


TINY = """
images = 8
batch_size = 4
precision = "float32"
warmup_images = 8
any_size = true
[network]
resolution = 64
channels = [16, 16]
blocks = 1
attention = []
"""


def write_pictures(path, *, num, side):
    """Write a zip of photographs, the shipped ones mirrored and brought to a side."""
    assets = ROOT / "ncvsd_inverse" / "assets"
    sources = [*assets.glob("*.png"), *assets.glob("photographs/*.png")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(num):
            with Image.open(sources[number % len(sources)]) as picture:
                shown = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            if number % 8 >= len(sources):
                shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            with archive.open(f"{number}.png", "w") as file:
                shown.save(file, "png")


def write_inputs(folder):
    """Write what the commands read, under the names that the documentation has."""
    for place in (folder, folder / "DIR"):
        for name, num in (("faces64/test.zip", 2), ("faces64/val.zip", 3), ("natural/test.zip", 2)):
            write_pictures(place / name, num=num, side=96 if "natural" in name else 64)
    write_pictures(folder / "DIR" / "natural" / "val.zip", num=4, side=256)
    write_pictures(folder / "pictures.zip", num=8, side=64)
    write_pictures(folder / "held_out.zip", num=4, side=64)
    (folder / "tiny.toml").write_text(TINY)
    assets = folder / "ncvsd_inverse" / "assets"
    face = Image.open(assets / "grace_hopper.png").convert("RGB")
    face.save(folder / "face.png")
    photo = Image.open(assets / "photographs" / "cat.png").convert("RGB")
    photo.save(folder / "photo.jpg")
    known = np.random.default_rng(0).random((photo.height, photo.width)) < 0.3
    Image.fromarray(255 * known.astype(np.uint8)).save(folder / "known.png")
    kernel = np.zeros((9, 9), np.uint8)
    kernel[4, 2:8] = 255
    Image.fromarray(kernel).save(folder / "kernel.png")
    (folder / "FOLDER").mkdir()
    for name in "ab":
        face.resize((16, 16)).save(folder / "FOLDER" / f"{name}.png")
    (folder / "measured").mkdir()
    for path in (folder / "ncvsd_inverse" / "priors" / "weights").glob("ncvsd_faces64.*"):
        shutil.copy(path, folder / "measured")


def write_checkpoint(path):
    from ncvsd_inverse.networks import ControlledDenoiser, UNetShape

    torch.manual_seed(0)
    network = ControlledDenoiser(UNetShape(32, channels=(32, 32)))
    torch.save(network.half().state_dict(), path)


def write_vae(path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(path)


def write_shapes(path):
    """Write the names and shapes of one small published network."""
    with gzip.open(ROOT / "tests" / "data" / "published.json.gz", "rt") as file:
        name, shapes = "edm-cifar10-32x32-cond-vp", json.load(file)
    path.mkdir()
    (path / f"{name}.json").write_text(json.dumps(shapes[name]))


def write_methods(path):
    """Write the example of a method of one's own."""
    page = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    path.write_text(code)


INPUTS = {
    "checkpoint.pt": write_checkpoint,
    "my_methods.py": write_methods,
    "vae": write_vae,
    "SHAPES": write_shapes,
}

SERVER = """
import json, os, runpy, signal, sys, traceback
from pathlib import Path
import deepinv, matplotlib.pyplot, piq, scipy.stats, tensorboard, torch, torchvision
import ncvsd_inverse.cli, ncvsd_inverse.integrations.deepinv, ncvsd_inverse.evaluation.posterior

def run(words):
    sys.argv = words[1:] if words[0] == "python" else words
    try:
        if words[0] == "ncvsd":
            ncvsd_inverse.cli.main()
        else:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    words, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        for number, path in enumerate((os.devnull, "output.txt", "output.txt")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        status = run(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # taking the imported modules down would take a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs a command a line, each in a process of its own, but imports what is heavy once for all."""

LAUNCHERS = {
    "ncvsd": "ncvsd_inverse.cli",
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}


class Place:
    """A copy of the repository, with the inputs of all commands, in which commands run."""

    def __init__(self, folder):
        self.folder = folder
        self.done = set()
        self.server = None
        kept = {"weights"} if "NCVSD_WEIGHTS" in os.environ else set()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("NCVSD_", "XDG_", "HF_", "MPL", "PYTEST"))
            or name.removeprefix("NCVSD_").lower() in kept
        } | {
            "HOME": str(folder / "home"),
            "PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "benchmarks"))),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def execute(self, command, *, fresh):
        """Run a command; fail if it fails or warns. Return what it printed."""
        words = shlex.split(command)
        output = self.folder / "output.txt"
        output.unlink(missing_ok=True)
        if fresh:
            status = self._execute_alone(words, output)
        else:
            if self.server is None:
                self.server = subprocess.Popen(
                    [sys.executable, "-c", SERVER],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            print(json.dumps([words, SECONDS]), file=self.server.stdin, flush=True)
            status = int(self.server.stdout.readline())
        text = output.read_text()
        assert status == 0, f"{command}\n{text}"
        assert "Warning" not in text, f"{command}\n{text}"
        return text

    def _execute_alone(self, words, output):
        program, *rest = words
        start = [sys.executable, *(["-m", LAUNCHERS[program]] if program in LAUNCHERS else [])]
        with output.open("w") as file:
            return subprocess.run(
                [*start, *rest],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            ).returncode

    def run(self, documented):
        """Run the short form of a documented command once, after what it needs."""
        if documented in self.done:
            return
        form = COMMANDS[documented]
        for need in form.needs:
            if need in INPUTS:
                if not (self.folder / need).exists():
                    INPUTS[need](self.folder / need)
            else:
                self.run(need)
        for name in form.makes:
            assert not (self.folder / name).exists(), name
        self.execute(form.command, fresh=form.slow)
        for name in form.makes:
            assert (self.folder / name).exists(), name
        self.done.add(documented)

    def close(self):
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()
            self.server.stdout.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("commands run in forks of one process, which this system does not have")
    folder = tmp_path_factory.mktemp("documented") / "checkout"
    (folder / "home").mkdir(parents=True)
    for name in ("benchmarks", "experiments", "ncvsd_inverse", "operators"):
        if not (ROOT / name).exists():
            continue  # a source distribution has the operators within the package
        unwanted = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unwanted)
    write_inputs(folder)
    place = Place(folder)
    yield place
    place.close()


def rows():
    for documented, form in COMMANDS.items():
        if isinstance(form, Short):
            marks = [pytest.mark.slow, pytest.mark.documented] if form.slow else []
            if form.lpips:
                unset = "NCVSD_WEIGHTS" not in os.environ
                marks.append(pytest.mark.skipif(unset, reason="NCVSD_WEIGHTS is not set"))
            yield pytest.param(documented, id=documented, marks=marks)


@pytest.mark.parametrize("documented", list(rows()))
def test_a_documented_command_runs(place, documented):
    place.run(documented)


@pytest.mark.parametrize("code", list(python_blocks()))
def test_a_python_block_runs(place, code):
    (place.folder / "block.py").write_text(code)
    place.execute("python block.py", fresh=False)
