"""The command line: `common` has what commands share, `main` starts it, every other module a group of commands."""
