"""Train the teacher of ncvsd_faces64, then distil it; each run resumes where it stopped.

python experiments/faces64/train.py teacher --data DIR/faces64/train.zip --out runs/faces64
python experiments/faces64/train.py distill --data DIR/faces64/train.zip --out runs/faces64
"""

import argparse
from pathlib import Path

import torch

from ncvsd_inverse.distill import (
    DistillConfig,
    DistillRun,
    ImageData,
    TeacherConfig,
    TeacherRun,
)

HERE = Path(__file__).parent


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["teacher", "distill"])
    parser.add_argument("--data", type=Path, required=True, help="zip or folder of images")
    parser.add_argument("--out", type=Path, default=Path("runs/faces64"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after")
    args = parser.parse_args()

    data = ImageData.read(args.data)
    config = TeacherConfig.from_toml(HERE / "teacher.toml")
    teacher = TeacherRun(config, data, args.out / "teacher")
    run: TeacherRun | DistillRun = teacher
    if args.stage == "distill":
        teacher.load()
        run = DistillRun(
            DistillConfig.from_toml(HERE / "distill.toml"),
            data,
            args.out / "distill",
            teacher.averaged("teacher"),
        )
    print(f"computes in {config.compute_dtype}, {torch.get_num_threads()} threads")
    done = run.run(seconds=args.seconds, on_log=lambda line: print(line, flush=True))
    print("done" if done else "stopped; the same command goes on", run.images_seen)


if __name__ == "__main__":
    main()
