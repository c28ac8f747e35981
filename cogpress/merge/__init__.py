"""An adapter and its base become weights.

In come an adapter's folder and the base's files; out comes a folder of safetensors with a manifest, one tensor in
memory at a time. What cannot be merged exactly is refused by name.
"""
