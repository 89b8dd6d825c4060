"""`python -m benchmarks`: everything this folder measures on a CPU, one after the other.

    python -m benchmarks run [--workload NAME ...] [--peer NAME ...] [--rounds N]
                             [--device cpu|cuda] [--threads N] [--out DIR]
    python -m benchmarks report [--device cpu|cuda] [--out DIR] [--keep]
    python -m benchmarks regression --base REV [--only NAME ...] [--rounds N] [--seconds S]
                                    [--threads N] [--threshold R] [--out FILE]

`run` measures fastmeta against its peers alone, `report` draws and prints what it left,
`regression` says whether the working tree is slower than a revision.
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
