"""Optimizers on flat shards, learning-rate schedules and loss scaling."""
