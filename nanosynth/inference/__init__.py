"""A run to a model, and what a model makes of prompts and texts.

Imports nothing of data/ or training/.
"""
