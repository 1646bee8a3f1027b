"""Runs the command `heliostat` as `python -m heliostat`. Jobs on clusters start this, because the PATH may lack the script."""

from heliostat.cli.main import main

main()
