"""Starts the compiler when its tests are among those that run."""

from __future__ import annotations

from tests.csrc import nvcc


def pytest_collection_finish(session):
    if any(item.path.name == "test_nvcc.py" for item in session.items):
        nvcc.start()


def pytest_sessionfinish():
    nvcc.stop()
