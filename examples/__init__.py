"""Worked examples: what a user of cogpress would write for a task of their own."""
