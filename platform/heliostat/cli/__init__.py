"""Defines the command line: `common` has what commands share, `main` starts it, every other module is a group of commands."""
