"""What produces every measured figure: real tasks, other tools to compare with, and the machine they ran on.

- `bench.tasks`: models with data, whose accuracy can be measured before and after pruning
- `bench.peers`: other pruning tools on the same models
- `bench.machine`: the machine and the versions, to stand under every table
- `bench.shims`: what must be put right before timm and transformers can be imported

Nothing in here is part of the compiler and nothing is downloaded.
"""
