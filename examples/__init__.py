"""Worked examples: what a user writes for a task of their own."""
