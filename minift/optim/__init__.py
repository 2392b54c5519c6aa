"""Optimizers on flat fp32 shards, and learning-rate schedules."""
