"""Backend `tile` of core: a chip of tiles, played by NumPy on the host."""
