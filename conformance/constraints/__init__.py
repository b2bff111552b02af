"""Constraint profiles: the engine's level under the rules of steps of other hardware, emulated."""
