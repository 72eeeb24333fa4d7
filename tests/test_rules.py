"""Every rule, by brute force over samples: it claims neither too much nor too little, and each rule has a sample.

`tests/rules` holds the samples and what is checked for each. The last tests show that the checks can fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rules import Sample, all_samples, aten, checks, sample
from rules.samples_experts import experts_in_half_precision

import fxprune
from fxprune import rules as table
from fxprune.axes import concat
from fxprune.errors import ProofError
from fxprune.rules import RULES, Rule

table.load()
SAMPLES = all_samples()

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:(var|std)\(\). degrees of freedom is <= 0"),  # one unit is left
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),  # torch.backends.mkldnn.flags
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work with one thread: the models are so small that a second one only gets in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _marked(s: Sample) -> Any:
    return pytest.param(s, id=s.name, marks=pytest.mark.xfail(reason=s.xfail, strict=True) if s.xfail else ())


#: Operators that samples in single precision cannot use, and the test that does.
ELSEWHERE = {aten._grouped_mm.default}  # test_grouped_product_in_half_precision


def test_grouped_product_in_half_precision() -> None:
    model = experts_in_half_precision().eval()
    inputs = torch.randn(6, 16, dtype=torch.bfloat16)
    pruned = fxprune.compile(model, inputs, target={"params": 0.6}, round_to=1)
    assert {n.target for n in pruned.module.graph.nodes} >= {aten._grouped_mm.default}
    assert pruned.module.up.shape == (2, 16, 8) and pruned.module.router.out_features == 2
    assert "multiple of 16 bytes" in pruned.report.whole["up.2"]


def test_every_operator_has_a_sample() -> None:
    sampled = {target for s in SAMPLES for target in s.targets}
    ours = {target for target in RULES if not isinstance(target, str) and target.namespace == "aten"} - ELSEWHERE
    assert {t for t in RULES if isinstance(t, str)} <= {str(t) for t in sampled}
    missing = sorted(str(t) for t in ours - sampled)
    assert not missing, f"add samples for these to tests/rules/samples_<family>.py: {', '.join(missing)}"
    named = {target for target in sampled if str(target) in RULES}
    assert not sampled - ours - named, f"samples for operators without a rule: {sorted(map(str, sampled - ours))}"


def test_samples_have_different_names() -> None:
    names = [s.name for s in SAMPLES]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


@pytest.mark.parametrize("case", [_marked(s) for s in SAMPLES])
def test_sample(case: Sample) -> None:
    """The groups are those expected, what is emitted is proved, and no group is too small or too large."""
    check(case)


def check(case: Sample) -> None:
    """Do all checks on one sample."""
    model, inputs = case.build(), case.inputs(9)
    analysis, groups = checks.analysed(model, inputs)
    found = {node.target for node in analysis.captured.graph.nodes}
    assert set(case.targets) <= found, f"{case.name} does not use {set(case.targets) - found}"
    assert not analysis.unknown
    assert bool(analysis.captured.symbols) == case.dynamic, analysis.captured.notes
    if case.groups is not None:
        assert tuple(sorted(g.size for g in groups)) == case.groups, f"groups {[(g.name, g.size) for g in groups]}"
    checks.check_captured(model, analysis, inputs)
    for kept in checks.selections(groups, seed=0):
        checks.check_emitted(model, analysis, kept, case.inputs(4) if case.dynamic else inputs)
    checks.check_permutation(analysis, groups, inputs, seed=0)
    checks.check_members(analysis, groups, inputs, seed=0)


# ---------------------------------------------------------------------- the checks can fail
def _first_operand(site: Any, x: Any, *_: Any, **__: Any) -> Any:
    """A rule that looks at nothing but the sizes: the dimensions of the operand, or new axes where sizes differ."""
    x = x[0] if x and isinstance(x[0], tuple) else x
    return tuple(d if checks.size_of(d) == s else site.fresh(s) for d, s in zip(x, site.shape, strict=False))


def _linear_without_input(site: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    if bias is not None:
        site.unify(bias[-1], weight[0])
    return (*x[:-1], weight[0])


def _linear_without_bias(site: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    site.unify(x[-1], weight[-1])
    return (*x[:-1], weight[0])


def _swapped_cat(site: Any, tensors: Any, dim: int = 0) -> Any:
    dim %= len(tensors[0])
    return (*tensors[0][:dim], concat([t[dim] for t in reversed(tensors)]), *tensors[0][dim + 1 :])


def _everything_one(site: Any, *operands: Any, **_: Any) -> Any:
    """A rule that couples too much: both dimensions of the weight."""
    x, weight = operands[:2]
    site.unify(x[-1], weight[-1])
    if len(operands) > 2 and operands[2] is not None:
        site.unify(operands[2][-1], weight[0])
    if checks.size_of(weight[0]) == checks.size_of(weight[-1]):
        site.unify(weight[0], weight[-1])
    return (*x[:-1], weight[0])


WRONG = {
    "pixel shuffle as an element-wise operator": (aten.pixel_shuffle.default, _first_operand),
    "GLU as an element-wise operator": (aten.glu.default, _first_operand),
    "cat as an element-wise operator": (aten.cat.default, _first_operand),
    "cat in the wrong order": (aten.cat.default, _swapped_cat),
    "roll as an element-wise operator": (aten.roll.default, _first_operand),
    "flip as an element-wise operator": (aten.flip.default, _first_operand),
    "cumsum as an element-wise operator": (aten.cumsum.default, _first_operand),
    "channel shuffle as an element-wise operator": (aten.channel_shuffle.default, _first_operand),
    "linear that forgets its input": (aten.linear.default, _linear_without_input),
    "linear that forgets its bias": (aten.linear.default, _linear_without_bias),
    "sort as an element-wise operator": (aten.argsort.default, _first_operand),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught_by_the_permutations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, infer = WRONG[name]
    monkeypatch.setitem(RULES, target, Rule(target, infer, RULES[target].literals))
    assert any(_caught(s, "everywhere changes") for s in SAMPLES if target in s.targets)


def _caught(case: Sample, words: str) -> bool:
    model, inputs = case.build(), case.inputs(9)
    analysis, groups = checks.analysed(model, inputs)
    try:
        checks.check_permutation(analysis, groups, inputs, seed=0)
        checks.check_members(analysis, groups, inputs, seed=0)
    except AssertionError as error:
        return words in str(error)
    return False


@pytest.mark.parametrize("name", ["roll as an element-wise operator", "flip as an element-wise operator"])
def test_a_wrong_rule_is_caught_by_the_proof(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes fit all the same, but not the values."""
    target, infer = WRONG[name]
    monkeypatch.setitem(RULES, target, Rule(target, infer))
    case = next(s for s in SAMPLES if target in s.targets and s.groups == ())
    model = case.build()
    analysis, groups = checks.analysed(model, case.inputs(9))
    assert groups
    with pytest.raises(ProofError, match="first node that differs"):
        checks.check_emitted(model, analysis, checks.random_kept(groups, seed=0), case.inputs(4))


def test_a_group_that_is_too_large_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = sample(
        aten.linear.default,
        lambda net, x: net.linear(net.linear(net.linear(x, 6).sin(), 6).cos(), 3),
        groups=[6, 6],
    )
    check(case)
    monkeypatch.setitem(RULES, aten.linear.default, Rule(aten.linear.default, _everything_one))
    assert _caught(case, "need not hold it")


def test_an_operator_without_a_rule_keeps_all_it_touches_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(s for s in SAMPLES if aten.glu.default in s.targets)
    monkeypatch.delitem(RULES, aten.glu.default)
    analysis, groups = checks.analysed(case.build(), case.inputs(9))
    assert not groups and list(analysis.unknown) == [aten.glu.default]


def test_derangements_move_every_index() -> None:
    for size in range(2, 12):
        order = checks.derangement(size, seed=0)
        assert sorted(order) == list(range(size)) and (order != np.arange(size)).all()


def test_samples_are_the_same_each_time() -> None:
    for s in SAMPLES[:5]:
        first, second = s.build().state_dict(), s.build().state_dict()
        assert all(torch.equal(first[k], second[k]) for k in first)
