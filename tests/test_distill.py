"""Distillation: losses and gradients by hand, what is compared, when it is refused, and what stays on a model after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxprune
from fxprune.errors import InputError, RecipeError, TargetError
from fxprune.passes.training.distill import output_tensors, repeated_blocks
from fxprune.training.distill import Distiller
from fxprune.training.pruner import Pruner


class Layer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.down(functional.gelu(self.up(self.norm(x)))), None


class Net(nn.Module):
    """Tokens in, logits for each out; a mask is an input that the layers do not look at."""

    def __init__(self, width: int = 8, inner: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width, inner) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        logits: Tensor = self.head(x)
        return logits


class WithLoss(Net):
    """As models of transformers do: with labels the output has a loss."""

    def forward(self, tokens: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(tokens)
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def data(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(11, (rows, 6)), torch.randint(5, (rows, 6)), (torch.rand(rows, 6) < 0.7).long()


def hard(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def states(model: Net, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    x, found = model.embed(tokens), []
    for layer in model.layers:
        x, _ = layer(x)
        found.append(x)
    return found, model.head(x)


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(alpha: float, masked: bool) -> None:
    student, teacher = Net().double(), Net().double()
    tokens, labels, mask = data()
    weights = {"layers.1": 0.25}
    options = {"alpha": alpha, "temperature": 3.0, "hidden": "blocks", "hidden_weight": 0.7, "weights": weights}
    with Distiller(student, teacher, **options) as distiller:
        logits = student(tokens, mask) if masked else student(tokens)
        blended = distiller.distill(hard(logits, labels))
        found = gradients(student, blended)

    counts = (mask if masked else torch.ones_like(mask)).double()
    ours, own = states(student, tokens)
    with torch.no_grad():
        theirs, other = states(teacher, tokens)
    p, q = torch.softmax(other / 3, -1), torch.softmax(own / 3, -1)
    kl = ((p * (p.log() - q.log())).sum(-1) * counts).sum() / counts.sum() * 9
    errors = [((a - b).square().mean(-1) * counts).sum() / counts.sum() for a, b in zip(ours, theirs, strict=True)]
    wanted = (1 - alpha) * hard(own, labels) + alpha * (kl + 0.7 * (errors[0] + 0.25 * errors[1]) / 2)
    torch.testing.assert_close(blended, wanted)
    for one, there in zip(found, gradients(student, wanted), strict=True):
        torch.testing.assert_close(one, there)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("outputs", "loss"), [("mse", nn.MSELoss()), ("cosine", nn.CosineEmbeddingLoss())])
def test_embeddings_are_compared_as_they_are(outputs: str, loss: nn.Module) -> None:
    student, teacher, x = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(9, 6)
    with Distiller(student, teacher, alpha=1, outputs=outputs) as distiller:
        student(x)
        blended = distiller.distill(torch.zeros(()))
    more = (torch.ones(9),) if outputs == "cosine" else ()
    wanted = loss(student(x), teacher(x).detach(), *more)
    torch.testing.assert_close(blended, wanted)
    torch.testing.assert_close(gradients(student, blended), gradients(student, wanted))


def test_padding_does_not_count() -> None:
    student, teacher = Net(), Net()
    tokens, _, mask = data()
    other = torch.where(mask == 0, (tokens + 1) % 11, tokens)
    losses = []
    with Distiller(student, teacher, alpha=1, hidden="blocks") as distiller:
        for some in (tokens, other):
            student(some, attention_mask=mask)
            losses.append(distiller.distill(torch.zeros(())))
        student(other)
        losses.append(distiller.distill(torch.zeros(())))
        student(tokens)
        losses.append(distiller.distill(torch.zeros(()), mask=mask))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[3])
    assert float((losses[0] - losses[2]).detach().abs()) > 1e-4


def test_a_mask_that_fits_nothing_is_refused() -> None:
    student, teacher = Net(), Net()
    with Distiller(student, teacher) as distiller:
        student(data()[0])
        with pytest.raises(InputError, match="fits the rows of no output"):
            distiller.distill(torch.zeros(()), mask=torch.ones(3, 3))
    with Distiller(student, teacher, mask="padding") as distiller:
        student(data()[0])
        with pytest.raises(InputError, match="without an input 'padding'"):
            distiller.distill(torch.zeros(()))


def test_an_equal_teacher_has_nothing_to_teach() -> None:
    student = Net()
    with Distiller(student, copy.deepcopy(student), alpha=1, hidden="blocks") as distiller:
        student(data()[0])
        loss = distiller.distill(torch.ones(()))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- what is compared
def test_blocks_are_found_by_structure() -> None:
    from bench.tasks import digits, vit

    assert repeated_blocks(Net(depth=3)) == ["layers.0", "layers.1", "layers.2"]
    assert repeated_blocks(Net(depth=1)) == []
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert repeated_blocks(vit.ViT(depth=2, width=16)) == ["blocks.0", "blocks.1"]
    assert repeated_blocks(digits.ResNet((4, 4, 4))) == [f"stages.{i}.{j}" for i in range(3) for j in range(2)]


def test_a_teacher_may_be_deeper() -> None:
    student, teacher = Net(depth=2), Net(depth=4)
    with Distiller(student, teacher, hidden={"layers.0": "layers.1", "layers.1": "layers.3"}) as distiller:
        student(data()[0])
        assert distiller.distill(torch.zeros(())).requires_grad
    with Distiller(student, teacher, hidden="blocks") as distiller:
        assert list(distiller.pairs) == ["layers.0", "layers.1"]
        assert sorted(distiller.skipped) == ["layers.2", "layers.3"]


def test_other_widths_are_refused_or_mapped() -> None:
    student, teacher = Net(width=8), Net(width=16)
    tokens = data()[0]
    with Distiller(student, teacher, hidden={"layers.0": "layers.0"}) as distiller:
        student(tokens)
        with pytest.raises(InputError, match="maps: True"):
            distiller.distill(torch.zeros(()))
    optimizer = torch.optim.SGD(student.parameters(), 0.0)  # the student stands still: only the maps can learn
    losses = []
    with Distiller(student, teacher, alpha=1, outputs="none", hidden="blocks", maps=True, maps_lr=0.05) as distiller:
        for _ in range(30):
            student(tokens)
            loss = distiller.distill(torch.zeros(()))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_maps_go_on_where_they_were() -> None:
    tokens = data()[0]
    options: dict[str, Any] = {"outputs": "none", "hidden": "blocks", "maps": True, "maps_lr": 0.05}

    def steps(distiller: Distiller, student: nn.Module, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            student(tokens)
            loss = distiller.distill(torch.zeros(()))
            loss.backward()
            losses.append(float(loss.detach()))
        return losses

    torch.manual_seed(0)
    student, teacher = Net(width=8), Net(width=16)
    with Distiller(student, teacher, **options) as distiller:
        whole = steps(distiller, student, 7)
    with Distiller(student, teacher, **options) as distiller:
        begun = steps(distiller, student, 4)
        state = distiller.state_dict()
    with Distiller(student, teacher, **options) as distiller:
        distiller.load_state_dict(state)
        assert begun + steps(distiller, student, 3) == whole
    with Distiller(student, teacher, outputs="logits") as distiller, pytest.raises(InputError, match=r"layers\.0"):
        distiller.load_state_dict(state)


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (torch.ones(2, 3), ["0"]),
        ((torch.ones(2, 3), torch.ones(2)), ["0"]),
        ({"loss": torch.ones(()), "start_logits": torch.ones(2), "end_logits": torch.ones(2)}, 2),
        ({"loss": torch.ones(()), "last_hidden_state": torch.ones(2, 3), "pooled": torch.ones(2)}, 1),
    ],
)
def test_outputs_that_count(output: Any, names: Any) -> None:
    found = list(output_tensors(output, ()))
    assert found == names or len(found) == names
    assert "loss" not in found


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"temprature": 2}, RecipeError, "did you mean 'temperature'"),
        ({"kd_alpha": 0.5}, RecipeError, "here it is called alpha"),
        ({"alpha": 1.5}, RecipeError, "alpha"),
        ({"outputs": "none"}, RecipeError, "nothing to learn"),
        ({"hidden": {"layers.7": "layers.0"}}, InputError, "no module 'layers.7'"),
        ({"hidden": "blocks", "weights": {"layers.9": 1}}, RecipeError, "did you mean 'layers"),
        ({"fields": ["scores"]}, InputError, "no tensor of real numbers 'scores'"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], error: type[Exception], text: str) -> None:
    student = Net()

    def use() -> None:
        with Distiller(student, Net(), **options) as distiller:
            student(data()[0])
            distiller.distill(torch.zeros(()))

    with pytest.raises(error, match=text):
        use()


def test_a_model_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="name layers"):
        Distiller(nn.Linear(2, 2), nn.Linear(2, 2), hidden="blocks")


def test_other_classes_are_refused() -> None:
    student = nn.Linear(2, 3)
    with Distiller(student, nn.Linear(2, 4)) as distiller:
        student(torch.ones(1, 2))
        with pytest.raises(InputError, match=r"\(1, 3\), the teacher's \(1, 4\)"):
            distiller.distill(torch.zeros(()))


# ---------------------------------------------------------------------- a loss that is in the output
def test_the_loss_in_an_output_is_blended_by_itself() -> None:
    student, teacher = WithLoss(), WithLoss()
    tokens, labels, _ = data()
    with Distiller(student, teacher, automatic=False) as distiller:
        wanted = distiller.distill(student(tokens, labels)["loss"])
    with Distiller(student, teacher) as distiller:
        output = student(tokens, labels)
        torch.testing.assert_close(output["loss"], wanted)
        assert distiller.used
        assert distiller.distill(output["loss"]) is output["loss"]
        output = student(tokens, labels)
        with pytest.raises(InputError, match="blended already"):
            distiller.distill(output["loss"] / 2)
        student.eval()
        plain = student(tokens, labels)
        torch.testing.assert_close(plain["loss"], hard(plain["logits"], labels))


def test_passes_that_are_accumulated_add_up_to_the_whole_batch() -> None:
    """Transformers' Trainer tells a model the labels of all passes of a step; losses are then shares of their sum."""
    student, teacher = WithLoss().double(), WithLoss().double()
    tokens, labels, _ = data(6)
    with Distiller(student, teacher, alpha=1) as distiller:
        whole = gradients(student, student(tokens, labels)["loss"])
        several = [
            gradients(student, student(tokens[rows], labels=labels[rows], num_items_in_batch=labels.numel())["loss"])
            for rows in (slice(0, 1), slice(1, 6))
        ]
        assert distiller.used
    for one, parts in zip(whole, zip(*several, strict=True), strict=True):
        torch.testing.assert_close(sum(parts), one)


# ---------------------------------------------------------------------- with a Pruner
def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def pruner(model: nn.Module, **more: Any) -> Pruner:
    return Pruner(model, (data()[0],), {"pattern": "ffn", "target": 0.5, "schedule": {"end": 4}}, **more)


def test_a_pruner_distils_from_a_copy_of_the_dense_model() -> None:
    model = Net()
    dense = copy.deepcopy(model)
    tokens, labels, _ = data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    pruning = pruner(model, distillation={"hidden": "blocks"}).attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        for rows in (slice(0, 2), slice(2, 4)):  # accumulated
            with torch.autocast("cpu", torch.bfloat16):
                loss = hard(model(tokens[rows]), labels[rows])
            (pruning.distill(loss) / 2).backward()
        optimizer.step()
    for one, other in zip(pruning.distiller.teacher.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other)
    assert hooks(model)
    result = pruning.finish()
    assert hooks(model) == hooks(result.module) == 0
    assert result.module.get_submodule("layers.0.up").out_features == 16
    with pytest.raises(InputError, match="finished"):
        pruning.distill(torch.zeros(()))


def test_distillation_keeps_a_student_near_its_teacher() -> None:
    tokens = torch.randint(11, (64, 6))
    distances = []
    for distillation in (None, {"alpha": 1.0, "hidden": "blocks"}):
        torch.manual_seed(0)
        model = Net(inner=64)
        teacher = copy.deepcopy(model).eval()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        pruning = pruner(model, distillation=distillation).attach(optimizer)
        for _ in range(60):
            optimizer.zero_grad()
            logits = model(tokens)
            loss = logits.square().mean() * 0.0  # labels say nothing
            (loss if distillation is None else pruning.distill(loss)).backward()
            optimizer.step()
        small = pruning.finish().module
        distances.append(float((small(tokens) - teacher(tokens)).detach().square().mean()))
    assert distances[1] < 0.5 * distances[0]


def test_a_loss_in_the_output_needs_no_call() -> None:
    model = WithLoss()
    tokens, labels, _ = data()
    inputs = {"tokens": tokens, "labels": labels}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruning = Pruner(model, inputs, {"pattern": "ffn", "target": 0.5, "schedule": {"end": 2}}, teacher=WithLoss())
    pruning.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs)["loss"].backward()
        optimizer.step()
    assert float(pruning.distiller.last["outputs"]) > 0


def test_a_loop_that_forgets_the_teacher_is_stopped() -> None:
    model = Net()
    tokens, labels, _ = data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner(model, distillation={}).attach(optimizer)
    hard(model(tokens), labels).backward()
    with pytest.raises(InputError, match=r"pruner\.distill\(loss\)"):
        optimizer.step()


def test_a_pruner_without_a_teacher_says_so() -> None:
    with pytest.raises(InputError, match="no teacher"):
        pruner(Net()).distill(torch.zeros(()))


def test_distill_is_for_the_last_pass_in_training_mode() -> None:
    student = Net()
    with Distiller(student, Net()) as distiller:
        with torch.no_grad():
            student(data()[0])
        student.eval()(data()[0])
        with pytest.raises(InputError, match="no forward pass in training mode"):
            distiller.distill(torch.zeros(()))


def test_finishing_too_early_leaves_everything_attached() -> None:
    model = Net()
    tokens, labels, _ = data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruning = pruner(model, distillation={}).attach(optimizer)
    for step in range(6):
        if step == 2:
            with pytest.raises(TargetError, match="train on"):
                pruning.finish()
        pruning.distill(hard(model(tokens), labels)).backward()
        optimizer.step()
    assert pruning.finish().module.get_submodule("layers.1.up").out_features == 16


# ---------------------------------------------------------------------- of a pruned module
def test_a_pruned_module_is_a_student_too() -> None:
    dense = Net(inner=64).eval()
    tokens, labels, _ = data()
    small = fxprune.compile(dense, (tokens,), target={"params": 0.6}, groups=["ffn"]).module
    assert isinstance(small, fx.GraphModule)
    before = small.code, hooks(small), [n for n, _ in small.named_modules()]
    wanted = small(tokens)
    small.train()
    with Distiller(small, dense, alpha=1, hidden="blocks") as distiller:
        logits = small(tokens)
        torch.testing.assert_close(logits, wanted)
        loss = distiller.distill(hard(logits, labels))
        assert sorted(distiller.pairs) == ["layers.0", "layers.1"]
        # What the layers return, by another way: the streams that the head and the second layer's norm read.
        seen: list[Tensor] = []
        handles = [
            small.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
            for path in ("layers.1.norm", "head")
        ]
        small(tokens)
        for handle in handles:
            handle.remove()
        errors = [functional.mse_loss(a, b) for a, b in zip(seen, states(dense, tokens)[0], strict=True)]
        torch.testing.assert_close(distiller.last["hidden"], torch.stack(errors).mean().detach())
        loss.backward()
    assert (small.code, hooks(small), [n for n, _ in small.named_modules()]) == before
    assert hooks(dense) == 0


def test_a_copy_of_the_student_is_no_student() -> None:
    student = Net()
    with Distiller(student, Net(), hidden="blocks") as distiller:
        average = torch.optim.swa_utils.AveragedModel(student)
        student(data()[0])
        average(data()[0])
        assert distiller.distill(torch.zeros(())).requires_grad
