"""`python -m mptk`: the same command line as the `mptk` console script."""

from __future__ import annotations

from mptk.cli.main import main

if __name__ == "__main__":
    main()
