"""What minift reads and writes on disk."""
