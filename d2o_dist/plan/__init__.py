"""What a run would need and how long it would take on GPUs that need not be here: arithmetic, without weights."""
