"""Groups of commands, and commands with many options; `cli.py` puts them together. Each imports what it runs when it is
called."""
