"""fastmeta against its peers: the same meta-step of each, in processes that take turns."""
