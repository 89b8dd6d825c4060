"""`make gpu`: builds, checks, measures and tests fastmeta on a machine with a GPU."""
