"""`make gpu`: builds, tests, checks and measures fastmeta on a machine with a GPU."""
