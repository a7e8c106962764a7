"""Hold restoration methods side by side, per network call.

    python benchmarks/run.py --task sr4x
    python benchmarks/run.py --task all --nfe 4 10 20 100 --out results
    accelerate launch benchmarks/run.py --task all --out results

The first takes a minute: 16 images, ten calls. With `--nfe` each method has a row at each of these
numbers of calls at which it can run; more than 100 are for methods that `--methods` names.
`--methods` takes names, and methods of your own as `my_module:METHOD` or `my_methods.py:METHOD`.
Settings are those that tune.py chose at the same or the nearest number of calls.

Writes records, tables, plots, picture grids and a report to the output folder. Rows that are there
already are not run again, so a stopped run goes on with the same command. `--help` tells more.
"""

import sys

from baselines.registry import METHODS
from harness.cli import run

if __name__ == "__main__":
    sys.exit(run(METHODS))
