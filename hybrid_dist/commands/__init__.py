"""Subcommands of `hybrid-dist` by what they are about: thin, and what they need is imported when they run."""
