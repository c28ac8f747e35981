"""The one client for Replicate's HTTP API.

In come a token and what to ask; out come Replicate's answers, or an error that says what to do. The token goes to
Replicate alone.
"""
