"""A Replicate of one's own: its HTTP API, a web page and an OpenAI face before one or several models."""
