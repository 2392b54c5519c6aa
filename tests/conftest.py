"""What several test files need: one hypothesis profile, so that no test repeats these settings."""

from __future__ import annotations

from hypothesis import settings

# No deadline: two cores are shared with other processes. Examples are few because each runs tiny tensors or files.
settings.register_profile("minift", deadline=None, max_examples=30)
settings.load_profile("minift")
