"""All ranks of a model, driven as one: in this process, or a process per rank."""
