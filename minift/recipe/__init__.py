"""Recipes: what the user wrote (nodes.py) -> typed dataclasses (build.py) -> words for help (describe.py)."""
