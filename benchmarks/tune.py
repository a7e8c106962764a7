r"""Choose the settings of restoration methods on validation images, by one budget for all.

    python benchmarks/tune.py --task all --prior ncvsd_faces64 --data DIR/faces64/val.zip \
        --images 8 --out benchmarks/tuned/faces64.json

Tries at most nine combinations of settings for each method and task, at 10 network calls or, if a
method has no such row, its smallest number, and keeps grid, scores and choice in the output file,
where run.py finds them. The score is lpips-alex, or psnr for images too small for it. A stopped run
goes on with the same command.
"""

import sys

from baselines.registry import METHODS
from harness.cli import run_tuning

if __name__ == "__main__":
    sys.exit(run_tuning(METHODS))
