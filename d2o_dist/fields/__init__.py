"""Fields of configurations: declared with their limits, read from YAML and flags, refused with clear words."""
