"""`python -m benchmarks`: the measurements of this folder on a CPU, one after the other.

    python -m benchmarks run [--workload NAME ...] [--peer NAME ...] [--rounds N]
                             [--device cpu|cuda] [--threads N] [--out DIR]
    python -m benchmarks report [--device cpu|cuda] [--out DIR] [--keep]
    python -m benchmarks regression --base REV [--only NAME ...] [--rounds N] [--seconds S]
                                    [--threads N] [--threshold R] [--out FILE]
    python -m benchmarks busy [--only NAME ...] [--rounds N] [--seconds S] [--threads N]

`run` measures fastmeta against its peers only, `report` draws and prints the results of a run,
`regression` tells whether the working tree is slower than a revision, `busy` how much slower a
meta-step is beside another process.
"""

import sys

from benchmarks import cli
from benchmarks.memory import meta, program
from benchmarks.ops import prototype_loss

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(cli.main())
    prototype_loss.main()
    print()
    meta.main()
    print()
    program.main()
    print()
    sys.exit(cli.main(["run"]))
