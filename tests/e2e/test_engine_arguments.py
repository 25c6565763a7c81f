"""vLLM's own judgement of an engine's arguments; no engine is started."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.engines.check import check_engine, judge
from actors.engines.vllm import engine_arguments
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.placement.plan import without_gpus
from tests.tiny import engine_spec, make_tiny_model, tiny_config

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts; its config is all that is looked at."""
    from transformers import MixtralConfig

    directory = tmp_path_factory.mktemp("experts")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    MixtralConfig(architectures=["MixtralForCausalLM"], num_local_experts=4, **sizes).save_pretrained(directory)
    return directory


def engine_config(model: Path, **changes: Any) -> Any:
    """What vLLM makes of a spec."""
    from vllm import AsyncEngineArgs

    return AsyncEngineArgs(**engine_arguments(engine_spec(model, **changes))).create_engine_config()


def test_a_model_over_two_gpus_has_two_workers_of_this_process(model: Path) -> None:
    config = engine_config(model, tensor_parallel=2)
    assert (config.parallel_config.tensor_parallel_size, config.parallel_config.world_size) == (2, 2)
    assert config.parallel_config.distributed_executor_backend == "mp"


def test_arguments_of_a_config_reach_the_engine(model: Path, experts: Path) -> None:
    config = engine_config(model, dtype="bfloat16", vllm={"quantization": "fp8", "kv_cache_dtype": "fp8"})
    assert (config.model_config.quantization, config.cache_config.cache_dtype) == ("fp8", "fp8")
    changes: dict[str, Any] = {"max_adapters": 0, "tensor_parallel": 2, "vllm": {"enable_expert_parallel": True}}
    assert engine_config(experts, **changes).parallel_config.enable_expert_parallel


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"kv_cache_dtyp": "fp8"}, ["`kv_cache_dtyp` is no engine argument", "did you mean kv_cache_dtype?"]),
        ({"kv_cache_dtype": "fp7"}, ["`kv_cache_dtype`", "'fp8'", "got 'fp7'"]),
        ({"block_size": "wide"}, ["`block_size`", "valid integer", "got 'wide'"]),
        ({"quantization": "nonsense"}, ["Unknown quantization method: nonsense", "'fp8'"]),
        ({"quantization": "fp8"}, ["float32 is not supported for quantization method fp8"]),
        ({"attention_backend": "NONSENSE"}, ["`attention_backend`"]),
        ({"enable_expert_parallel": True}, ["Number of experts"]),
        (
            {"compilation_config": {"cudagraph_mod": "NONE"}},
            ["`compilation_config`: cudagraph_mod: Unexpected keyword"],
        ),
        ({"cpu_offload_gb": -1}, ["cpu_offload_gb: Input should be greater than or equal to 0"]),
        ({"max_num_batched_tokens": 64}, ["`max_num_batched_tokens` is Plumbline's to choose on a cpu"]),
    ],
)
def test_vllm_refuses_in_one_line(model: Path, arguments: dict[str, Any], parts: list[str]) -> None:
    said = judge(engine_spec(model, vllm=arguments))
    assert said is not None and "\n" not in said
    assert [part for part in parts if part not in said] == []


def test_vllm_takes_what_is_right(model: Path) -> None:
    for arguments in ({"block_size": 32}, {"kv_cache_dtype": "fp8"}, {"attention_backend": "CPU_ATTN"}):
        assert judge(engine_spec(model, vllm=arguments)) is None


def test_a_model_that_is_yet_to_be_made_leaves_names_and_types_to_look_at() -> None:
    assert judge(engine_spec("", vllm={"quantization": "fp8"})) is None
    assert "no engine argument" in str(judge(engine_spec("", vllm={"quantisation": "fp8"})))


def test_a_run_asks_vllm_before_it_starts(tmp_path: Path) -> None:
    tree = tiny_config(tmp_path)
    assert check_engine(without_gpus(Config.model_validate(tree)), "cpu", "float32") == "vllm"
    for arguments, said in (
        ({"kv_cache_dtype": "fp8"}, None),
        ({"kv_cache_dtyp": "fp8"}, "did you mean kv_cache_dtype?"),
    ):
        tree["fleet"] = {"engine": "vllm", "generator": {"vllm": arguments}}
        config = without_gpus(Config.model_validate(tree))
        if said is None:
            assert check_engine(config, "cpu", "float32") == "vllm, vLLM takes kv_cache_dtype"
            continue
        with pytest.raises(ConfigError) as caught:
            check_engine(config, "cpu", "float32")
        assert str(caught.value).startswith("fleet.generator.vllm: `kv_cache_dtyp`") and said in str(caught.value)


@pytest.fixture
def places(model: Path, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """vLLM's configs of one model in two directories."""
    shutil.copytree(model, tmp_path / "elsewhere")
    yield engine_config(model), engine_config(tmp_path / "elsewhere")


def test_what_was_compiled_is_found_again_wherever_the_model_lies(
    places: tuple[Any, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import ModelConfig

    here, there = places
    # The file that puts it right does so when it is imported: what is so without it comes first, or from it.
    from actors.engines import vllm_gpu

    monkeypatch.setattr(ModelConfig, "compute_hash", vllm_gpu._hash_with_place)
    assert here.compute_hash() != there.compute_hash()
    monkeypatch.setattr(ModelConfig, "compute_hash", vllm_gpu.hash_without_place)
    assert here.compute_hash() == there.compute_hash()
    assert here.compute_hash() == engine_config(model, seed=7, memory_share=0.3).compute_hash()
    assert here.compute_hash() != engine_config(model, max_adapters=2).compute_hash()
    assert here.model_config.model == str(model), "the model itself stays where it is"
