"""AMC: an agent learns, episode by episode, what share each group keeps, from what the pruned models lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxprune.axes import Axis
from fxprune.backends.torch import num_threads
from fxprune.costs import Costs
from fxprune.groups import KINDS, Group
from fxprune.passes.allocate.knapsack import fill, losses
from fxprune.passes.allocate.ladder import climb, widths
from fxprune.passes.registries import ALLOCATORS, Budget, needs_error
from fxprune.passes.statistics import Scores

Floats = npt.NDArray[np.float64]

#: Hidden units of both networks, twice (300 in the paper); learning rates of actor and critic; the step of the targets;
#: a minibatch.
_HIDDEN, _ACTOR, _CRITIC, _SOFT, _BATCH = 128, 1e-4, 1e-3, 0.01, 64
#: Transitions that are remembered.
_REPLAY = 2000
#: Standard deviation of the exploration noise, and the weight of the newest reward in the baseline.
_NOISE, _BASELINE = 0.5, 0.05
#: No error counts for more.
_WORST = 10.0


@dataclass(slots=True)
class Walk:
    """The groups one after another: what the agent sees, and which widths leave the budget within reach.

    Attributes:
        options: group name -> its widths.
        features: of each group, (units, inner, members, kind..., share of the dense cost), in 0..1.
        dense: the cost of the whole model.
        allowed: the most that may be kept.
    """

    groups: Sequence[Group]
    costs: Costs
    kind: str
    options: Mapping[str, list[int]]
    dense: float
    allowed: float
    features: Floats = field(init=False)

    def __post_init__(self) -> None:
        lowest = [-self.costs.change(self.kind, {g.axis: self.options[g.name][0]}, {}) for g in self.groups]
        rows = [
            [float(g.size), float(g.inner), float(len(g.members)), *(float(g.kind == k) for k in KINDS), float(share)]
            for g, share in zip(self.groups, lowest, strict=True)
        ]
        table = np.array(rows)
        self.features = table / np.maximum(np.abs(table).max(0, keepdims=True), 1e-12)

    def begin(self) -> dict[Axis, int]:
        """Return the widest model that is certain to fit: every group at its floor."""
        return {g.axis: self.options[g.name][0] for g in self.groups}

    def widest(self, number: int, kept: Mapping[Axis, int]) -> int:
        """Return the place of the widest option of a group that fits while all later groups are at their floor.

        He et al. (2018), algorithm 1, with the true cost of any kind in the place of a sum over layers.
        """
        group = self.groups[number]
        options = self.options[group.name]
        spent = self.costs.of(self.kind, kept)
        low, high = 0, len(options) - 1
        while low < high:
            middle = (low + high + 1) // 2
            grown = self.costs.change(self.kind, {group.axis: options[middle]}, kept)
            low, high = (middle, high) if spent + grown <= self.allowed else (low, middle - 1)
        return low

    def state(self, number: int, whole: Mapping[Axis, int], last: float) -> Floats:
        """Return what the agent sees before a group's turn, (features,) in 0..1: equation 1 of the paper.

        Args:
            whole: the widths of the groups that had their turn; the others are whole.
            last: the previous action.
        """
        reduced = 1 - self.costs.of(self.kind, whole) / self.dense
        rest = self.features[number + 1 :, -1].sum() / max(self.features[:, -1].sum(), 1e-12)
        place = number / max(len(self.groups) - 1, 1)
        return np.array([place, *self.features[number], reduced, rest, last])


class Agent:
    """Deep deterministic policy gradients (Lillicrap et al., 2016) for one action in 0..1, with a rewards' baseline."""

    def __init__(self, features: int, generator: np.random.Generator) -> None:
        self._generator = generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator.integers(2**31)))
            self.actor, self.actor_target = _network(features), _network(features)
            self.critic, self.critic_target = _network(features + 1), _network(features + 1)
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self._optimizers = (
            torch.optim.Adam(self.actor.parameters(), _ACTOR),
            torch.optim.Adam(self.critic.parameters(), _CRITIC),
        )
        self._memory: list[tuple[Floats, float, float, Floats, float]] = []
        self._baseline: float | None = None

    def act(self, state: Floats, noise: float) -> float:
        """Return an action: the actor's, with noise from a normal distribution that is cut off at 0 and 1."""
        with torch.no_grad():
            mean = float(torch.sigmoid(self.actor(torch.from_numpy(state).float()))[0])
        if noise <= 0:
            return mean
        for _ in range(100):
            drawn = float(self._generator.normal(mean, noise))
            if 0 <= drawn <= 1:
                return drawn
        return mean

    def remember(self, states: Sequence[Floats], actions: Sequence[float], reward: float) -> None:
        """Keep an episode: each of its steps has the reward of its end."""
        self._baseline = reward if self._baseline is None else (1 - _BASELINE) * self._baseline + _BASELINE * reward
        for i, (state, action) in enumerate(zip(states, actions, strict=True)):
            end = i + 1 == len(states)
            self._memory.append((state, action, reward, state if end else states[i + 1], 0.0 if end else 1.0))
        del self._memory[:-_REPLAY]

    def learn(self) -> None:
        """Improve both networks on one minibatch: equations 3 and 4 of the paper, with no discount."""
        picked = self._generator.integers(len(self._memory), size=_BATCH)
        columns = zip(*(self._memory[i] for i in picked), strict=True)
        states, actions, rewards, following, goes_on = (torch.from_numpy(np.array(c)).float() for c in columns)
        assert self._baseline is not None
        with torch.no_grad():
            later = self._value(self.critic_target, following, torch.sigmoid(self.actor_target(following))[:, 0])
            goal = rewards - self._baseline + goes_on * later
        for optimizer, loss in (
            (self._optimizers[1], lambda: (self._value(self.critic, states, actions) - goal).square().mean()),
            (
                self._optimizers[0],
                lambda: -self._value(self.critic, states, torch.sigmoid(self.actor(states))[:, 0]).mean(),
            ),
        ):
            optimizer.zero_grad(set_to_none=True)
            loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            for target, network in ((self.actor_target, self.actor), (self.critic_target, self.critic)):
                for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
                    slow.lerp_(fast, _SOFT)

    @staticmethod
    def _value(critic: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
        value: Tensor = critic(torch.cat([states, actions[:, None]], 1))[:, 0]
        return value


def _network(features: int) -> nn.Module:
    layers = (nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
    return nn.Sequential(*layers)


@ALLOCATORS.register("amc")
def amc(
    groups: list[Group],
    scores: Mapping[str, Scores],
    costs: Costs,
    budget: Budget,
    *,
    episodes: int = 300,
    warmup: int = 60,
    decay: float = 0.97,
) -> dict[str, int]:
    """The best widths that an agent finds which chooses them group by group and is rewarded for small errors.

    He et al., "AMC: AutoML for Model Compression" (2018): actions are shares of the units, bounded so that the budget
    stays within reach; the reward is minus the error of the model on calibration data. What an episode leaves of the
    budget is spent on the steps with the highest scores for their cost, so that models of equal cost are compared.

    Args:
        episodes: models that are put together and tried.
        warmup: so many of them, at most half, with constant noise; then the agent learns and the noise decays.
        decay: of the noise, in each episode after these.
    """
    error = needs_error("amc", budget)
    options = {g.name: widths([g], budget) for g in groups}
    lowest = {g.axis: options[g.name][0] for g in groups}
    climb(lowest, [], costs, budget)  # raises where even these cost too much
    if not groups:
        return {}
    dense = float(costs.of(budget.kind, {}))
    walk = Walk(groups, costs, budget.kind, options, dense, budget.share * dense)
    lost = {g.name: losses(g, scores[g.name], options[g.name]) for g in groups}
    generator = np.random.default_rng(budget.seed)
    agent: Agent | None = None
    known: dict[tuple[int, ...], float] = {}
    warmup = min(warmup, episodes // 2)
    best: dict[str, int] = {g.name: options[g.name][0] for g in groups}
    least = np.inf
    with torch.enable_grad(), torch.inference_mode(False):
        for episode in range(max(episodes, 1)):
            noise = _NOISE * decay ** max(episode - warmup, 0)
            kept, whole, action = walk.begin(), dict[Axis, int](), 1.0
            states: list[Floats] = []
            actions: list[float] = []
            for number, group in enumerate(groups):
                state = walk.state(number, whole, action)
                agent = agent or Agent(len(state), generator)
                counts = options[group.name]
                wanted = agent.act(state, noise) * counts[-1]
                place = min(range(len(counts)), key=lambda i, c=counts, w=wanted: abs(c[i] - w))  # type: ignore[misc]
                kept[group.axis] = whole[group.axis] = counts[min(place, walk.widest(number, kept))]
                action = kept[group.axis] / counts[-1]  # as it was carried out
                states.append(state)
                actions.append(action)
            fill(groups, options, lost, costs, budget, kept, walk.allowed)
            made = {g.name: kept[g.axis] for g in groups}
            key = tuple(made.values())
            if key not in known:
                known[key] = error(made)
            if known[key] < least:
                least, best = known[key], made
            assert agent is not None
            agent.remember(states, actions, -min(known[key], _WORST))
            if episode >= warmup:
                with num_threads(1):  # networks this small are slower on several, on a busy machine twenty times
                    for _ in groups:
                        agent.learn()
    return best
