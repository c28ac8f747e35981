"""Memory, hardware, time and cost of a model, before anything is trained.

In come a config.json, the load and a table of hardware; out come tables, JSON and a picture. No weights are loaded.
"""
