"""The tasks that accuracy is measured on, Torch-Pruning to compare with, and the machine's description."""

from __future__ import annotations

import contextlib
import copy
import time

import pytest
import torch
from torch import Tensor, nn

from bench import machine
from bench.peers import torch_pruning
from bench.tasks import digits, minilm


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
