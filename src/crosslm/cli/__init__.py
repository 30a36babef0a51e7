"""The command line: a module for each group of commands, and what they all show and how they stop."""
