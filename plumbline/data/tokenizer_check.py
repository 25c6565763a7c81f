"""What of a tokenizer and its template would train a model on something else than one thinks: asked before a run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from plumbline.data.tokenizer import read_tokenizer, render_text, template_variables
from plumbline.errors import DataError, ModelError
from plumbline.records import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERIC = {"TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast"}
"""Classes that say: as tokenizer.json has it."""

_PHRASES = (
    "Hello there, how are you?", "I don't know; DON'T you'll we've she'd", "The quick brown fox", "naïve café déjà-vu",
    "Grüße aus Köln, Straße 12", "¿Qué tal? ¡Adiós!", "Привет, как дела?", "Γειά σου Κόσμε", "שלום עולם",
    "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界。", "こんにちは世界", "안녕하세요 세계",
    "Xin chào thế giới", "Dzień dobry, świecie", "1234567890", "3.14159 1,000,000 0x1F", "2024-01-31T23:59:59Z",
    "x1y22z333", "def f(x):\n    return x ** 2", "for (int i = 0; i < n; ++i) {\n\ta[i] += 1;\n}",
    "<div class='a'>text</div>",
    '{"key": [1, 2.5, null]}', "SELECT * FROM t WHERE a != 'b';", "https://example.org/a?b=c&d=e#f",
    "user@example.org", "C:\\dir\\file.txt", "🙂", "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea ❤️", "e\u0301 vs é",
    "ﬁ ligature ½ ²", "\u200bzero\u200dwidth\ufeff", "tab\tand\r\nline", "word  two   three    four",
    "!!! ... --- ___ ###", "'quoted' \"double\" “curly”", "∑∫√ ≤ ≥ ≠ → α²", "ALL CAPS and CamelCase",
)  # fmt: skip
_QUERY_MARK = "plumbqueryline"  # no word of any template
_AROUND = ("{}", " {}", "  {}", "\n{}", "\n\n{}", "{} ", "{}\n", "\t{}\n\n", "{0} {0}")


def check_readings(path: str) -> str:
    """Whether transformers reads a model's texts as its tokenizer.json says, which is how Plumbline reads them.

    Returns:
        What was compared; where the difference is none of the model's files', how to read an exported one rightly.

    Raises:
        ModelError: the class that the model declares, or none, gives other ids: nobody can say which it was trained on.
    """
    from transformers import AutoTokenizer

    ours, directory = read_tokenizer(path), Path(path)
    texts = [*_texts(), *_renderings(ours)]
    if not (directory / "tokenizer.json").is_file():
        return f"{len(texts)} texts"
    try:
        theirs = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception:  # it raises a dozen kinds; without a config.json there is no architecture that it could follow
        return f"{len(texts)} texts"
    other = next((text for text in texts if _ids(ours, text) != _ids(theirs, text)), None)
    if other is None:
        return f"{len(texts)} texts, read by transformers as by tokenizer.json"
    reads = f"transformers reads other ids than tokenizer.json says ({type(theirs).__name__}; {other[:32]!r})"
    declared = _declared(directory / "tokenizer_config.json")
    if declared in GENERIC:
        return f"{reads}: load an exported model's with PreTrainedTokenizerFast, as Plumbline does"
    raise ModelError(
        f"model {path}: with tokenizer_class {declared or 'not given'} {reads}; if the file is right, set it to "
        "PreTrainedTokenizerFast in tokenizer_config.json, else save there the tokenizer that AutoTokenizer makes"
    )


def check_thoughts(tokenizer: "PreTrainedTokenizerBase", origin: str, prompts: Iterable[Prompt]) -> None:
    """Raises DataError where the template opens a thought, and answers that are learnt from would go into it."""
    tail = render_text(tokenizer, [Message(role="user", content=_QUERY_MARK)]).rpartition(_QUERY_MARK)[2]
    if tail.rfind("<think>") <= tail.rfind("</think>"):
        return
    for prompt in prompts:
        answer = prompt.target if prompt.target is not None else prompt.chosen
        if answer is not None and "</think>" not in answer:
            switches = [n for n in template_variables(tokenizer.get_chat_template()) if "think" in n.lower()]
            remedy = (
                f"set model.template_args: {{{switches[0]}: false}}"
                if switches
                else "set model.chat_template to one that opens no thought"
            )
            raise DataError(
                f"{origin}: the chat template opens a <think> for each answer, and that of row {prompt.id} has no "
                f"</think>: it would be learnt as a thought; {remedy}, or write thought and </think> before each answer"
            )


def _texts() -> list[str]:
    return [around.format(phrase) for phrase in _PHRASES for around in _AROUND]


def _renderings(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Its special tokens beside and within words, and conversations by its template."""
    marks = list(tokenizer.all_special_tokens)[:8]
    texts = [around.format(m=mark) for mark in marks for around in ("{m}", "a{m}b", " {m} ", "{m}\n{m}")]
    if tokenizer.chat_template:
        for query in _PHRASES[:8]:
            turns = [Message(role="user", content=query)]
            try:
                texts.append(render_text(tokenizer, turns))
            except ModelError:
                break  # another check says so
    return texts


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _declared(file: Path) -> str | None:
    return json.loads(file.read_text("utf-8")).get("tokenizer_class") if file.is_file() else None
