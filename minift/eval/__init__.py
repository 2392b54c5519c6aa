"""Evaluation: tasks with exact checkers, and loss over a validation set."""
