"""Runs the command `heliostat` as `python -m heliostat`. Jobs on clusters start this module, because the script may not be on the
PATH."""

from heliostat.cli.main import main

main()
