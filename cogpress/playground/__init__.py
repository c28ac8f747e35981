"""A Replicate of your own: a web page and two HTTP APIs in front of models.

In come requests for predictions; out come streams, and a history that can be rated and exported as training data.
"""
