"""A real vLLM engine: parity with transformers, base and adapters side by side, and the proof against sabotage."""

import asyncio
import itertools
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.engines.seam import Adapter
from actors.engines.start import start_engine
from actors.generator import Generator
from actors.learning.policy import LearnedPolicy
from actors.versions import AdapterVersions, WholeVersions
from plumbline.config.data import Model
from plumbline.config.pipelines import Ple
from plumbline.data.dataset import read_prompts
from plumbline.data.ending import encode_response
from plumbline.data.prompting import render
from plumbline.data.tokenizer import load_tokenizer
from plumbline.errors import SyncError
from plumbline.records import GenerateRequest, PolicyRef, Publication, Sampling, SharedWeights, TokenGroup
from plumbline.runs.policies import read_publication, version_directory
from tests.tiny import engine_spec, make_prompts, make_tiny_model

pytest.importorskip("vllm")
FLOAT32_PARITY = 1e-4
MODULES = 14
"""Linear layers that an adapter changes: seven in each of two layers."""


class World:
    """One vLLM engine, one transformers engine, and three versions of a policy; started once for this file."""

    def __init__(self, root: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.ids = itertools.count(1)
        self.root = root
        model = make_tiny_model(root / "model")
        self.tokenizer = load_tokenizer(str(model))
        prompts = read_prompts(str(make_prompts(root / "prompts.jsonl", 12)))
        self.probe = [
            TokenGroup(render(self.tokenizer, p.messages), [encode_response(self.tokenizer, p.target or "")])
            for p in prompts
        ]
        self.spec = engine_spec(model)
        self.publications = self._publish(model, versions=3)
        self.vllm = self.loop.run_until_complete(self._start("vllm"))
        self.oracle = self.loop.run_until_complete(self._start("transformers"))

    async def _start(self, kind: Any) -> Any:
        return start_engine(kind, self.spec)

    def _publish(self, model: Path, versions: int) -> dict[int, Publication]:
        """Versions whose weights were moved by hand, each published as a learner does."""
        policy = LearnedPolicy(Ple(type="ple"), Model.model_validate({"path": str(model)}), "float32", "cpu", 0)
        base = previous = policy.probe(self.probe)
        found = {}
        for number in range(1, versions + 1):
            torch.manual_seed(number)
            with torch.no_grad():
                for parameter in policy.trainable:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            ref = PolicyRef(policy="ple", version=number)
            now = policy.probe(self.probe)
            publication = Publication(
                ref=ref, files={}, probe_logps=now, previous_probe_logps=previous, base_probe_logps=base
            )
            policy.save(version_directory(self.root, ref), publication, adapter=True)
            found[number] = read_publication(self.root, ref)
            previous = now
        return found

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def generator(self, engine: Any) -> Generator:
        """A generator over an engine that is already running."""

        async def fetch(ref: PolicyRef, digest: str) -> Publication:
            return self.publications[ref.version]

        generator = Generator("generator-0", "vllm", self.spec, self.probe, 1e-3, fetch, keep=3)
        self.run(generator._adopt(engine))
        adapters_of(generator).ids = self.ids  # an engine has one generator in its life; here it has several
        return generator

    def adapter(self, number: int, id: int) -> Adapter:
        path = version_directory(self.root, PolicyRef(policy="ple", version=number))
        return Adapter(id=id, name=f"direct-{id}", path=str(path))


def adapters_of(generator: Generator) -> AdapterVersions:
    assert isinstance(generator._versions, AdapterVersions)
    return generator._versions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    one = World(tmp_path_factory.mktemp("engines"))
    yield one
    one.run(one.vllm.close())


def test_log_probs_match_transformers_for_base_and_adapter(world: World) -> None:
    adapter = world.adapter(1, id=901)
    world.run(world.vllm.add_adapter(adapter))
    world.run(world.oracle.add_adapter(adapter))
    moved = 0.0
    for group in world.probe[:4]:
        by_adapter = []
        for which in (None, adapter):
            [response] = group.response_ids
            ours = world.run(world.vllm.logprobs(group.prompt_ids, response, adapter=which))
            theirs = world.run(world.oracle.logprobs(group.prompt_ids, response, adapter=which))
            assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < FLOAT32_PARITY
            by_adapter.append(ours)
        moved = max(moved, *(abs(a - b) for a, b in zip(*by_adapter, strict=True)))
    assert moved > 0.01, "the adapter changes nothing: parity with it shows nothing"


def test_an_adapter_on_some_layers_scaled_by_the_root_of_its_rank(world: World) -> None:
    """In an engine that was told of these layers alone; q and v lie in one weight with k there."""
    policy = {"type": "lora", "r": 16, "rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    learned = LearnedPolicy(
        Ple.model_validate({"type": "ple", "policy": policy}), Model(path=world.spec.model_path), "float32", "cpu", 0
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learned.trainable:
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    probe = world.probe[:4]
    expected = learned.probe(probe)
    ref = PolicyRef(policy="ple", version=99)
    publication = Publication(
        ref=ref, files={}, probe_logps=expected, previous_probe_logps=expected, base_probe_logps=expected
    )
    learned.save(version_directory(world.root, ref), publication, adapter=True)

    async def measure() -> list[list[float]]:
        targets = ("q_proj", "up_proj", "v_proj")
        spec = replace(world.spec, lora_targets=targets, max_lora_rank=16, max_adapters=1, kv_cache_gib=0.1)
        engine = start_engine("vllm", spec)
        try:
            adapter = world.adapter(99, id=1)
            await engine.add_adapter(adapter)
            scored = [
                [await engine.logprobs(g.prompt_ids, g.response_ids[0], adapter=which) for g in probe]
                for which in (adapter, None)
            ]
            return [[sum(one) / len(one) for one in each] for each in scored]
        finally:
            await engine.close()

    measured, base = world.run(measure())
    assert measured == pytest.approx(expected, abs=FLOAT32_PARITY)
    assert max(abs(a - b) for a, b in zip(measured, base, strict=True)) > 0.05, "the adapter changes nothing"


def test_the_base_is_left_alone_beside_as_many_adapters_as_there_are_slots(world: World) -> None:
    """On vLLM's CPU backend a base request takes the last slot's adapter, if nothing keeps it from that."""
    adapters = [world.adapter(1 + i % 3, id=950 + i) for i in range(world.spec.max_adapters)]
    for adapter in adapters:
        world.run(world.vllm.add_adapter(adapter))
    group = world.probe[0]
    [response] = group.response_ids

    async def ask(which: Adapter | None) -> list[float]:
        return await world.vllm.logprobs(group.prompt_ids, response, adapter=which)

    async def all_at_once() -> list[list[float]]:
        return await asyncio.gather(*(ask(which) for which in (None, *adapters, None)))

    alone = world.run(ask(None))
    first, *others, last = world.run(all_at_once())
    for beside in (first, last):
        assert max(abs(a - b) for a, b in zip(beside, alone, strict=True)) < FLOAT32_PARITY
    assert all(max(abs(a - b) for a, b in zip(one, alone, strict=True)) > 0.01 for one in others)
    for adapter in adapters:
        world.run(world.vllm.remove_adapter(adapter))


def test_seeded_samples_repeat_exactly_also_beside_others(world: World) -> None:
    sampling = Sampling(max_tokens=24)
    group = world.probe[0]

    async def ask(seed: int, n: int) -> list[Any]:
        return await world.vllm.generate(group.prompt_ids, sampling, seed=seed, n=n, adapter=None)

    async def crowd() -> list[list[Any]]:
        return await asyncio.gather(*(ask(seed, 2) for seed in range(16)))

    alone = world.run(ask(3, 2))
    together = world.run(crowd())
    assert [c.ids for c in together[3]] == [c.ids for c in alone]
    assert world.run(ask(4, 1))[0].ids == alone[1].ids, "sample i is drawn with seed + i"
    assert len({tuple(c.ids) for answer in together for c in answer}) > 16


def test_finish_reason_says_who_ended_an_answer(world: World) -> None:
    eos = world.tokenizer.eos_token_id
    group = world.probe[1]
    found = set()
    for engine in (world.vllm, world.oracle):
        for limit in (1, 120):
            for c in world.run(
                engine.generate(group.prompt_ids, Sampling(max_tokens=limit), seed=5, n=8, adapter=None)
            ):
                assert (c.finish_reason == "stop") == (c.ids[-1] == eos)
                assert len(c.ids) <= limit
                assert world.tokenizer.eos_token not in c.text
                found.add(c.finish_reason)
    assert "length" in found


def test_base_and_versions_answer_side_by_side(world: World) -> None:
    generator = world.generator(world.vllm)
    refs = [PolicyRef(), PolicyRef(policy="ple", version=1), PolicyRef(policy="ple", version=2)]
    requests = [
        GenerateRequest(
            key=str(i),
            prompt_ids=world.probe[i % 4].prompt_ids,
            ref=refs[i % 3],
            sampling=Sampling(max_tokens=16),
            seed=i,
        )
        for i in range(12)
    ]
    answers = world.run(generator.generate(requests))
    assert [a.key for a in answers] == [r.key for r in requests]
    assert [a.ref for a in answers] == [r.ref for r in requests]
    assert {a.engine for a in answers} == {"generator-0"}


def test_versions_are_proved_and_old_ones_forgotten(world: World) -> None:
    generator = world.generator(world.vllm)
    for number in (1, 2, 3):
        proof = world.run(generator.load(PolicyRef(policy="ple", version=number)))
        assert proof.difference < FLOAT32_PARITY
        assert proof.drift == pytest.approx(1, abs=0.01)
        assert proof.exact == MODULES
    held = adapters_of(generator)
    held._keep = 1
    world.run(held.forget(PolicyRef(policy="ple", version=3)))
    assert set(held.adapters) == {PolicyRef(policy="ple", version=3)}


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_both_engines_hold_what_the_learner_says(world: World, kind: str) -> None:
    engine = world.vllm if kind == "vllm" else world.oracle
    world.run(engine.add_adapter(adapter := world.adapter(2, id=930)))
    expected = world.publications[2].digests["float32"]
    assert world.run(engine.digests(list(expected), adapter=adapter)) == [expected]
    assert len(expected) == MODULES
    world.run(engine.remove_adapter(adapter))


class Damaging:
    """A real engine whose copy of an adapter's tensors is damaged before it is loaded."""

    kind = "vllm"

    def __init__(self, engine: Any, damage: Any) -> None:
        self._engine, self._damage = engine, damage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def add_adapter(self, adapter: Adapter) -> None:
        path = Path(adapter.path) / "adapter_model.safetensors"
        save_file(self._damage(load_file(path)), path)
        await self._engine.add_adapter(adapter)


def without(part: str) -> Any:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def stale(world: World, part: str) -> Any:
    """The tensors of `part` as they were in version 1."""
    old = load_file(version_directory(world.root, ple(1)) / "adapter_model.safetensors")
    return lambda tensors: {name: old[name] if part in name else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("part", "count"),
    [("q_proj", 2), ("k_proj", 2), ("layers.1.self_attn.v_proj", 1), ("layers.0.mlp.down_proj", 1), ("gate_proj", 2)],
)
@pytest.mark.parametrize("damage", ["missing", "stale", "negative"])
def test_every_damaged_tensor_is_named_at_once(world: World, part: str, count: int, damage: str) -> None:
    damages: dict[str, Any] = {
        "missing": without(part),
        "stale": stale(world, f"{part}.lora_A"),
        "negative": lambda tensors: {n: -t if f"{part}.lora_B" in n else t for n, t in tensors.items()},
    }
    generator = world.generator(world.vllm)
    damaging: Any = Damaging(world.vllm, damages[damage])
    adapters_of(generator)._engine = damaging
    with pytest.raises(SyncError, match=f"{count} of {MODULES} tensors in it are not the learner's") as caught:
        world.run(generator.load(ple(2)))
    assert part in caught.value.reason


class Sabotaged:
    """A real engine that has the adapter that it was told to load, and answers from another."""

    kind = "vllm"

    def __init__(self, engine: Any, instead: Any) -> None:
        self._engine, self._instead = engine, instead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def add_adapter(self, adapter: Adapter) -> None:
        await self._engine.add_adapter(adapter)

    async def logprobs(self, prompt_ids: Any, response_ids: Any, *, adapter: Adapter | None) -> list[float]:
        return await self._engine.logprobs(prompt_ids, response_ids, adapter=adapter and self._instead(adapter))

    async def digests(self, names: Any, *, adapter: Adapter | None) -> Any:
        return await self._engine.digests(names, adapter=adapter)


def sabotaged_load(world: World, instead: Any, version: int = 2) -> SyncError:
    honest = world.generator(world.vllm)
    world.run(honest.load(ple(version - 1)))
    sabotaged: Any = Sabotaged(world.vllm, instead)
    adapters_of(honest)._engine = adapters_of(honest)._prober._engine = sabotaged
    with pytest.raises(SyncError) as caught:
        world.run(honest.load(PolicyRef(policy="ple", version=version)))
    error = caught.value
    assert (error.policy, error.version, error.engine) == ("ple", version, "generator-0")
    assert "ple v000002" in str(error) and "generator-0" in str(error)
    assert error.difference > 0
    return error


def test_a_generator_that_keeps_the_old_adapter_is_caught(world: World) -> None:
    old = world.adapter(1, id=911)
    error = sabotaged_load(world, lambda _: old)
    assert "still answers as ple@1" in str(error)


def test_a_generator_that_loads_a_wrong_adapter_is_caught(world: World) -> None:
    wrong = world.adapter(3, id=912)
    sabotaged_load(world, lambda _: wrong)


def test_a_generator_that_loads_a_no_op_is_caught(world: World) -> None:
    sabotaged_load(world, lambda _: None)


def test_a_small_step_is_told_from_none(world: World) -> None:
    """A step far below the tolerance in value: only the drift tells that the engine kept the old version."""
    source = version_directory(world.root, PolicyRef(policy="ple", version=1))
    nudged = world.root / "nudged"
    shutil.copytree(source, nudged, dirs_exist_ok=True)
    weights = load_file(nudged / "adapter_model.safetensors")
    save_file({k: v * 1.001 for k, v in weights.items()}, nudged / "adapter_model.safetensors")
    world.run(world.oracle.add_adapter(Adapter(id=77, name="nudged", path=str(nudged))))

    async def probe_of(adapter: Adapter) -> list[float]:
        scored = [await world.oracle.logprobs(g.prompt_ids, g.response_ids[0], adapter=adapter) for g in world.probe]
        return [sum(s) / len(s) for s in scored]

    small = replace(
        world.publications[2],
        digests={},  # of other tensors: the log-probs alone must tell
        probe_logps=world.run(probe_of(Adapter(id=77, name="nudged", path=str(nudged)))),
        files={f.name: f.read_bytes() for f in nudged.iterdir() if f.name != "proof.json"},
    )
    step = max(abs(a - b) for a, b in zip(small.probe_logps, small.previous_probe_logps, strict=True))
    assert 1e-5 < step < 1e-3
    kept, world.publications[2] = world.publications[2], small
    try:
        assert "still answers as ple@1" in str(sabotaged_load(world, lambda _: world.adapter(1, id=913)))
        generator = world.generator(world.vllm)
        world.run(generator.load(PolicyRef(policy="ple", version=1)))
        assert world.run(generator.load(PolicyRef(policy="ple", version=2))).drift == pytest.approx(1, abs=0.2)
    finally:
        world.publications[2] = kept


# Whole weights


class WholeWorld:
    """One vLLM engine for whole weights, its oracle, and three versions of all weights."""

    def __init__(self, root: Path, tied: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.loop = asyncio.new_event_loop()
        self.root, self.tied = root, tied
        self.base = make_tiny_model(root / "model")
        if tied:
            config = LlamaConfig.from_pretrained(self.base)
            config.tie_word_embeddings = True
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(self.base)
        self.probe = [TokenGroup(list(range(30 + i, 50 + i)), [list(range(60 + i, 66 + i))]) for i in range(8)]
        self.spec = engine_spec(self.base, max_num_seqs=16, max_adapters=0, kv_cache_gib=0.1)
        self.publications = self._publish()
        self.vllm = self.run(self._start("vllm"))
        self.oracle = self.run(self._start("transformers"))

    async def _start(self, kind: Any) -> Any:
        return start_engine(kind, self.spec)

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def _publish(self) -> dict[int, Publication]:
        section = Ple.model_validate({"type": "ple", "policy": {"type": "full"}})
        policy = LearnedPolicy(section, Model.model_validate({"path": str(self.base)}), "float32", "cpu", 0)
        base = previous = policy.probe(self.probe)
        found = {}
        for number in (1, 2, 3):
            torch.manual_seed(number)
            with torch.no_grad():
                for parameter in policy.trainable:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
            now = policy.probe(self.probe)
            publication = Publication(
                ref=ple(number), files={}, probe_logps=now, previous_probe_logps=previous, base_probe_logps=base
            )
            policy.save(version_directory(self.root, ple(number)), publication, adapter=False)
            found[number] = read_publication(self.root, ple(number))
            previous = now
        return found

    def generator(self) -> Generator:
        """A generator over the engine, at its base."""

        async def fetch(ref: PolicyRef, digest: str) -> Publication:
            return self.publications[ref.version]

        generator = Generator("generator-0", "vllm", self.spec, self.probe, 1e-3, fetch, keep=1)
        self.run(self.vllm.load_weights(str(self.base)))
        self.run(generator._adopt(self.vllm))
        return generator

    def assert_parity(self, version: int) -> None:
        """Log-probs, and a greedy answer to a prompt long enough to be in the prefix cache, are transformers'."""
        path = version_directory(self.root, ple(version)) if version else self.base
        self.run(self.oracle.load_weights(str(path)))
        [response] = self.probe[0].response_ids
        ours, theirs = (
            self.run(engine.logprobs(self.probe[0].prompt_ids, response, adapter=None))
            for engine in (self.vllm, self.oracle)
        )
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < FLOAT32_PARITY
        prompt = [30 + (7 * i) % 200 for i in range(160)]
        greedy = Sampling(max_tokens=16, temperature=0.0)
        answers = [
            self.run(engine.generate(prompt, greedy, seed=0, n=1, adapter=None))[0].ids
            for engine in (self.vllm, self.oracle)
        ]
        assert answers[0] == answers[1]


def ple(version: int) -> PolicyRef:
    return PolicyRef(policy="ple", version=version)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeWorld]:
    one = WholeWorld(tmp_path_factory.mktemp("whole"), request.param)
    yield one
    one.run(one.vllm.close())


def test_whole_weights_arrive_and_are_proved(whole: WholeWorld) -> None:
    generator = whole.generator()
    whole.assert_parity(0)
    for version in (1, 2, 3):
        proof = whole.run(generator.load(ple(version)))
        assert proof.difference < FLOAT32_PARITY
        assert proof.drift == pytest.approx(1, abs=0.01)
        assert proof.exact == len(whole.publications[version].digests["float32"]) > 15
        whole.assert_parity(version)
    ask = GenerateRequest(key="a", prompt_ids=[40, 41], ref=ple(0), sampling=Sampling(max_tokens=4), seed=0)
    [answer] = whole.run(generator.generate([ask]))
    assert answer.ref.version == 0
    whole.assert_parity(0)


LEARNER = """
import pickle, sys
import torch
from safetensors.torch import load_file
from plumbline.models.ipc import Shelf

torch.multiprocessing.set_sharing_strategy("file_system")
weights = load_file(sys.argv[1])
sys.stdout.buffer.write(pickle.dumps(Shelf(torch.device("cpu")).lay(weights.items())))
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.mark.parametrize("laid", [1, 2])
def test_whole_weights_are_read_in_the_memory_of_another_process(whole: WholeWorld, laid: int) -> None:
    """Where that holds another version already, they are read from their files."""
    generator = whole.generator()
    file = version_directory(whole.root, ple(laid)) / "model.safetensors"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", LEARNER, str(file)], **pipes) as learner:
        assert learner.stdin and learner.stdout
        publication = replace(whole.publications[1], shared=pickle.load(learner.stdout))
        there: list[bool] = []
        load = whole.vllm.load_weights

        async def noted(path: str, shared: SharedWeights | None = None) -> bool:
            there.append(await load(path, shared))
            return there[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(whole.vllm, "load_weights", noted)
            patch.setitem(whole.publications, 1, publication)
            proof = whole.run(generator.load(ple(1)))
        learner.stdin.close()
    assert there == ([True] if laid == 1 else [True, False])
    assert proof.exact == len(publication.digests["float32"])
    whole.assert_parity(1)


class DeafWorkers:
    """A real engine that loads other weights than it was told, or none."""

    kind = "vllm"

    def __init__(self, engine: Any, path: Path | None) -> None:
        self._engine, self._path = engine, path

    async def load_weights(self, path: str, shared: SharedWeights | None) -> bool:
        return self._path is not None and await self._engine.load_weights(str(self._path))


class ForgetfulWorkers(DeafWorkers):
    """A real engine that is reloaded as vLLM alone does it."""

    async def load_weights(self, path: str, shared: SharedWeights | None) -> bool:
        await self._engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        return False


def sabotaged_weights(whole: WholeWorld, engine: Any) -> SyncError:
    generator = whole.generator()
    whole.run(generator.load(ple(1)))
    assert isinstance(generator._versions, WholeVersions)
    generator._versions._engine = engine
    with pytest.raises(SyncError) as caught:
        whole.run(generator.load(ple(2)))
    assert "ple v000002" in str(caught.value) and "generator-0" in str(caught.value)
    return caught.value


def test_a_generator_that_keeps_the_old_weights_is_caught(whole: WholeWorld) -> None:
    count = len(whole.publications[2].digests["float32"])
    error = sabotaged_weights(whole, DeafWorkers(whole.vllm, None))
    assert f"{count} of {count} tensors in it are not the learner's" in str(error)
    whole.publications = {n: replace(p, digests={}) for n, p in whole.publications.items()}
    assert "still answers as ple@1" in str(sabotaged_weights(whole, DeafWorkers(whole.vllm, None)))


@pytest.mark.parametrize("wrong", [3, 0])
def test_a_generator_that_loads_wrong_weights_is_caught(whole: WholeWorld, wrong: int) -> None:
    """Another version's, and those of the base: a no-op."""
    path = version_directory(whole.root, ple(wrong)) if wrong else whole.base
    sabotaged_weights(whole, DeafWorkers(whole.vllm, path))


def test_a_tied_head_that_keeps_its_packed_weights_is_caught(whole: WholeWorld) -> None:
    if not whole.tied:
        pytest.skip("the trap is that of tied embeddings")
    assert sabotaged_weights(whole, ForgetfulWorkers(whole.vllm, None)).difference > 0.01
