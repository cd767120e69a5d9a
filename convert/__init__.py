"""Runs to other programs' formats and back."""
