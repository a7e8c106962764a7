"""Runs over processes, sharded or not, and killed runs give the numbers of one whole run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ncvsd_inverse.networks import Denoiser, UNetShape
from ncvsd_inverse.numerics import local_part
from ncvsd_inverse.training import DistillationTrainer, DistillConfig, ImageData
from ncvsd_inverse.training import TeacherConfig, TeacherTrainer

folder, kinds, steps, every, shard = sys.argv[1:]
torch.set_num_threads(1)
shape = UNetShape(resolution=8, channels=(16, 16), blocks=1, attention=(), patch=2)
common = dict(network=shape, images=8 * int(steps), batch_size=8, warmup_images=16)
common |= dict(precision="float32", ema_stds=(0.1,))
generator = torch.Generator().manual_seed(0)
data = ImageData(torch.randint(0, 256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8))
for kind in kinds.split(","):
    place = Path(folder, kind)
    # Networks that differ between processes: the first one's is trained.
    torch.manual_seed(int(os.environ.get("RANK", "0")) if kind == "teacher" else 0)
    network = Denoiser(shape)
    if kind == "teacher":
        config = TeacherConfig(**common)
        run = TeacherTrainer(config, data, place, network=network, shard=shard == "shard")
    else:
        config = DistillConfig(**common, adversarial_images=16, energy_weight=0.5, kind=kind)
        run = DistillationTrainer(config, data, place, network, shard=shard == "shard")
    if run.accelerator.is_main_process:
        print("processes", run.accelerator.num_processes, flush=True)
    run.run(checkpoint_every=int(every), log_every=1)

    weights = [p for m in run.modules.values() for p in m.parameters() if p.ndim > 1]
    states = [v for o in run.optimizers.values() for s in o.state.values() for v in s.values()]
    held = sum(local_part(w).numel() for w in weights)
    moments = sum(local_part(v).numel() for v in states if v.ndim > 1)
    if run.accelerator.is_main_process:
        print("share", held / sum(w.numel() for w in weights), moments / 2 / held, flush=True)
        average = run.averaged(next(iter(run.averages))).state_dict()
        save_file({k: v.contiguous() for k, v in average.items()}, place / "average.safetensors")
run.accelerator.wait_for_everyone()
run.accelerator.end_training()
"""

KINDS = ("teacher", "concat", "controlled")


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def losses(folder):
    return [
        {key: value for key, value in line.items() if key.startswith("loss")}
        for line in lines_of_steps(folder)
    ]


def launch(script, processes, folder, steps, *, shard="-", **variables):
    """Run the script, over processes if more than one; return, for each kind, what was held.

    That is the share of the weights that the main process held, and its moments over its weights.
    """
    command = [sys.executable]
    if processes > 1:
        # accelerate's own launcher starts one process a machine on CPUs; torch's starts several.
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(processes)]
    command += [str(script), str(folder), ",".join(KINDS), str(steps), "100", shard]
    done = subprocess.run(command, env=environment() | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"processes {processes}\n") == len(KINDS)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("share")]
    return [(float(weights), float(moments)) for _, weights, moments in lines]


def assert_same_losses(folder, reference):
    lines, expected = losses(folder), losses(reference)
    assert len(lines) == len(expected) == 20
    for line, alone in zip(lines, expected, strict=True):
        assert line == pytest.approx(alone, rel=1e-4)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory, script):
    """Return the folder of the runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert launch(script, 1, folder, 20) == [(1, 1)] * len(KINDS)
    return folder


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path, script, one):
    assert launch(script, 2, tmp_path, 20) == [(1, 1)] * len(KINDS)
    for kind in KINDS:
        assert_same_losses(tmp_path / kind, one / kind)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 keeps no parameters whole")
def test_shards_give_the_losses_of_one_process(tmp_path, script, one):
    # Sharded, resumed whole in one process, and sharded again, by the flag accelerate sets.
    sharded = launch(script, 2, tmp_path, 8, shard="shard")
    assert launch(script, 1, tmp_path, 14) == [(1, 1)] * len(KINDS)
    sharded += launch(script, 2, tmp_path, 20, ACCELERATE_USE_FSDP="true")
    assert len(sharded) == 2 * len(KINDS)
    for weights, moments in sharded:
        assert weights == pytest.approx(0.5, abs=0.02)  # of single rows one process has all
        assert moments == 1
    for kind in KINDS:
        assert_same_losses(tmp_path / kind, one / kind)
        for file in ("state.safetensors", "average.safetensors"):
            expected, got = (load_file(folder / kind / file) for folder in (one, tmp_path))
            assert expected.keys() == got.keys()
            for name, value in expected.items():
                assert got[name].shape == value.shape
                # Adam may step either way where a gradient is nothing but rounding.
                assert (got[name] - value).norm() <= 1e-2 * value.norm() + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "concat"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, script, kind):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    commands = [
        [sys.executable, str(script), str(folder), kind, "30", "1", "-"]
        for folder in (whole, killed)
    ]
    subprocess.run(commands[0], env=environment(), check=True)

    # With a checkpoint at every step, most of the time goes into writing them: kills hit both.
    source = random.Random(0)
    kills = 0
    for _ in range(2):
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

    expected, got = (load_file(f / kind / "state.safetensors") for f in (whole, killed))
    assert expected.keys() == got.keys()
    assert all(bool((expected[key] == got[key]).all()) for key in expected)
    assert [line["step"] for line in lines_of_steps(killed / kind)] == list(range(1, 31))
    assert not list((killed / kind).rglob(".*.part")), "a torn temporary file was left behind"


def lines_of_steps(folder):
    """Return the log but for the lines that say where it resumed."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "resumed" not in line]
