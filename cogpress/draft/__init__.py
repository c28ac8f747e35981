"""Drafts that make a tuned model answer faster and change no answer.

In come a training's rows; out comes a table in `weights/draft/`, which vLLM's engine asks for the next tokens. The
engine checks each of them.
"""
