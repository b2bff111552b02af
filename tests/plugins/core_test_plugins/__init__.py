"""Plugins for core's own tests, loaded through the same entry points as everyone else's."""
