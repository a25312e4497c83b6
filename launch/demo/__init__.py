"""`make demo`: a small real model, questions over a long real text, and the answers of each cache."""
