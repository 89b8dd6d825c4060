"""The program engine: recognised networks."""
