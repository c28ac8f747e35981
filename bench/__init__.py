"""Side-by-side benchmarks: the same work, done by cogpress and by what people would use instead, in one run.

Each file that `scripts/bench` names compares one thing. In come weights or data; out come a table on the terminal and a
JSON report in runs/bench/.
"""
