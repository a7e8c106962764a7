"""`ncvsd solve` on many pictures: batches, stops, damage, processes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ncvsd_inverse import cli
from ncvsd_inverse.cli import folder
from ncvsd_inverse.images import read_image, write_image
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors import NCVSDPrior

ROOT = Path(__file__).parents[2]
TASK = ("--task", "deblur", "--blur-std", 1, "--boundary", "circular", "--sigma-y", 0.05)
TASK += ("--prior", "stand_in")
SIMULATED = ("--task", "deblur_gaussian", "--prior", "stand_in", "--simulate")


pytestmark = [
    pytest.mark.filterwarnings("ignore:the loop is 'gibbs'"),
    pytest.mark.filterwarnings("ignore:the schedule has one sweep only"),
    pytest.mark.filterwarnings("ignore:the residual is"),
]
"""Stand-ins that hold no statistics, and few calls, show most of what is tested here."""


class Noisy:
    """A prior of any size whose draws are random; it remembers how many images came together."""

    nfe_per_sample = 1
    image_shape = None

    def __init__(self):
        self.batches = []

    def sample(self, u, sigma, *, generator=None):
        self.batches.append(len(u))
        return u / (1 + sigma**2) + 0.1 * draw_normal(u, generator)


class Network(torch.nn.Module):
    """A network that takes sides of multiples of 8, and remembers them."""

    size_multiple = 8

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, sigma, condition, condition_sigma, labels=None):
        self.seen.append(tuple(x.shape[2:]))
        return 0.5 * condition


@pytest.fixture
def prior(monkeypatch):
    stand_in = Noisy()
    monkeypatch.setattr("ncvsd_inverse.cli.inputs.load_prior", lambda name, device=None: stand_in)
    return stand_in


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, prior):
    """Run `ncvsd solve` in `tmp_path`; return exit status, standard output and error."""

    def run(*arguments):
        prior.batches.clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ncvsd", "solve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def make_picture(path, height, width, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    write_image(path, torch.rand(1, 3, height, width, generator=generator) * 2 - 1)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of 24x16, and in a folder of their own two of 16x16, and something else."""
    folder = tmp_path / "in"
    for i, (name, height) in enumerate(
        [("a", 24), ("sub/a", 16), ("b", 24), ("c.v2", 24), ("sub/d", 16)]
    ):
        make_picture(folder / f"{name}.png", height, 16, i)
    (folder / "notes.txt").write_text("no picture")
    return folder


NAMES = ["a", "b", "c.v2", "sub/a", "sub/d"]


def restored(folder):
    return {name: (folder / f"{name}_restored.png").read_bytes() for name in NAMES}


def test_a_folder_is_restored_in_batches_of_one_size(run, tmp_path, pictures, prior):
    status, printed, err = run("in", *TASK, "--nfe", 2, "-o", "out")
    assert (status, err) == (0, "")
    assert sorted(prior.batches) == [2, 2, 3, 3]
    out = tmp_path / "out"
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert written == sorted(f"{n}{end}" for n in NAMES for end in (".json", "_restored.png"))
    assert read_image(out / "sub" / "d_restored.png").shape == (1, 3, 16, 16)
    assert "5 pictures restored, 0 finished before, 0 failed" in printed


@pytest.mark.parametrize("options", [TASK, (*SIMULATED, "--samples", 2)])
def test_a_result_does_not_depend_on_the_other_pictures(run, tmp_path, pictures, options):
    run("in", *options, "-o", "together")
    run("in/b.png", *options, "-o", "alone")
    run("in/b.png", *options, "-o", "other", "--seed", 1)
    kinds = ["restored"] + (["measurement", "std"] if "--simulate" in options else [])
    for kind in kinds:
        own = (tmp_path / "alone" / f"b_{kind}.png").read_bytes()
        assert (tmp_path / "together" / f"b_{kind}.png").read_bytes() == own
        assert (tmp_path / "other" / f"b_{kind}.png").read_bytes() != own
    # The same measurement under another name has other noise.
    (tmp_path / "in" / "twin.png").write_bytes((pictures / "b.png").read_bytes())
    run("in/twin.png", *options, "-o", "alone")
    twin = (tmp_path / "alone" / "twin_restored.png").read_bytes()
    assert twin != (tmp_path / "together" / "b_restored.png").read_bytes()


def test_finished_pictures_are_skipped(run, tmp_path, pictures, prior):
    run("in", *TASK, "-o", "out")
    first = restored(tmp_path / "out")
    (tmp_path / "out" / "b_restored.png").unlink()
    (tmp_path / "out" / "sub" / "d_restored.png").write_bytes(first["sub/d"][:50])
    (tmp_path / "out" / "a.json").unlink()
    (tmp_path / "out" / "a_restored.png").unlink()
    status, printed, _ = run("in", *TASK, "-o", "out", "--nfe", 10)
    assert status == 0
    assert sum(prior.batches) == 3 * 10
    assert "3 pictures restored, 2 finished before, 0 failed" in printed
    assert restored(tmp_path / "out") == first
    assert run("in", *TASK, "-o", "out")[0] == 0
    assert prior.batches == []


def test_a_schedule_of_its_own_passes_for_finished_too(run, pictures, prior):
    for batches in (5, 0):
        assert run("in", *TASK, "-o", "out", "--nfe", 2, "--schedule", "1,0.1")[0] == 0
        assert (sum(prior.batches) > 0) == (batches > 0)


def test_pictures_of_one_name_in_two_folders_do_not_replace_each_other(run, tmp_path, pictures):
    assert run("in/b.png", *TASK)[0] == 0
    before = (tmp_path / "ncvsd_restored" / "b_restored.png").read_bytes()
    (tmp_path / "other").mkdir()
    make_picture(tmp_path / "other" / "b.png", 24, 16, 100)
    status, _, err = run("other/b.png", *TASK)
    assert status == 1
    assert "is of another picture of this name, in/b.png: name another --out" in err
    assert (tmp_path / "ncvsd_restored" / "b_restored.png").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value", "entry"),
    [
        ("--nfe", 3, "nfe"),
        ("--seed", 1, "seed"),
        ("--sigma-y", 0.1, "sigma_y"),
        ("--blur-std", 1.5, "blur_std"),
        ("--boundary", "reflect", "boundary"),
        ("--samples", 2, "samples"),
        ("--estimate", "ema", "estimate"),
        ("--sigma-lik", 0.04, "sigma_lik"),
        ("--schedule", "1,0.1", "schedule"),
    ],
)
def test_other_settings_do_not_pass_for_finished(run, pictures, prior, option, value, entry):
    run("in", *TASK, "-o", "out", "--nfe", 2)
    changed = [option] if value is None else [option, value]
    printed = run("in", *TASK, "-o", "out", "--nfe", 2, *changed)[1]
    assert printed.count(f"is of another {entry}: restored again") == len(NAMES)
    assert "5 pictures restored" in printed


def test_another_file_of_the_same_name_is_restored(run, pictures):
    run("in", *TASK, "-o", "out")
    make_picture(pictures / "b.png", 24, 16, 100)
    printed = run("in", *TASK, "-o", "out")[1]
    assert "is of another input_sha256: restored again" in printed
    assert "1 pictures restored, 4 finished before" in printed


def test_a_stop_among_changed_settings_leaves_no_record_that_lies(
    run, tmp_path, pictures, monkeypatch
):
    run("in", *TASK, "-o", "out")
    first = restored(tmp_path / "out")
    whole = folder.write_whole

    def full(path, content):
        if "seconds" in content:
            raise OSError("the disk is full")
        whole(path, content)

    monkeypatch.setattr(folder, "write_whole", full)
    status, _, err = run("in", *TASK, "-o", "out", "--seed", 1)
    assert status == 1
    assert "the disk is full" in err
    assert restored(tmp_path / "out") != first
    monkeypatch.setattr(folder, "write_whole", whole)
    run("in", *TASK, "-o", "out")
    assert restored(tmp_path / "out") == first


def test_outputs_of_fewer_kinds_leave_no_older_ones(run, tmp_path, pictures):
    run("in/a.png", *SIMULATED, "-o", "out", "--samples", 2)
    run("in/a.png", *TASK, "-o", "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.json", "a_restored.png"]


def test_bad_files_are_named_at_the_end(run, tmp_path, pictures):
    whole = (pictures / "b.png").read_bytes()
    (pictures / "b.png").write_bytes(whole[:60])
    make_picture(pictures / "small.png", 4, 16, 0)
    (pictures / "gone.png").symlink_to("nowhere")
    status, printed, err = run("in", *TASK, "-o", "out")
    assert status == 1
    assert "4 pictures restored, 0 finished before, 3 failed" in printed
    assert err.startswith("error: 3 of 7 pictures could not be restored: in/b.png must be a read")
    assert err.count("\n") == 1
    assert "in/small.png: its sides must be at least those of the kernel, 9 x 9, got 16 x 4" in err
    assert "in/gone.png: " in err
    assert not (tmp_path / "out" / "b.json").exists()
    # Mended, they alone are restored.
    (pictures / "b.png").write_bytes(whole)
    (pictures / "small.png").unlink()
    (pictures / "gone.png").unlink()
    status, printed, _ = run("in", *TASK, "-o", "out")
    assert status == 0
    assert "1 pictures restored, 4 finished before, 0 failed" in printed


def test_no_picture_stops_the_others(run, tmp_path, pictures, monkeypatch, prior):
    long = "x" * 245
    (pictures / f"{long}.png").write_bytes((pictures / "a.png").read_bytes())
    os.mkfifo(pictures / "pipe.png")
    (tmp_path / "beside").mkdir()
    make_picture(tmp_path / "beside" / "e.png", 16, 16, 0)
    (pictures / "elsewhere").symlink_to("../beside")
    (pictures / "link.png").symlink_to("../beside/e.png")
    with (pictures / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    for count in (5, 0):
        status, printed, err = run("in", *TASK, "-o", "out")
        assert (status, err.count("\n")) == (1, 1)
        assert f"{count} pictures restored, {5 - count} finished before, 5 failed" in printed
        assert err.startswith("error: 5 of 10 pictures could not be restored: ")
        assert f"in/{long}.png: [Errno 36] File name too long" in err
        assert "in/pipe.png: it must be a file, got a pipe" in err
        assert "in/elsewhere: it is a link to a folder, which is not followed" in err
        assert "in/link.png: it is a link that leads out of the folder" in err
        assert "in/sparse.png: it must have at most 1073741824 bytes, got 1099511627776" in err


@pytest.mark.parametrize(
    "error", [RuntimeError("can't allocate memory"), MemoryError("too large"), ValueError("no")]
)
def test_a_picture_too_large_for_memory_is_named(run, pictures, prior, error):
    make_picture(pictures / "large.png", 16, 48, 0)
    tame = prior.sample

    def sample(u, sigma, *, generator=None):
        if u.shape[-1] == 48:
            raise error
        return tame(u, sigma, generator=generator)

    prior.sample = sample
    for count in (5, 0):
        status, printed, err = run("in", *TASK, "-o", "out")
        assert (status, err) == (
            1,
            f"error: 1 of 6 pictures could not be restored: in/large.png: {error}\n",
        )
        assert f"{count} pictures restored, {5 - count} finished before, 1 failed" in printed


def test_names_need_not_be_text(run, tmp_path, pictures):
    name = os.fsdecode(b"caf\xe9")
    (pictures / f"{name}.png").write_bytes((pictures / "a.png").read_bytes())
    for count in (6, 0):
        status, printed, _ = run("in", *TASK, "-o", "out")
        assert (status, f"{count} pictures restored" in printed) == (0, True)
    assert (tmp_path / "out" / f"{name}_restored.png").exists()
    (pictures / f"{name}.png").write_bytes(b"damaged")
    assert r"caf\udce9.png must be a readable" in run("in", *TASK, "-o", "out")[2]


@pytest.mark.parametrize(
    "name",
    ["a.json", "a_restored.png", "a_restored.tif", "a_measurement.png", "a_std.png", "sub/d.json"],
)
@pytest.mark.parametrize("content", [b'{"label": 3}', b"[" * 100_000])
def test_files_of_the_user_are_not_written_over(run, tmp_path, pictures, name, content):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(content)
    status, printed, err = run("in", *TASK, "-o", "out", "--nfe", 1)
    assert status == 1
    assert "4 pictures restored, 0 finished before, 1 failed" in printed
    assert f"out/{name} is there and has no record of ours" in err
    assert mine.read_bytes() == content


def test_a_file_of_the_user_beside_a_result_stays(run, tmp_path, pictures):
    run("in/a.png", *TASK, "-o", "out")
    (tmp_path / "out" / "a_std.png").write_bytes(b"mine")
    status, _, err = run("in/a.png", *TASK, "-o", "out", "--samples", 2)
    assert (status, "out/a_std.png is there and has no record" in err) == (1, True)
    assert (tmp_path / "out" / "a_std.png").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["restored", "measurement", "std"])
def test_a_result_that_is_not_whole_is_made_again(run, tmp_path, pictures, kind):
    run("in/a.png", *SIMULATED, "-o", "out", "--samples", 2)
    path = tmp_path / "out" / f"a_{kind}.png"
    whole = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(whole[:-1])):
        damage()
        printed = run("in/a.png", *SIMULATED, "-o", "out", "--samples", 2)[1]
        assert f"out/a_{kind}.png is not as it was written: restored again" in printed
        assert path.read_bytes() == whole


def test_a_kill_between_any_two_writes_is_made_good(run, tmp_path, pictures, monkeypatch):
    command = ("in/a.png", *SIMULATED, "-o", "out", "--samples", 2)
    run(*command)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert len(first) == 3
    for stop in range(5):
        run(*command, "--seed", 1)
        with monkeypatch.context() as patch:
            replace, left = Path.replace, [stop]

            def killed(self, target, replace=replace, left=left):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return replace(self, target)

            patch.setattr(Path, "replace", killed)
            assert run(*command)[0] != 0
        assert run(*command)[0] == 0
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.png")} == first


def test_leftovers_of_a_kill_are_cleared(run, tmp_path, pictures):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    number = int(dead.stdout)
    left = [out / f".a_restored.png.{number}.77.part", out / "sub" / f".d.json.{number}.77.part"]
    kept = [
        out / f".mine.png.{number}.77.part",
        out / f".a_std.png.{os.getppid()}.77.part",
        out / ".a_restored.png.part",
    ]
    for path in (*left, *kept):
        path.write_bytes(b"half")
    assert run("in", *TASK, "-o", "out")[0] == 0
    assert [path.exists() for path in (*left, *kept)] == [False, False, True, True, True]


def test_a_full_disk_ends_the_run(run, pictures, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_whole", full)
    assert run("in", *TASK, "-o", "out")[2] == "error: [Errno 28] No space left on device\n"


def test_a_size_that_the_network_cannot_take_is_restored_all_the_same(
    run, tmp_path, pictures, monkeypatch
):
    prior = NCVSDPrior(Network(), image_shape=None)
    monkeypatch.setattr("ncvsd_inverse.cli.inputs.load_prior", lambda name, device=None: prior)
    make_picture(pictures / "odd.png", 25, 19, 0)
    status, printed, _ = run("in", *TASK, "-o", "out")
    assert (status, "6 pictures restored" in printed) == (0, True)
    assert read_image(tmp_path / "out" / "odd_restored.png").shape == (1, 3, 25, 19)
    assert set(prior.network.seen) >= {(16, 16), (24, 16), (32, 24)}


def test_a_size_that_the_prior_does_not_restore_is_a_bad_file(run, tmp_path, monkeypatch):
    prior = NCVSDPrior(Network(), image_shape=(3, 16, 16))
    monkeypatch.setattr("ncvsd_inverse.cli.inputs.load_prior", lambda name, device=None: prior)
    make_picture(tmp_path / "large.png", 24, 20, 0)
    status, _, err = run("large.png", *TASK, "-o", "out")
    assert status == 1
    assert "large.png: it must have 16 x 16 pixels, as this prior restores images of 16 x 16" in err
    err = run("large.png", *TASK, "--boundary", "valid", "-o", "out")[2]
    assert "it must have 8 x 8 pixels, as this prior restores images of 16 x 16" in err


def test_a_picture_that_diverges_does_not_take_its_batch_along(run, tmp_path, pictures, prior):
    write_image(pictures / "b.png", torch.ones(1, 3, 24, 16))
    tame = prior.sample

    def sample(u, sigma, *, generator=None):
        x0 = tame(u, sigma, generator=generator)
        x0[u.mean((1, 2, 3)) > 0.5] = torch.nan
        return x0

    prior.sample = sample
    status, printed, err = run("in", *TASK, "-o", "out", "--sigma-y", 0.001)
    assert status == 1
    assert "4 pictures restored, 0 finished before, 1 failed" in printed
    assert "in/b.png: " in err
    assert "the prior's draw must stay finite" in err


def test_outputs_within_the_folder_are_not_taken_for_pictures(run, pictures):
    for _ in range(2):
        status, printed, _ = run("in", *TASK, "-o", "in/restored")
        assert status == 0
    assert "0 pictures restored, 5 finished before" in printed


def test_outputs_beside_the_pictures_are_not_taken_for_pictures(run, tmp_path, pictures, prior):
    for folder_of_all in ("in", "."):
        for _ in range(2):
            status, printed, _ = run("in", *TASK, "-o", folder_of_all)
            assert status == 0
        assert "0 pictures restored, 5 finished before" in printed
    # A user's picture may have any name.
    make_picture(pictures / "mine_restored.png", 16, 16, 0)
    assert "1 pictures restored, 5 finished before" in run("in", *TASK, "-o", "in")[1]


def test_two_pictures_that_differ_in_their_suffix_have_two_outputs(run, tmp_path, pictures):
    write_image(pictures / "a.jpg", read_image(pictures / "b.png"))
    assert run("in", *TASK, "-o", "out")[0] == 0
    written = sorted(p.name for p in (tmp_path / "out").glob("*.json"))
    assert written == ["a_jpg.json", "a_png.json", "b.json", "c.v2.json"]


def test_one_picture_may_be_written_to_a_file(run, tmp_path, pictures):
    assert run("in/a.png", *TASK, "-o", "new/better.jpg")[0] == 0
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == ["better.jpg", "better.json"]
    again = run("in/a.png", *TASK, "-o", "new/better.jpg", "--seed", 1)
    assert (again[0], "of another seed: restored again" in again[1]) == (0, True)
    assert run("in/a.png", *TASK, "-o", "in/a_better.png")[0] == 0
    assert "5 pictures restored" in run("in", *TASK, "-o", "out")[1]  # not it too
    before = (pictures / "a.png").read_bytes()
    status, _, err = run("in/a.png", *TASK, "-o", "in/a.png")
    assert (status, "in/a.png is there and has no record of ours" in err) == (1, True)
    assert (pictures / "a.png").read_bytes() == before
    assert read_image(tmp_path / "new" / "better.jpg").shape == (1, 3, 24, 16)
    status, _, err = run("in", *TASK, "-o", "better.png")
    assert (status, err) == (1, "error: --out must be a folder for 5 pictures, got better.png\n")


def job(height, width, number=0, sigma_y=0.05):
    """Return what batches are made of."""
    size = (3, height, width)
    return SimpleNamespace(number=number, size=size, together=size, sigma_y=sigma_y)


def test_batches_hold_few_pictures():
    made = []

    def jobs():
        generator = torch.Generator().manual_seed(0)
        for number in range(500):
            side = 8 * int(torch.randint(1, 12, (1,), generator=generator))
            made.append(number)
            yield job(side, 8, number)

    out, pixels = [], 2000
    for batch in folder.batch_by_size(jobs(), pixels):
        assert len({job.size for job in batch}) == 1
        assert len(batch) * batch[0].size[1] * 8 <= pixels
        out += [job.number for job in batch]
        assert (len(made) - len(out)) * 8 * 8 <= 4 * pixels
    assert sorted(out) == list(range(500))
    single = [job(100, 100) for _ in range(3)]
    assert list(map(len, folder.batch_by_size(single, pixels))) == [1, 1, 1]
    unknown = [job(8, 8, sigma_y="auto") for _ in range(2)]
    assert list(map(len, folder.batch_by_size(unknown, pixels))) == [1, 1]


def test_processes_share_the_pictures(run, tmp_path, pictures, prior, monkeypatch):
    monkeypatch.setattr(cli.solve, "report_failures", lambda bad, pictures: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for process, count in (("1", 2), ("0", 3)):
        monkeypatch.setenv("RANK", process)
        printed = run("in", *TASK, "--nfe", 1, "-o", "shared")[1]
        assert sum(prior.batches) == count
        assert f"{count} pictures restored" in printed
    run("in", *TASK, "--nfe", 1, "-o", "alone")
    monkeypatch.delenv("WORLD_SIZE")
    run("in", *TASK, "--nfe", 1, "-o", "alone")
    assert restored(tmp_path / "shared") == restored(tmp_path / "alone")


@pytest.mark.slow
def test_launched_processes_wait_for_each_other(tmp_path, pictures):
    (pictures / "b.png").write_bytes(b"damaged")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "ncvsd_inverse.cli", "solve", str(pictures)]
    command += ["--task", "sr4x", "--simulate", "--prior", "ncvsd_natural", "--nfe", "1"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: 1 of 5 pictures could not be restored" in done.stderr
    assert sorted(p.stem for p in (tmp_path / "out").rglob("*.json")) == ["a", "a", "c.v2", "d"]


def test_large_pictures_are_seen_in_tiles(run, tmp_path, pictures, monkeypatch):
    network = Network()
    prior = NCVSDPrior(network, image_shape=None)
    monkeypatch.setattr("ncvsd_inverse.cli.inputs.load_prior", lambda name, device=None: prior)
    monkeypatch.setattr(sys.modules["ncvsd_inverse.cli.restoring"], "LARGE", 64 * 96 - 1)
    make_picture(tmp_path / "large.png", 64, 96, 0)
    gibbs = ("--nfe", 1, "--tile", 32, "--method", "gibbs")
    status, out, _ = run("large.png", *TASK, "-o", "out", *gibbs)
    assert status == 0
    assert "large.png: 96x64 pixels in tiles of 32, about 0.8 GB of memory" in out
    assert set(network.seen) == {(32, 32)}
    assert json.loads((tmp_path / "out" / "large.json").read_text())["tile"] == 32
    assert prior.network is network
