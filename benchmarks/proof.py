"""How soon the proof of a version notices what (`actors/proof.py`): a table of step size × noise × damage.

A small model with a LoRA adapter that moves by a given number of nats a token and version, root mean square over the
probe; its tensors damaged module by module; the noise of half precision simulated on the engine's log-probs. Exact: the
version at which digests notice. Log-probs: the version at which they alone would, the last of several draws of noise.

    .venv/bin/python benchmarks/proof.py
"""

import argparse
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from actors.learning.policy import probe_logps
from actors.proof import TOLERANCE, prove
from plumbline.errors import SyncError
from plumbline.models.digest import adapter_digests, lora_scalings
from plumbline.records import PolicyRef, Publication, TokenGroup

RESPONSES, TOKENS, VERSIONS = 64, 16, 8
Adapter = dict[str, Tensor]
Damage = Callable[[Adapter, Adapter, Adapter], Adapter]
"""``(this version, the one before, another policy's) -> what the engine answers from``."""


def part(name: str, replacement: Callable[[Tensor, Tensor], Tensor]) -> Damage:
    """The tensors of one module, or of all of a kind, replaced by `replacement` of them and the older ones."""
    return lambda now, before, _: {n: replacement(t, before[n]) if name in n else t for n, t in now.items()}


def _zero(now: Tensor, _: Tensor) -> Tensor:
    return torch.zeros_like(now)


def _old(_: Tensor, before: Tensor) -> Tensor:
    return before


IN_SLOTS: dict[str, Damage] = {
    "q_proj missing": part("q_proj", _zero),
    "k_proj missing": part("k_proj", _zero),
    "v_proj missing": part("v_proj", _zero),
    "o_proj missing": part("o_proj", _zero),
    "gate_proj missing": part("gate_proj", _zero),
    "up_proj missing": part("up_proj", _zero),
    "down_proj missing": part("down_proj", _zero),
    "q_proj of one layer missing": part("layers.1.self_attn.q_proj", _zero),
    "q_proj stale": part("q_proj", _old),
    "up_proj of one layer stale": part("layers.0.mlp.up_proj", _old),
}
"""Damages of tensors, which digests and log-probs may notice."""
BEYOND: dict[str, Damage] = {
    "stuck at the base": lambda now, _before, _other: {n: torch.zeros_like(t) for n, t in now.items()},
    "stuck at the version before": lambda _now, before, _other: before,
    "another policy's slot": lambda _now, _before, other: other,
}
"""Tensors are right, and others answer: log-probs alone notice."""


@dataclass(frozen=True)
class Policy:
    """An adapter's versions by number; version 0 is the base."""

    model: Any
    probe: list[TokenGroup]
    versions: list[Adapter]

    def logps(self, adapter: Adapter) -> list[float]:
        """[RESPONSES], means over tokens."""
        put(self.model, adapter)
        return probe_logps(self.model, self.probe, 1 << 20)


def put(model: Any, adapter: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in adapter:
                parameter.copy_(adapter[name])


def make_policy(seed: int) -> Policy:
    """A base, a probe, and the way that a step of training on other texts goes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, max_position_embeddings=128,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    draws = random.Random(1)
    groups = [
        TokenGroup([draws.randrange(256) for _ in range(12)], [[draws.randrange(256) for _ in range(TOKENS)]])
        for _ in range(RESPONSES)
    ]
    torch.manual_seed(seed)
    ids = torch.randint(0, 256, (8, 32))
    for _ in range(2):  # B is zero at first: A moves from the second step on
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad / (p.grad.norm() + 1e-9)
                    p.grad = None
    return Policy(model, groups, [{n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}])


def with_steps(policy: Policy, step: float) -> Policy:
    """Versions that each move the probe by `step` nats a token, root mean square: B grows."""
    way = policy.versions[0]
    base = policy.logps(scaled(way, 0.0))

    def moved(size: float) -> float:
        now = policy.logps(scaled(way, size))
        return (sum((a - b) ** 2 for a, b in zip(now, base, strict=True)) / len(base)) ** 0.5

    versions = [scaled(way, 0.0)]
    size = 1.0
    for version in range(1, VERSIONS + 1):
        for _ in range(12):  # the way is nearly straight
            size *= version * step / moved(size)
        versions.append(scaled(way, size))
    return replace(policy, versions=versions)


def scaled(adapter: Adapter, size: float) -> Adapter:
    return {name: t * size if "lora_B" in name else t for name, t in adapter.items()}


def digests_of(policy: Policy, adapter: Adapter) -> dict[str, str]:
    """By module, as an engine holds them."""
    modules = {}
    for name, scaling in lora_scalings(policy.model, "default").items():
        a, b = (adapter[f"base_model.model.{name}.{m}.default.weight"] for m in ("lora_A", "lora_B"))
        modules[name] = (a, b, scaling)
    return adapter_digests(modules, torch.float32)["bfloat16"]


class Engine:
    """What a damaged engine shows of every version, with the noise of half precision.

    Args:
        noise: of a token, in nats; a response's mean has that of `TOKENS` of them.
    """

    def __init__(self, policy: Policy, other: Policy, damage: Damage, noise: float, seed: int) -> None:
        self._draws = random.Random(seed)
        self._noise = noise / TOKENS**0.5
        self._policy = policy
        self._offset = [self._draws.gauss(0, self._noise) for _ in range(RESPONSES)]
        self._holds = [policy.versions[0]] + [
            damage(policy.versions[v], policy.versions[v - 1], other.versions[v]) for v in range(1, VERSIONS + 1)
        ]
        self._true = [policy.logps(adapter) for adapter in self._holds]
        self.base_measured = self.measured(0)

    def measured(self, version: int) -> list[float]:
        true = zip(self._true[version], self._offset, strict=True)
        return [logp + offset + self._draws.gauss(0, self._noise) for logp, offset in true]

    def redraw(self, seed: int) -> None:
        self._draws = random.Random(seed)
        self._offset = [self._draws.gauss(0, self._noise) for _ in range(RESPONSES)]
        self.base_measured = self.measured(0)


def noticed_by_digests(policy: Policy, engine: Engine) -> int | None:
    """The first version whose tensors are not the learner's."""
    numbers = range(1, VERSIONS + 1)
    held = {v: digests_of(policy, engine._holds[v]) for v in numbers}
    return next((v for v in numbers if held[v] != digests_of(policy, policy.versions[v])), None)


def noticed_by_logps(expected: list[list[float]], engine: Engine, draws: int) -> int | None:
    """The version at which the log-probs alone notice; the last of several draws, None where one of them did not."""
    return worst([_first_refused(expected, engine, seed) for seed in range(draws)])


def worst(found: list[int | None]) -> int | None:
    numbers = [v for v in found if v is not None]
    return max(numbers) if len(numbers) == len(found) else None


def _first_refused(expected: list[list[float]], engine: Engine, seed: int) -> int | None:
    engine.redraw(seed)
    for version in range(1, VERSIONS + 1):
        publication = Publication(
            ref=PolicyRef(policy="ple", version=version),
            files={},
            probe_logps=expected[version],
            previous_probe_logps=expected[version - 1],
            base_probe_logps=expected[0],
        )
        try:
            prove(
                publication,
                engine="engine",
                measured=engine.measured(version),
                base_measured=engine.base_measured,
                tolerance=TOLERANCE["bfloat16"],
            )
        except SyncError:
            return version
    return None


def rows(steps: list[float], noises: list[float], draws: int) -> list[dict[str, Any]]:
    """One a step size, noise and damage."""
    table = []
    one, two = make_policy(2), make_policy(3)
    for step in steps:
        policy, other = with_steps(one, step), with_steps(two, step)
        expected = [policy.logps(adapter) for adapter in policy.versions]
        for name, damage in {**IN_SLOTS, **BEYOND}.items():
            engine = Engine(policy, other, damage, noises[0], 0)
            exact = noticed_by_digests(policy, engine) if name in IN_SLOTS else None
            for noise in noises:
                engine._noise = noise / TOKENS**0.5
                by_logps = noticed_by_logps(expected, engine, draws)
                table.append({"step": step, "noise": noise, "damage": name, "exact": exact, "log-probs": by_logps})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--noises", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    print(f"{RESPONSES} responses of {TOKENS} tokens, {args.draws} draws of the noise; - : not in {VERSIONS} versions")
    print(f"{'nats a step':>11} {'noise':>6}  {'damage':30} {'exact':>6} {'log-probs':>10}")
    for row in rows(args.steps, args.noises, args.draws):
        print(
            f"{row['step']:>11} {row['noise']:>6}  {row['damage']:30} "
            f"{row['exact'] or '-':>6} {row['log-probs'] or '-':>10}"
        )


if __name__ == "__main__":
    main()
