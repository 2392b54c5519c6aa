"""`python -m minift`, and what `torchrun -m minift` starts on every rank."""

from minift.cli import main

raise SystemExit(main())
