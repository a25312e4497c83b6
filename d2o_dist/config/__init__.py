"""What YAML and flags say of a run: frozen, validated configurations. Rules of compression are in `policy`."""
