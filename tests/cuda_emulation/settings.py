"""How a process emulates: its environment says so, since the process is pytest's."""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import asdict, dataclass

VARIABLE = "FASTMETA_EMULATOR"
ORDERS = ("natural", "reversed", "shuffled")
MIXED = "mixed"  # each test in one of the orders
# Tests of values and of launches, by their files and names. Where orders are mixed, the others run
# in the natural order or not at all: they call these kernels for layouts, repeated bits and edges.
OF_VALUES = re.compile(
    "float64_reference|boundaries|large_tiles|runtime|task_program|task_conv|task_batch_norm"
    "|activation|pair_scores|pair_pool|grid_steps|test_emulator|test_mutants|test_launches"
    "|block_plans|checked_labels"
)


@dataclass(frozen=True)
class Settings:
    """What a pytest process runs of the tests that it collects, and how.

    Attributes:
        order: in which threads run, of ORDERS, or MIXED.
        date: of the commit. Together with a test's name it chooses the order where they are mixed.
        shard: this process takes each `shards`-th test, from this one on.
        shards: how many processes share the tests.
        records: the folder of what tests came to which barriers; empty: nothing is recorded.
        name: of the file there that this process writes.
        mutants: whether mutants are run on the tests that are recorded, instead of the tests.
        is_partial: whether so few tests are recorded that a mutant can be one that none can see.
    """

    order: str = "natural"
    date: str = ""
    shard: int = 0
    shards: int = 1
    records: str = ""
    name: str = ""
    mutants: bool = False
    is_partial: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        return cls(**json.loads(os.environ.get(VARIABLE, "{}")))

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    def includes(self, test: str) -> bool:
        """Whether the test runs, if this process has its share."""
        if self.order != MIXED or self.order_of(test) == "natural":
            return True
        return OF_VALUES.search(test.partition("[")[0]) is not None

    def order_of(self, test: str) -> str:
        """The order of threads of a test."""
        if self.order != MIXED:
            return self.order
        return ORDERS[zlib.crc32(f"{self.date} {test}".encode()) % len(ORDERS)]
