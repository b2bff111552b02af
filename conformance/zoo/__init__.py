"""The fault zoo: backends that are wrong on purpose, which the suite must find."""
