"""OpenAI's HTTP API over the same predictions.

In come chat and text completions; out come their answers, chunks and errors in OpenAI's form.
"""
