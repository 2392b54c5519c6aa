"""Frozen base weights in 4 bits (QLoRA): the projection, putting it into a model, filling it, the files of others."""
