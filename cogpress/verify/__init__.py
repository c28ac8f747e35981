"""Whether weights are what training scored, and whether the engine serves them correctly.

In come a folder of weights and held-out examples; out comes a report beside the weights, signed with the hashes of the
files that it covers.
"""
