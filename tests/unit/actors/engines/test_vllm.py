"""vLLM's arguments of an engine, looked at without one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.engines.seam import engine_spec as spec_of
from actors.engines.vllm import engine_arguments, graph_sizes
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.placement.plan import without_gpus
from tests.tiny import engine_spec, tiny_config


def config_with(directory: Path, **generator: Any) -> Config:
    tree = tiny_config(directory)
    tree["fleet"] = {**tree.get("fleet", {}), "generator": {"replicas": 1, **generator}}
    return without_gpus(Config.model_validate(tree))


def on_gpu(**changes: Any) -> dict[str, Any]:
    return engine_arguments(engine_spec("model", device="cuda", max_adapters=0, **changes))


def test_the_sizes_of_graphs_are_two_an_octave_up_to_twice_what_is_decoded() -> None:
    assert graph_sizes(1) == [1, 2]
    assert graph_sizes(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40]
    assert graph_sizes(256) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert graph_sizes(4096)[-2:] == [384, 512]


def test_a_batch_is_filled_up_by_half_at_most() -> None:
    sizes = graph_sizes(300)
    assert all(min(size for size in sizes if size >= batch) <= 1.5 * batch for batch in range(1, sizes[-1] + 1))


def test_graphs_are_for_all_that_may_be_decoded_users_among_them() -> None:
    alone, beside_users = on_gpu(max_num_seqs=64), on_gpu(max_num_seqs=64, seats=16)
    assert (alone["max_num_seqs"], beside_users["max_num_seqs"]) == (64, 96)
    assert 64 in alone["cudagraph_capture_sizes"] and 96 in beside_users["cudagraph_capture_sizes"]
    assert (alone.get("scheduling_policy"), beside_users["scheduling_policy"]) == (None, "priority")


@pytest.mark.parametrize(
    "theirs",
    [
        {"cudagraph_capture_sizes": [1, 8]},
        {"compilation_config": {"cudagraph_mode": "NONE"}},
        {"optimization_level": 0},
    ],
)
def test_a_config_that_chooses_its_graphs_gets_none_of_ours(theirs: dict[str, Any]) -> None:
    arguments = on_gpu(vllm=theirs)
    assert arguments.items() >= theirs.items()
    assert arguments.get("cudagraph_capture_sizes") == theirs.get("cudagraph_capture_sizes")


def test_other_arguments_leave_our_graphs_alone() -> None:
    arguments = on_gpu(vllm={"kv_cache_dtype": "fp8"})
    assert arguments["kv_cache_dtype"] == "fp8" and "cudagraph_capture_sizes" in arguments


def test_weights_are_read_from_safetensors_alone_unless_the_config_names_another_such_loader() -> None:
    assert on_gpu()["load_format"] == "safetensors"
    assert on_gpu(vllm={"load_format": "runai_streamer"})["load_format"] == "runai_streamer"


@pytest.mark.parametrize(
    ("gpus", "device", "size"), [(0.5, "cuda", 1), (1, "cuda", 1), (4, "cuda", 4), (4, "cpu", 1), (0, "cpu", 1)]
)
def test_a_model_is_cut_over_the_gpus_of_its_engine(tmp_path: Path, gpus: float, device: Any, size: int) -> None:
    spec = spec_of(config_with(tmp_path, gpus=gpus), "model", "bfloat16", device, versions=0)
    arguments = engine_arguments(replace(spec, max_adapters=0))
    assert arguments.get("tensor_parallel_size", 1) == spec.tensor_parallel == size
    assert ("distributed_executor_backend" in arguments) == (size > 1)


def test_what_a_config_says_to_vllm_reaches_its_engine(tmp_path: Path) -> None:
    config = config_with(tmp_path, vllm={"quantization": "fp8"})
    assert engine_arguments(spec_of(config, "model", "bfloat16", "cuda", versions=0))["quantization"] == "fp8"


def test_what_only_the_cpu_backend_needs_is_refused_there_alone() -> None:
    theirs = {"max_num_batched_tokens": 4096}
    assert on_gpu(vllm=theirs)["max_num_batched_tokens"] == 4096
    with pytest.raises(ConfigError, match="`max_num_batched_tokens` is Plumbline's to choose on a cpu"):
        engine_arguments(engine_spec("model", max_adapters=0, vllm=theirs))


def test_a_deterministic_engine_reads_no_prefixes_of_others_and_schedules_nothing_ahead() -> None:
    arguments = engine_arguments(engine_spec("model", max_adapters=0, deterministic=True))
    assert (arguments["enable_prefix_caching"], arguments["async_scheduling"]) == (False, False)
    assert "enable_prefix_caching" not in engine_arguments(engine_spec("model", max_adapters=0))
    with pytest.raises(ConfigError, match="`enable_prefix_caching` is Plumbline's to choose"):
        engine_arguments(engine_spec("model", max_adapters=0, deterministic=True, vllm={"enable_prefix_caching": True}))
