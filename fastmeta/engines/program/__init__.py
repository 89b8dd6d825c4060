"""The program engine, for recognised networks: one compiled call a meta-gradient."""
