"""Smaller weights for serving, and what they cost in quality.

In come finished weights and the examples that they were trained on; out come a folder for each scheme and a comparison
of size, quality and speed. llmcompressor runs in an environment of its own.
"""
