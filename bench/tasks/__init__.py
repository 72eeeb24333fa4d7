"""Real models on real data that come with installed packages: what accuracy after pruning is measured on.

- `minilm`: a pretrained sentence encoder, and sentences to encode
- `digits`: handwritten digits, and a small ResNet to train on them
"""
