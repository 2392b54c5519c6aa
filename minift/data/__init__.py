"""From rows on disk to packed batches: read, convert, render, encode, load."""
