"""QLoRA training.

In come a base model and tokenized rows; out come an adapter, metrics and plots in the run's folder. Interrupted runs
resume to the same result.
"""
