"""The conformance suite: checks of a backend against the CPU reference. It knows no vendor."""
