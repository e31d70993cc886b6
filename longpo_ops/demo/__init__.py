"""The loop in miniature: the shipped tiny model on real text, on a CPU, in minutes.

`longpo demo` is examples/tiny/evolve.yaml through `evolve`, shown step by step; `--compare` trains other methods on the
same pairs.
"""
