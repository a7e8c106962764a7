"""Runs over processes, and runs that are killed, give the numbers of one undisturbed process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys

import torch

from ncvsd_inverse.distill import DistillConfig, DistillRun, ImageData, TeacherConfig, TeacherRun
from ncvsd_inverse.networks import UNetShape

kind, folder, teacher_folder, steps, every = sys.argv[1:]
torch.set_num_threads(1)
shape = UNetShape(resolution=8, channels=(16, 16), blocks=1, attention=(), patch=2)
common = dict(network=shape, images=8 * int(steps), batch_size=8, warmup_images=16)
common |= dict(precision="float32", ema_stds=(0.1,))
generator = torch.Generator().manual_seed(0)
data = ImageData(torch.randint(0, 256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8))
teacher = TeacherRun(TeacherConfig(**common), data, teacher_folder)
run = teacher
if kind == "distill":
    config = DistillConfig(**common, adversarial_images=16)
    run = DistillRun(config, data, folder, teacher.averaged("teacher"))
print("processes", run.accelerator.num_processes, flush=True)
run.run(checkpoint_every=int(every), log_every=1)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(SCRIPT)
    return path


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key.startswith("loss")}
        for line in lines
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "distill"])
def test_two_processes_give_the_losses_of_one(tmp_path, script, kind):
    # accelerate's own launcher starts one process a machine on CPUs; torch's starts several.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = [kind, str(folder), str(folder), "20", "100"]
        command = [sys.executable, str(script), *arguments]
        if processes > 1:
            command = [*launch, str(processes), str(script), *arguments]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count(f"processes {processes}\n") == processes
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) == 20
    for alone, together in zip(one, two, strict=True):
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "distill"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, script, kind):
    arguments = [str(tmp_path / "teacher"), "30", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    if kind == "teacher":
        commands = [
            [sys.executable, str(script), kind, "-", str(f), "30", "1"] for f in (whole, killed)
        ]
    else:
        commands = [
            [sys.executable, str(script), kind, str(f), *arguments] for f in (whole, killed)
        ]
    subprocess.run(commands[0], env=environment(), check=True)

    # With a checkpoint at every step, most of the time goes into writing them: kills hit both.
    source = random.Random(0)
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(
            commands[1], env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "processes 1\n"
        time.sleep(source.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills > 0
    subprocess.run(commands[1], env=environment(), check=True)

    expected, got = (load_file(f / "state.safetensors") for f in (whole, killed))
    assert expected.keys() == got.keys()
    assert all(bool((expected[key] == got[key]).all()) for key in expected)
    assert [line["step"] for line in steps(killed)] == list(range(1, 31))
    assert not list(killed.glob(".*.tmp")), "a torn temporary file was left behind"


def steps(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
