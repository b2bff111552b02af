"""The conformance suite: checks of a backend against the CPU reference. It knows no vendor."""

SUITE = "0.1.0"
"""Version of the suite. Its first two parts are those of the contract that it checks."""
