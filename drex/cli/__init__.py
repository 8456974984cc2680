"""The `drex` command: one small module a subcommand."""
