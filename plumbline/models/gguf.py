"""A model in a GGUF file (llama.cpp's), made into one in safetensors: dequantised, with its tokenizer and template.

`plumbline.runs.gguf` calls it in a process of its own, for it holds the whole model in memory.
"""

import json
import sys
from pathlib import Path
from typing import Any

from plumbline.errors import ModelError, in_one_line

MADE = "gguf.json"
"""Beside a model that was made: of which file it was, and how that was quantised."""
REFUSED, FAILED = 2, 3
"""Exit codes beside a line on stderr: nothing can be made of the file; another error, such as a full disk's."""
_TOKENS, _TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"


def convert(file: Path, out: Path) -> None:
    """Write the model of a file into the directory `out`, in bfloat16.

    Raises:
        ModelError: transformers cannot read it, or makes another tokenizer of it than it says.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    said = header(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
            dtype=torch.bfloat16,
        )
    except Exception as error:  # of many kinds, by what it lacks for an architecture
        raise ModelError(
            f"{file}: transformers cannot read a {said['architecture']} of GGUF ({in_one_line(error)})"
        ) from error
    check_tokenizer(tokenizer, said, file)
    model.config.__dict__.pop("quantization_config", None)  # it is none any more
    model.hf_quantizer, model.is_quantized = None, False
    out.mkdir(parents=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    kept = {key: said[key] for key in ("architecture", "quantization", "license")}
    (out / MADE).write_text(json.dumps({"file": file.name, **kept}), encoding="utf-8")


def header(file: Path) -> dict[str, Any]:
    """What a file says of its model: architecture, quantization (such as Q4_K_M), license, tokens, template and ends.

    Raises:
        ModelError: it is no GGUF file, or damaged.
    """
    from gguf import GGUFReader, LlamaFileType

    try:
        fields = GGUFReader(file).fields
        said = {name: fields[name].contents() if name in fields else None for name in _NAMES}
        kind = said["general.file_type"]
        return {
            "architecture": said["general.architecture"] or "model",
            "quantization": LlamaFileType(kind).name.removeprefix("MOSTLY_").removeprefix("ALL_")
            if kind is not None
            else "unknown",
            "license": said["general.license"] or "not said",
            "tokens": said[_TOKENS] or [],
            "template": said[_TEMPLATE],
            "eos": said["tokenizer.ggml.eos_token_id"],
        }
    except Exception as error:  # numpy's, where a file ends too early
        raise ModelError(f"{file}: no GGUF file, or damaged ({in_one_line(error)}); download it again") from error


_NAMES = (
    *("general.architecture", "general.file_type", "general.license"),
    *(_TOKENS, _TEMPLATE, "tokenizer.ggml.eos_token_id"),
)


def check_tokenizer(tokenizer: Any, said: dict[str, Any], file: Path) -> None:
    """Raises ModelError where a tokenizer is another than the file's header says."""
    tokens = said["tokens"]
    made = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    wrong = next((i for i, (mine, its) in enumerate(zip(made, tokens, strict=True)) if mine != its), None)
    if wrong is not None:
        problem = f"token {wrong} {made[wrong]!r} of it, and it says {tokens[wrong]!r}"
    elif said["eos"] is not None and tokenizer.eos_token_id != said["eos"]:
        problem = f"{tokenizer.eos_token_id} the end of its answers, and it says {said['eos']}"
    elif said["template"] and tokenizer.chat_template != said["template"]:
        problem = "another chat template of it than it says"
    else:
        return
    raise ModelError(f"{file}: transformers makes {problem}; give the model that it was made from, in safetensors")


def main() -> int:
    """``python -m plumbline.models.gguf FILE OUT``: an error is a line on stderr, the last one."""
    file, out = map(Path, sys.argv[1:])
    try:
        convert(file, out)
    except ModelError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    except Exception as error:  # what libraries raise where they cannot write
        sys.stderr.write(f"{file}: cannot be made into safetensors ({in_one_line(error)})\n")
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
