"""Pruning in the training loops of others: transformers' Trainer, Lightning, accelerate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fxprune.errors import InputError, TargetError
from fxprune.pruned import Pruned
from fxprune.training.pruner import Pruner

# Warnings of these libraries about each other and about this machine are not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    """Sentences; whether the first token is in the upper half of the vocabulary."""
    tokens = torch.randint(20, (count, 6))
    return [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": (t[0] >= 10).long()} for t in tokens]


def example() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def ffn(end: int) -> dict[str, Any]:
    return {"pattern": "ffn", "target": 0.5, "scope": "local", "schedule": {"end": end, "every": 1}}


def trainer(model: nn.Module, folder: Path, callback: Any, data: Any, steps: int, **more: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        disable_tqdm=True,
        logging_steps=1000,
        **({"save_strategy": "no"} | {k: v for k, v in more.items() if k != "compute_loss_func"}),
    )
    loss = more.get("compute_loss_func")
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, callbacks=[callback], compute_loss_func=loss
    )


def check(result: Pruned, inner: str, width: int) -> None:
    assert result.report.proof is not None
    assert result.module.get_submodule(inner).out_features == width


def test_transformers_trainer(tmp_path: Path) -> None:
    from fxprune.training.callbacks import TransformersCallback

    model, data = bert(), rows()
    pruner = Pruner(model, example(), ffn(4), distillation={"alpha": 0.5, "hidden": "blocks"})
    training = trainer(model, tmp_path, TransformersCallback(pruner), data, 6)
    training.train()
    assert pruner.step == 6
    assert [row.step for row in pruner.rows] == [0, 1, 2, 3, 4]
    assert float(pruner.distiller.last["outputs"]) > 0
    check(pruner.finish(), "bert.encoder.layer.0.intermediate.dense", 16)


def test_transformers_trainer_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    from fxprune.training.callbacks import TransformersCallback

    data = rows()
    whole, half, rest = bert(), bert(), bert()
    weights = []
    for model, folder, stop in ((whole, "whole", 6), (half, "halves", 3), (rest, "halves", 6)):
        pruner = Pruner(model, example(), ffn(6))
        saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
        training = trainer(model, tmp_path / folder, TransformersCallback(pruner), data, 6, **saving)
        training.add_callback(Stop(stop))
        training.train(resume_from_checkpoint=str(tmp_path / "halves/checkpoint-3") if model is rest else None)
        assert pruner.step == stop
        if stop == 6:
            weights.append(pruner.finish().module.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor)


class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Ends training at a step, as if the process had ended there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_transformers_trainer_with_a_loss_function(tmp_path: Path) -> None:
    from fxprune.training.callbacks import TransformersCallback, distilled

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    model, data = bert(), rows()
    pruner = Pruner(model, example(), ffn(2), distillation={})
    training = trainer(
        model, tmp_path, TransformersCallback(pruner), data, 3, compute_loss_func=distilled(pruner, loss)
    )
    training.train()
    assert pruner.distiller.used
    check(pruner.finish(), "bert.encoder.layer.1.intermediate.dense", 16)


def test_what_a_trainer_cannot_do_is_said_before_it_trains(tmp_path: Path) -> None:
    from fxprune.training.callbacks import TransformersCallback

    model, data = bert(), rows(8)
    callback = TransformersCallback(Pruner(model, example(), ffn(9)))
    with pytest.raises(TargetError, match="makes 3 steps, and the schedule ends before step 9"):
        trainer(model, tmp_path, callback, data, 3).train()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.down(functional.relu(self.up(x)))
        return logits


def pairs(count: int = 48) -> TensorDataset:
    x = torch.randn(count, 4)
    return TensorDataset(x, (x[:, 0] > 0).long())


CHANNEL = {"pattern": "channel", "target": 0.5, "schedule": {"end": 4}}


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from fxprune.training.callbacks import LightningCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, net: nn.Module, pruner: Pruner) -> None:
            super().__init__()
            self.net, self.pruner = net, pruner

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, labels = batch
            return self.pruner.distill(functional.cross_entropy(self.net(x), labels))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    def fit(net: nn.Module, pruner: Pruner, steps: int, path: Any = None) -> Any:
        training = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=2,
            callbacks=[LightningCallback(pruner)],
            default_root_dir=str(tmp_path),
        )
        loader = DataLoader(pairs(), batch_size=4)
        more = {} if path is None else {"ckpt_path": path}
        training.fit(Module(net, pruner), loader, **more)
        return training

    net = Small()
    pruner = Pruner(net, torch.randn(2, 4), CHANNEL, distillation={"alpha": 0.3})
    training = fit(net, pruner, 4)
    assert pruner.step == 4
    path = tmp_path / "half.ckpt"
    training.save_checkpoint(path)
    resumed = Small()
    other = Pruner(resumed, torch.randn(2, 4), CHANNEL, teacher=pruner.distiller.teacher)
    fit(resumed, other, 6, path)
    assert other.step == 6
    assert other.rows == pruner.rows  # those of the first part: all updates were made in it
    check(other.finish(), "up", 16)
    check(pruner.finish(), "up", 16)
    late = Small()
    pruner = Pruner(late, torch.randn(2, 4), CHANNEL, distillation={})
    with pytest.raises(TargetError, match="makes 2 steps"):
        fit(late, pruner, 2)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Small()
    pruner = Pruner(net, torch.randn(2, 4), CHANNEL, distillation={"alpha": 0.3})
    model, optimizer, loader = accelerator.prepare(
        net, torch.optim.Adam(net.parameters(), 1e-2), DataLoader(pairs(), batch_size=4)
    )
    pruner.attach(optimizer)
    for x, labels in loader:
        with accelerator.accumulate(model):
            loss = pruner.distill(functional.cross_entropy(model(x), labels))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert pruner.step == 6  # of 12 passes
    check(pruner.finish(), "up", 16)


def test_an_optimizer_of_another_model_is_refused_through_its_wrapper() -> None:
    accelerate = pytest.importorskip("accelerate")
    optimizer = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(Small().parameters(), 0.1))
    with pytest.raises(InputError, match="holds no parameter"):
        Pruner(Small(), torch.randn(2, 4), CHANNEL).attach(optimizer)


def test_callbacks_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, fxprune, fxprune.training.callbacks as c\n"
        "assert not {'transformers', 'lightning', 'pytorch_lightning', 'accelerate'} & set(sys.modules)\n"
        "try:\n    c.Other\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "has no attribute 'Other'" in done.stdout
