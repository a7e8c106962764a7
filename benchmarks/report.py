"""Write the tables, plots, picture grids and the HTML report of a run from its records.

    python benchmarks/report.py benchmarks/results/faces64
    python benchmarks/report.py benchmarks/results/faces64 --readme README.md

run.py does so at its end; what the repository keeps of a run is only what this makes the rest from.
With --readme the rows and claims of the project's README are written too.
"""

import sys

from harness.cli import run_report

if __name__ == "__main__":
    sys.exit(run_report())
