"""Examples, from a file to the rows that training takes.

In come JSONL, JSON or Parquet files; out come tokenized rows for training and validation, and a report of what was left
out. Every bad line is named before a model loads.
"""
