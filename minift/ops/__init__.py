"""Fused operations: one file per op family, each with its plain-PyTorch reference beside it (see csrc/README.md)."""
