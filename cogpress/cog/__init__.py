"""Everything known of Cog: its runtime, its HTTP API, its build and its command.

In come runners, cog.yaml and inputs; out come running servers, schemas, streams and results. The workarounds for the
runtime's quirks are here too, and nowhere else.
"""
