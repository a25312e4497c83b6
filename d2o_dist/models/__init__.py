"""The seam to models: what is above it (engine, eval, cli) knows no model library, what is below it knows no model."""
