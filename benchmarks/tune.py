r"""Choose the settings of restoration methods on validation images, by one budget for all.

    python benchmarks/tune.py --prior ncvsd_faces64

Searches the settings of each method for each task and number of network calls, with as many trials
and the same images for all, and keeps trials, scores and choice in `benchmarks/tuned`, where run.py
finds them. It times a few calls first: where the whole takes more than `--hours`, two evenings of
one core, it cuts images, then trials, and the file says so. Searches above 20 calls start from the
settings of fewer calls, with half of the images and three quarters of the trials; above 100 calls
with eight images and half of the trials, and with the method's own settings too. The score is the
geometric mean of the mean lpips-alex and the mean lpips-vgg; psnr for images too small for them. A
stopped run goes on with the same command. `--help` tells more.
"""

import sys

from baselines.registry import METHODS
from harness.cli import run_tuning

if __name__ == "__main__":
    sys.exit(run_tuning(METHODS))
