"""The two engines: the meta-gradient of any module, and of a recognised network as one call."""
