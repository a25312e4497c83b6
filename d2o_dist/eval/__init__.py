"""Evaluation: tasks x methods x budgets on one model, with the full cache beside them in the same run."""
