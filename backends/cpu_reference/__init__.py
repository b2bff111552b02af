"""The oracle: every op in its plainest form, in NumPy and float64. See README.md."""
