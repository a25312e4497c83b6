"""The tasks: each file turns its configuration into rows, and scores their answers."""
