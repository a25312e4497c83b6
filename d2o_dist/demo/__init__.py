"""What the demo needs besides the library: a small real model, real text, and questions over it."""
