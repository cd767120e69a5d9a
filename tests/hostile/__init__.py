"""Hostile flags, folders and environments: every script answers in one line, and writes nothing."""
