"""The tasks that accuracy is measured on, Torch-Pruning to compare with, and the machine's description.

Every task is tested in a tiny version: the same code with a smaller model, fewer steps and shorter texts.
"""

from __future__ import annotations

import contextlib
import copy
import doctest
import importlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from bench import machine
from bench.peers import torch_pruning
from bench.tasks import TASKS, cache, digits, gpt, minilm, modules, similarity, stdlib, training, vit
from bench.tasks.task import Task, cross_entropy


@pytest.fixture(scope="module")
def encoder() -> minilm.Encoder:
    pytest.importorskip("transformers")
    try:
        return minilm.encoder()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@torch.inference_mode()
def test_similar_sentences_lie_closer(encoder: minilm.Encoder) -> None:
    said = ["Return the path of a file.", "Give back where a file is located.", "Compute the sine of an angle."]
    embedded = encoder(*minilm.tokenize(said))
    assert embedded.shape == (3, minilm.WIDTH)
    assert embedded.isfinite().all()
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3))
    alike = embedded @ embedded.T
    assert alike[0, 1] > alike[0, 2] + 0.2
    assert alike[0, 1] > alike[1, 2] + 0.2


@torch.inference_mode()
def test_padding_does_not_change_an_embedding(encoder: minilm.Encoder) -> None:
    said = ["Open a socket.", "Read a line of text from the stream and give it back without its end."]
    filled, short = minilm.tokenize(said, length=32), minilm.tokenize(said, length=32, fill=False)
    assert filled[0].shape == (2, 32)
    assert short[0].shape[1] < 32
    assert {tensor.dtype for tensor in filled + short} == {torch.int64}
    torch.testing.assert_close(encoder(*filled), encoder(*short), rtol=1e-4, atol=1e-5)


def test_cosine_of_an_encoder_to_itself_and_to_a_damaged_one(encoder: minilm.Encoder) -> None:
    batches = minilm.batches(["Open a socket.", "Close it.", "Return the sum of all numbers."], size=2)
    assert [len(ids) for ids, _ in batches] == [2, 1]
    assert minilm.cosine(encoder, encoder, batches) == pytest.approx(1.0, abs=1e-6)
    damaged = copy.deepcopy(encoder)
    for module in damaged.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[:, ::2] = 0
    assert -1.0 <= minilm.cosine(encoder, damaged, batches) < 0.95
    tokens, kept = minilm.Encoder(encoder.bert, pooled=False).eval(), minilm.tokenize(["Close it."])
    assert minilm.cosine(tokens, tokens, [kept]) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="no batch"):
        minilm.cosine(encoder, encoder, [])


def test_sentences_are_distinct_and_repeatable() -> None:
    few, more, other = minilm.sentences(50, seed=3), minilm.sentences(80, seed=3), minilm.sentences(50, seed=4)
    assert few == more[:50] != other
    assert len(set(more)) == 80
    assert all(text == " ".join(text.split()) and len(text) > 8 for text in more)
    with pytest.raises(ValueError, match=r"1000000 sentences asked for, this Python's standard library has \d+"):
        minilm.sentences(1_000_000)


def test_digits_split_is_disjoint_and_repeatable() -> None:
    data, again, other = digits.digits(), digits.digits.__wrapped__(), digits.digits(seed=1)
    assert set(data.train_rows.tolist()).isdisjoint(data.test_rows.tolist())
    assert sorted(data.train_rows.tolist() + data.test_rows.tolist()) == list(range(1797))
    assert torch.equal(data.test_rows, again.test_rows)
    assert torch.equal(data.train_images, again.train_images)
    assert not torch.equal(data.test_rows, other.test_rows)
    assert data.train_images.shape == (len(data.train_rows), 1, digits.SIZE, digits.SIZE)
    assert float(data.train_images.min()) == -1.0
    assert float(data.train_images.max()) == 1.0
    assert data.test_labels.bincount().min() >= 40


def test_shifts_move_each_image_by_at_most_two_pixels() -> None:
    images = torch.arange(16.0 * 16).view(1, 1, 16, 16).repeat(64, 1, 1, 1)
    moved = digits.shifted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    # A pixel six rows and seven columns in is inside whatever the shift, so that what stands there tells it.
    shifts = moved[:, 0, 6, 7] - images[:, 0, 6, 7]
    expected = {float(16 * down + across) for down in range(-2, 3) for across in range(-2, 3)}
    assert set(shifts.tolist()) <= expected
    assert len(set(shifts.tolist())) > 12


@pytest.fixture(scope="module")
def small() -> digits.Digits:
    """Return digits with a third of the training images, for quick training."""
    data = digits.digits()
    return digits.Digits(
        data.train_images[::3],
        data.train_labels[::3],
        data.train_rows[::3],
        data.test_images,
        data.test_labels,
        data.test_rows,
    )


def loss(model: nn.Module, data: digits.Digits) -> float:
    with torch.inference_mode():
        return float(nn.functional.cross_entropy(model(data.train_images), data.train_labels))


def test_an_epoch_lowers_the_loss(small: digits.Digits) -> None:
    widths = (8, 16, 32)
    model = digits.resnet(widths=widths)
    seen: list[tuple[int, int, float]] = []
    state = torch.get_rng_state()
    before = loss(model, small)
    losses = digits.train(
        model, epochs=1, batch=16, data=small, progress=lambda done, steps, value: seen.append((done, steps, value))
    )
    assert loss(model, small) < before
    assert not model.training
    assert [done for done, _, _ in seen] == list(range(1, seen[0][1] + 1))
    assert losses[0] == pytest.approx(sum(value for _, _, value in seen) / len(seen), rel=0.05)
    assert torch.equal(torch.get_rng_state(), state)

    again = digits.resnet(widths=widths)
    assert digits.train(again, epochs=1, batch=16, data=small) == losses
    assert digits.finetune(again, epochs=1, batch=16, data=small)[0] < losses[0]
    assert 0.1 < digits.accuracy(again, small) <= 1.0


def test_finetuning_a_traced_module(small: digits.Digits) -> None:
    model = torch.fx.symbolic_trace(digits.resnet(widths=(8, 8, 8)))
    before = loss(model, small)
    digits.finetune(model, epochs=1, batch=16, data=small)
    assert loss(model, small) < before


def test_torch_pruning_leaves_the_model_and_halves_a_copy() -> None:
    pytest.importorskip("torch_pruning")
    model, images = digits.resnet(), (torch.zeros(2, 1, 16, 16),)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned, seconds = torch_pruning.prune(model, images, ratio=0.5)
    assert isinstance(pruned, digits.ResNet)
    assert (pruned.stem.out_channels, pruned.head.in_features, pruned.head.out_features) == (16, 64, digits.CLASSES)
    assert pruned(*images).shape == (2, digits.CLASSES)
    assert 0 < seconds < 15
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch_pruning.classifiers(model, images) == ["head"]


class Slow(nn.Module):
    """A model whose forward swallows what interrupts it, as Torch-Pruning's tracing can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:  # the first call only asks which layer is as wide as the output
            with contextlib.suppress(TimeoutError):
                time.sleep(5)
        result: Tensor = self.layer(x)
        return result


def test_torch_pruning_is_stopped_in_time() -> None:
    pytest.importorskip("torch_pruning")
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"Torch-Pruning was stopped after 0\.2 s"):
        torch_pruning.prune(Slow(), (torch.zeros(1, 4),), ratio=0.5, limit=0.2)
    assert time.perf_counter() - start < 4


def test_the_stamp_is_one_line_and_names_what_matters() -> None:
    about, line = machine.describe(), machine.stamp()
    assert "\n" not in line
    for key in ("processor", "torch", "python", "date"):
        assert str(about[key]) in line
    assert f"{about['cores']} cores" in line
    assert "/" not in str(about["processor"])


# ---------------------------------------------------------------------- the tasks as one interface
def _resnet(seed: int = 0) -> Task:
    return digits.task(digits.Settings(widths=(4, 8, 8), epochs=1, batch=128, seed=seed))


def _vit(seed: int = 0) -> Task:
    return vit.task(vit.Settings(depth=1, width=16, heads=2, epochs=1, batch=128, seed=seed))


def _similarity(seed: int = 0) -> Task:
    return similarity.task(similarity.Settings(tested=16, length=32, seed=seed))


def _modules(seed: int = 0) -> Task:
    return modules.task(modules.Settings(modules=4, tested=16, trained=32, length=32, short=16, epochs=1, seed=seed))


def _gpt(seed: int = 0) -> Task:
    return gpt.task(gpt.Settings(depth=1, width=32, heads=2, context=64, steps=10, batch=2, windows=8, seed=seed))


TINY: dict[str, Callable[..., Task]] = {
    "digits_resnet": _resnet,
    "digits_vit": _vit,
    "minilm_similarity": _similarity,
    "minilm_modules": _modules,
    "stdlib_gpt": _gpt,
}
TRAINED = [name for name in TINY if name != "minilm_similarity"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Put what is cached by this module's tests into a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cache.directory()


def make(name: str, seed: int = 0) -> Task:
    if name.startswith("minilm"):
        pytest.importorskip("transformers")
        try:
            minilm.weights()
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
    return TINY[name](seed)


def rows(batches: list[tuple[Tensor, ...]]) -> set[bytes]:
    """Return each sample of the first input as bytes."""
    return {row.numpy().tobytes() for inputs in batches for row in inputs[0]}


def test_every_task_is_tested_and_has_its_own_name() -> None:
    assert list(TINY) == list(TASKS)
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", TINY)
def test_a_task_gives_a_model_data_and_a_score(name: str, folder: Path) -> None:
    task = make(name)
    model = task.model()
    assert not model.training
    output = model(*task.example)
    assert output.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(task.example, task.example, strict=True))

    batches = task.calibration(36)
    assert sum(len(inputs[0]) for inputs, _ in batches) == 36
    for inputs, labels in batches:
        free = {dim for sizes in (task.dynamic or {}).values() for dim in sizes}
        for x, wanted in zip(inputs, task.example, strict=True):
            assert all(
                a == b or i in free for i, (a, b) in enumerate(zip(x.shape[1:], wanted.shape[1:], strict=True), 1)
            )
        assert [x.dtype for x in inputs] == [x.dtype for x in task.example]
        assert labels is not None
        assert len(labels) == len(inputs[0])
    loss = task.loss(model(*batches[0][0]), batches[0][1])
    loss.backward()
    # What pruning by the loss needs: a slope, also where the model is at its best.
    assert loss.isfinite()
    assert max(float(x.grad.abs().max()) for x in model.parameters() if x.grad is not None) > 1e-4
    with pytest.raises(ValueError, match="needs"):
        task.loss(output, None)

    model.train()
    figures = task.measures(model)
    assert model.training
    assert task.score(model) == next(iter(figures.values())) == task.score(task.model())
    assert -10 < task.score(model) <= 1 + 1e-6
    assert task.unit == next(iter(figures))
    assert "higher is better" in task.better


@pytest.mark.parametrize("name", TINY)
def test_calibration_is_seeded_and_of_training_data(name: str, folder: Path) -> None:
    task = make(name)
    same, again, other = ([inputs for inputs, _ in task.calibration(40, seed)] for seed in (1, 1, 2))
    assert rows(same) == rows(again) != rows(other)
    assert len(rows(same)) >= 39  # two docstrings may begin alike
    if name.startswith("digits"):
        data = digits.digits()
        known, tested = rows([(data.train_images,)]), rows([(data.test_images,)])
        assert rows(same) <= known
        assert rows([task.example]) <= known
        assert known.isdisjoint(tested)
        with pytest.raises(ValueError, match=r"100000 samples asked for, the training split has 1\d{3}"):
            task.calibration(100_000)


@pytest.mark.parametrize("name", TINY)
def test_an_epoch_is_of_training_data_in_an_order_of_its_own(name: str, folder: Path) -> None:
    task = make(name)
    epoch = task.training(16, 0)
    first, again, other, reseeded = (
        [next(iter(e)) for _ in range(1)]
        for e in (epoch, task.training(16, 0), task.training(16, 1), task.training(16, 0, 1))
    )
    (inputs, labels), (same, _), (different, _), (seeded, _) = first[0], again[0], other[0], reseeded[0]
    assert rows([inputs]) == rows([same])
    assert rows([inputs]) != rows([different]) and rows([inputs]) != rows([seeded])
    assert len(inputs[0]) <= 16 and labels is not None
    task.loss(task.model()(*inputs), labels).backward()
    if name in ("digits_resnet", "digits_vit", "minilm_modules"):
        batches = list(task.training(16, 0))
        assert len(batches) == len(epoch)
        known = len(digits.digits().train_labels) if name.startswith("digits") else 32
        assert sum(len(x[0]) for x, _ in batches) == known


def test_pairs_of_sentences_are_split_and_calibration_takes_the_training_ones(folder: Path) -> None:
    task = make("minilm_similarity")
    training, held_out = similarity.pairs(16)
    assert len(held_out) == 16
    assert {text for pair in training for text in pair}.isdisjoint(text for pair in held_out for text in pair)
    known = rows([minilm.tokenize([text for pair in training for text in pair], 32)])
    tested = rows([minilm.tokenize([text for pair in held_out for text in pair], 32)])
    drawn = [inputs for inputs, _ in task.calibration(40)]
    assert rows(drawn) <= known
    assert rows([*drawn, task.example]).isdisjoint(tested)


def test_docstrings_of_modules_are_split_and_calibration_takes_the_training_ones(folder: Path) -> None:
    task = make("minilm_modules")
    names, training, held_out = modules.docstrings(4, 16)
    assert len(held_out) == 16
    assert {text for text, _ in training}.isdisjoint(text for text, _ in held_out)
    assert {module for _, module in training} == set(range(len(names))) == set(range(4))
    numbers = {}
    for text, module in training:
        numbers[minilm.tokenize([text], 32)[0].numpy().tobytes()] = module
    tested = rows([minilm.tokenize([text for text, _ in held_out], 32)])
    batches = task.calibration(40)
    assert rows([inputs for inputs, _ in batches]) <= set(numbers)
    assert rows([*(inputs for inputs, _ in batches), task.example]).isdisjoint(tested)
    ids, labels = batches[0][0][0], batches[0][1]
    assert labels is not None
    assert [numbers[row.numpy().tobytes()] for row in ids] == labels.tolist()


def test_sources_are_split_by_file_and_calibration_takes_the_training_ones(folder: Path) -> None:
    training, held_out = gpt.programs()
    assert set(training).isdisjoint(held_out)
    assert len(held_out) == round(0.1 * (len(training) + len(held_out)))
    known, tested = (part.numpy().tobytes() for part in gpt.text())
    assert (known, tested) == (b"".join(training), b"".join(held_out))
    for inputs, labels in make("stdlib_gpt").calibration(6):
        assert labels is not None
        assert torch.equal(inputs[0][:, 1:], labels[:, :-1])
        assert all(bytes(row.tolist()) in known for row in inputs[0])
    windows, follow = gpt.held_out(gpt.Settings(windows=5, context=300))
    assert all(bytes([*row, end]) in tested for row, end in zip(windows.tolist(), follow[:, -1].tolist(), strict=True))
    assert bytes(windows[0].tolist()) == tested[:300]


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_is_trained_once_and_the_same_way(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[str] = []

    def showing(console: object, what: str) -> contextlib.AbstractContextManager[training.Progress]:
        bars.append(what)
        return contextlib.nullcontext(lambda done, steps, loss: None)

    def found() -> set[Path]:
        return set(folder.glob(f"{name}-*"))

    monkeypatch.setattr(cache, "showing", showing)
    task, state = make(name), torch.get_rng_state()
    first = task.model().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    (file,) = found()
    assert cache.seconds(file) > 0
    trained = len(bars)
    assert trained <= 1  # none where an earlier test has trained it
    second = task.model().state_dict()
    assert len(bars) == trained
    file.unlink()
    anew = task.model().state_dict()
    assert bars[trained:] == [f"training {name}"]
    assert all(torch.equal(value, second[key]) and torch.equal(value, anew[key]) for key, value in first.items())
    assert found() == {file}

    other = make(name, seed=1).model().state_dict()
    assert len(bars) == trained + 2
    assert len(found()) == 2
    assert any(not torch.equal(value, other[key]) for key, value in first.items())


def test_training_a_classifier_lowers_its_loss(folder: Path) -> None:
    make("minilm_modules")
    settings = modules.Settings(modules=2, tested=16, trained=32, length=32, short=16, epochs=4, batch=16)
    losses = modules.train(modules.classifier(settings), settings)
    assert len(losses) == 8
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_training_on_sources_lowers_the_bits(folder: Path) -> None:
    settings = gpt.Settings(depth=1, width=32, heads=2, context=64, steps=60, batch=8, lr=1e-2, windows=8)
    trained, fresh = gpt.task(settings), gpt.gpt(settings)
    assert trained.score(fresh) == pytest.approx(-8, abs=0.2)
    assert trained.score(trained.model()) > -5


@torch.inference_mode()
def test_the_gpt_sees_what_came_before_only_and_how_far_back() -> None:
    model = gpt.gpt(gpt.Settings(depth=2, width=32, heads=2, context=32))
    for weight in model.parameters():  # large: attention that looks at something
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.3)
    text = torch.randint(0, 256, (1, 32))
    changed = text.clone()
    changed[0, 20] ^= 1
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])
    torch.testing.assert_close(model(text[:, :7]), before[:, :7])
    swapped = text.clone()
    swapped[0, [3, 4]] = text[0, [4, 3]]
    assert not torch.allclose(model(swapped)[0, -1], before[0, -1], atol=1e-6)


def test_an_ngram_model_predicts_what_it_has_read() -> None:
    read = torch.arange(4, dtype=torch.uint8).repeat(500)
    line = torch.arange(2, 66) % 4
    inputs, labels = line[None, :-1], line[None, 1:]
    assert gpt.ngram_bits(read, inputs, labels, longest=0) == pytest.approx(2, abs=0.02)
    assert gpt.ngram_bits(read, inputs, labels) < 0.02
    noise = torch.randint(0, 256, (1, 64))
    assert gpt.ngram_bits(read, noise, noise) > 7


def test_recall_is_of_the_own_row() -> None:
    asked = torch.nn.functional.normalize(torch.randn(40, 8), dim=-1)
    assert similarity.recall(asked, 3 * asked, 1) == 1
    chance = similarity.recall(asked, torch.randn(40, 8), 10)
    assert similarity.recall(asked, asked.roll(1, 0), 1) == 0 < chance < 0.5
    assert similarity.recall(asked, asked.roll(1, 0), 40) == 1


def test_the_rate_rises_falls_and_scales_each_group() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [layer.weight], "lr": 1.0}, {"params": [layer.bias], "lr": 0.1}])
    seen: list[tuple[float, float]] = []

    def note(done: int, steps: int, loss: float) -> None:
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"]))

    batches = [((torch.randn(4, 2),), torch.zeros(4, dtype=torch.int64))] * 40
    losses = training.fit(layer, batches, 40, optimizer, cross_entropy, note)
    assert losses[-1] < losses[0]
    assert [big for big, _ in seen] == [training.rate(done, 40) for done in range(40)]
    assert all(small == pytest.approx(big / 10) for big, small in seen)
    assert max(big for big, _ in seen) == 1


def test_docstrings_are_halved_where_a_sentence_ends() -> None:
    (said,) = stdlib.parse("def f():\n    '''Use e.g. this\n    one.  Then that.\n\n    More.'''\n", "m")
    assert said.text == "Use e.g. this one. Then that. More."
    assert said.halves() == ("Use e.g. this one.", "Then that. More.")
    assert stdlib.Docstring("m", "Only one", "").halves() == ("Only one", "")
    assert {"asyncio", "threading"} <= {found.module for found in stdlib.docstrings()}


def test_the_table_shows_each_task(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = importlib.import_module("bench.tasks.__main__")
    monkeypatch.setattr(command, "TASKS", {name: make(name) for name in ("digits_resnet", "digits_vit")})
    command.main([])
    shown = capsys.readouterr().out
    assert re.search(r"digits_vit .* 0\.\d{4} .* 0\.10\d\d ", shown)
    assert "digits_resnet: the share of the held-out images named rightly" in shown
    assert machine.stamp() in " ".join(shown.split())
    command.main(["digits_vit"])
    assert "digits_resnet" not in capsys.readouterr().out
    with pytest.raises(command.typer.BadParameter, match="no task 'nothing': digits_resnet, digits_vit"):
        command.main(["nothing"])


@pytest.mark.parametrize("module", [cache, gpt, similarity, stdlib, training], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
