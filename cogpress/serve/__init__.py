"""A loaded model that answers predictions; what `predict.py` and `scripts/batch` run.

In come the inputs of a prediction; out comes a stream of text with metrics. Weights are found, checked and loaded at
the start.
"""
