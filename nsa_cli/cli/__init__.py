"""The command line: a module a command, each a signature and one call into its wing."""
