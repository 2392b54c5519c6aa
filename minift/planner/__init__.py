"""What a run will need, on paper: memory, work and time of one rank, before any of it exists."""
