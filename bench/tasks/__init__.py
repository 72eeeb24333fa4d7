"""Real models on real data that come with installed packages: what accuracy after pruning is measured on.

- `digits_resnet`: a small ResNet on handwritten digits
- `digits_vit`: a small vision transformer on the same
- `minilm_similarity`: a pretrained sentence encoder, its embeddings and what they find
- `minilm_modules`: the same encoder trained to tell the standard library's modules apart by their docstrings
- `stdlib_gpt`: a byte-level GPT on the standard library's sources

`python -m bench.tasks` trains those that are not in the cache and prints how good they are.
"""

from bench.tasks import digits, gpt, modules, similarity, vit
from bench.tasks.task import Task

#: Every task by its name.
TASKS: dict[str, Task] = {
    task.name: task for task in (digits.task(), vit.task(), similarity.task(), modules.task(), gpt.task())
}
