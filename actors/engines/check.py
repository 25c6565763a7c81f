"""What a config asks of its engine, looked at before anything is started: `plumbline.doctor` is handed `check_engine`.

`fleet.generator.vllm` is judged by vLLM itself, which takes 14 seconds to import and sets up much of its process while
it does: a process of its own looks, and only where the key is given.
"""

import difflib
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from enum import EnumType
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from actors.engines.seam import EngineSpec, engine_spec
from actors.engines.start import resolve_engine
from actors.engines.vllm import engine_arguments
from plumbline.config.data import Model
from plumbline.config.tree import Config
from plumbline.errors import ConfigError, in_one_line
from plumbline.importing import HOME

KEY = "fleet.generator.vllm"


def check_engine(config: Config, device: Literal["cpu", "cuda"], dtype: Literal["float32", "bfloat16"]) -> str:
    """What was looked at, in words.

    Raises:
        ConfigError: the model cannot be cut over so many GPUs; vLLM is not the engine, or refuses an argument.
    """
    choice = resolve_engine(config.fleet.engine)
    gpus = int(config.fleet.generator.gpus)
    asked = list(config.fleet.generator.vllm)
    if choice != "vllm" and (gpus > 1 or asked):
        key, what = (KEY, "are its arguments") if asked else ("fleet.generator.gpus", "is for it to cut a model over")
        raise ConfigError(f"{key}: vLLM is not installed here, and these {what}; leave them out, or install it")
    notes: list[str] = [choice]
    if gpus > 1:
        check_heads(config.model, gpus)
        notes.append(f"each model over {gpus} GPUs")
    if asked:
        ask_vllm(config, device, dtype)
        notes.append(f"vLLM takes {', '.join(asked)}")
    return ", ".join(notes)


def check_heads(model: Model, gpus: int) -> None:
    """An engine's GPUs take as many of the model's attention heads each. Raises ConfigError where they cannot."""
    from transformers import AutoConfig

    if model.path is not None:
        whole = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
    else:
        whole = AutoConfig.for_model(**(model.init or {}))
    text = whole.get_text_config()
    heads: int = text.num_attention_heads
    shared: int = getattr(text, "num_key_value_heads", None) or heads

    def even(count: int) -> bool:  # a head of keys and values may be copied to several GPUs, but not cut
        return heads % count == 0 and (shared % count == 0 or count % shared == 0)

    if not even(gpus):
        right = ", ".join(str(count) for count in range(1, heads + 1) if even(count))
        raise ConfigError(
            f"fleet.generator.gpus: {gpus}, over which the model's {heads} attention heads ({shared} of keys and "
            f"values) cannot be cut; it should be one of {right}"
        )


def ask_vllm(config: Config, device: Literal["cpu", "cuda"], dtype: Literal["float32", "bfloat16"]) -> None:
    """Have a process of its own judge the arguments. Raises ConfigError with what it said."""
    versions = config.kept_versions * max(1, len(config.served))
    spec = engine_spec(config, config.model.path or "", dtype, device, versions=versions)
    code = f"import sys; sys.path.append({HOME!r}); from actors.engines.check import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        input=json.dumps(asdict(spec), default=str),
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "CRITICAL"},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"vLLM could not be asked (exit code {done.returncode})"]
        raise ConfigError(f"{KEY}: {said[-1]}")


def main() -> None:
    """Judge the spec on standard input; what is wrong is the last line on standard error, and the exit code 1."""
    sys.exit(judge(EngineSpec(**json.load(sys.stdin))))


def judge(spec: EngineSpec) -> str | None:
    """What vLLM has against a spec's arguments, in one line; None where it takes them.

    Names and types are judged anywhere. What the values mean together, for this model, only where device and model
    are: neither a cluster's head nor a run whose model `sft` has yet to make can say.
    """
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    kinds = {one.name: one.type for one in fields(AsyncEngineArgs)}
    for name, value in spec.vllm.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
            return f"`{name}` is no engine argument of vLLM" + (f"; did you mean {near[0]}?" if near else "")
        if wrong := _of_type(kinds[name], value):
            return f"`{name}`: {wrong}, got {value!r}"
    there = (Path(spec.model_path) / "config.json").is_file()
    try:
        settings = engine_arguments(spec if there else replace(spec, max_adapters=0))
        if there and current_platform.device_type == spec.device and not os.environ.get("RAY_ADDRESS"):
            AsyncEngineArgs(**settings).create_engine_config()
    except ConfigError as error:
        return str(error)
    except ValidationError as error:
        return _told(error, named=True)
    except Exception as error:  # whatever vLLM says by it, it says of these arguments
        return in_one_line(error)
    return None


def _of_type(kind: Any, value: Any) -> str:
    """What is wrong with a value of a field; nothing where it may be one, or where only vLLM's own configs can say."""
    if any(isinstance(one, EnumType) and str(value).upper() in one.__members__ for one in (kind, *get_args(kind))):
        return ""  # the name of a backend, which those look up
    for settings in (None, ConfigDict(arbitrary_types_allowed=True)):  # pydantic takes the second for some kinds alone
        try:
            TypeAdapter(kind, config=settings).validate_python(value)
        except PydanticUserError:
            continue
        except ValidationError as error:
            return _told(error, named=is_dataclass(kind))
        return ""
    return ""


def _told(error: ValidationError, *, named: bool) -> str:
    """A validation in one line: the field, where it is one's, and what each kind that it might be says of it."""
    told = {}
    for one in error.errors():
        said = " ".join(one["msg"].removeprefix("Value error, ").split())
        told[said] = f"{one['loc'][0]}: {said}" if named and one["loc"] else said
    return "; or ".join(told.values())
