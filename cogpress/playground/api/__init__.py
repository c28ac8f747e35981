"""Replicate's HTTP API, as its clients use it.

In come its requests; out come its JSON, event streams and webhooks, over the playground's core.
"""
