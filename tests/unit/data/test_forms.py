"""Rows as other tools write them, read as they are: what each form becomes, and what no form has."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from plumbline.data.dataset import LabelledText, read_labelled, read_preferences, read_prompts
from plumbline.errors import DataError
from plumbline.records import Message

ASK, ASK_AGAIN = {"role": "user", "content": "Why?"}, {"role": "user", "content": "And then?"}
SAY, SAY_NO = {"role": "assistant", "content": "So it is."}, {"role": "assistant", "content": "No."}
BE = {"role": "system", "content": "Be kind."}
HUMAN = "\n\nHuman: Why?\n\nAssistant:"
Row = Mapping[str, Any]


def file_of(tmp_path: Path, *rows: Row) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def messages(*turns: Mapping[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in turns)


PROMPTS: dict[str, tuple[Row, tuple[Message, ...], str | None]] = {
    "prompt-only": ({"prompt": "Why?"}, messages(ASK), None),
    "prompt-only, turns": ({"prompt": [BE, ASK]}, messages(BE, ASK), None),
    "prompt-completion": ({"prompt": "Why?", "completion": "So it is."}, messages(ASK), "So it is."),
    "prompt-completion, turns": ({"prompt": [ASK], "completion": [SAY]}, messages(ASK), "So it is."),
    "language modelling, turns": ({"messages": [BE, ASK, SAY]}, messages(BE, ASK), "So it is."),
    "many turns": ({"messages": [ASK, SAY, ASK_AGAIN, SAY_NO]}, messages(ASK, SAY, ASK_AGAIN), "No."),
    "developer": ({"messages": [{**BE, "role": "developer"}, ASK]}, messages(BE, ASK), None),
    "parts": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}, messages(ASK), None),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So it is."}]},
        messages(ASK),
        "So it is.",
    ),
    "Alpaca": ({"instruction": "Why?", "input": "", "output": "So it is."}, messages(ASK), "So it is."),
    "Alpaca, input": (
        {"instruction": "Sum up.", "input": "Why?", "output": "So it is."},
        (Message(role="user", content="Sum up.\n\nWhy?"),),
        "So it is.",
    ),
    "preference": ({"prompt": "Why?", "chosen": "So it is.", "rejected": "No."}, messages(ASK), None),
    "preference, turns inside": ({"chosen": [BE, ASK, SAY], "rejected": [BE, ASK, SAY_NO]}, messages(BE, ASK), None),
    "HH": ({"chosen": f"{HUMAN} So it is.", "rejected": f"{HUMAN} No."}, messages(ASK), None),
    "unpaired": ({"prompt": "Why?", "completion": "So it is.", "label": True}, messages(ASK), "So it is."),
    "unpaired, unwanted": ({"prompt": "Why?", "completion": "No.", "label": False}, messages(ASK), None),
    "turns, unwanted": ({"messages": [ASK, SAY_NO], "label": 0}, messages(ASK), None),
    "stepwise": ({"prompt": "Why?", "completions": ["So", "it is."], "labels": [True, False]}, messages(ASK), None),
    "both, alike": ({"prompt": "Why?", "messages": [BE, ASK, SAY]}, messages(BE, ASK), "So it is."),
    "target comes first": ({"prompt": "Why?", "completion": "No.", "target": "So it is."}, messages(ASK), "So it is."),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt(tmp_path: Path, name: str) -> None:
    row, asked, target = PROMPTS[name]
    [prompt] = read_prompts(file_of(tmp_path, row), target="read")
    assert (prompt.messages, prompt.target) == (asked, target)
    if target is not None:
        assert read_prompts(file_of(tmp_path, row), target="needed") == [prompt]


def test_what_a_form_takes_is_no_extra(tmp_path: Path) -> None:
    [alpaca] = read_prompts(file_of(tmp_path, {**PROMPTS["Alpaca"][0], "source": "x"}))
    [plain] = read_prompts(file_of(tmp_path, {"prompt": "Why?", "input": "y", "source": "x"}))
    assert (alpaca.extra, plain.extra) == ({"source": "x"}, {"input": "y", "source": "x"})


PAIRS: dict[str, tuple[Row, tuple[Message, ...], tuple[str, ...]]] = {
    "text": ({"prompt": "Why?", "chosen": "So it is.", "rejected": "No."}, messages(ASK), ("No.",)),
    "several": ({"prompt": "Why?", "chosen": "So it is.", "rejected": ["No.", "Ha."]}, messages(ASK), ("No.", "Ha.")),
    "turns": ({"prompt": [BE, ASK], "chosen": [SAY], "rejected": [SAY_NO]}, messages(BE, ASK), ("No.",)),
    "several turns": ({"prompt": [ASK], "chosen": [SAY], "rejected": [[SAY_NO], "Ha."]}, messages(ASK), ("No.", "Ha.")),
    "turns inside": ({"chosen": [ASK, SAY], "rejected": [ASK, SAY_NO]}, messages(ASK), ("No.",)),
    "turns inside and apart": (
        {"prompt": "Why?", "chosen": [ASK, SAY], "rejected": [ASK, SAY_NO]},
        messages(ASK),
        ("No.",),
    ),
    "a system turn inside": (
        {"prompt": "Why?", "chosen": [BE, ASK, SAY], "rejected": [BE, ASK, SAY_NO], "messages": [BE, ASK, SAY]},
        messages(BE, ASK),
        ("No.",),
    ),
    "text inside": ({"chosen": "Why? So it is.", "rejected": "Why? No."}, messages(ASK), ("No.",)),
    "HH": ({"chosen": f"{HUMAN} So it is.", "rejected": f"{HUMAN} No."}, messages(ASK), ("No.",)),
    "HH, many turns": (
        {
            "chosen": f"{HUMAN} No.\n\nHuman: And then?\n\nAssistant: So it is.",
            "rejected": f"{HUMAN} No.\n\nHuman: And then?\n\nAssistant: Ha.",
        },
        messages(ASK, SAY_NO, ASK_AGAIN),
        ("Ha.",),
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": [{"from": "gpt", "value": "So it is."}],
            "rejected": [{"from": "gpt", "value": "No."}],
        },
        messages(ASK),
        ("No.",),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_preference(tmp_path: Path, name: str) -> None:
    row, asked, rejected = PAIRS[name]
    [pair] = read_preferences(file_of(tmp_path, row))
    assert (pair.messages, pair.chosen, pair.rejected) == (asked, "So it is.", rejected)


@pytest.mark.parametrize("name", PAIRS)
def test_a_preference_that_nobody_reads_is_the_same(tmp_path: Path, name: str) -> None:
    """Or what `validate --write` makes of such a file would have prompts in its answers, or no answers."""
    path = file_of(tmp_path, PAIRS[name][0])
    [unread], [read] = read_prompts(path), read_preferences(path)
    assert (unread.chosen, unread.rejected) == (read.chosen, read.rejected)


def test_labelled_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Why?", "completion": "So it is.", "label": True},
        {"prompt": [ASK], "completion": [SAY_NO], "label": False},
        {"text": "Fine.", "label": 1},
    ]
    assert read_labelled(file_of(tmp_path, *rows)) == [
        LabelledText(text="So it is.", label=1.0, messages=messages(ASK)),
        LabelledText(text="No.", label=0.0, messages=messages(ASK)),
        LabelledText(text="Fine.", label=1.0),
    ]


IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
CALL = [ASK, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
NONE: dict[str, tuple[Row, str]] = {
    "an image": ({"prompt": IMAGE}, "prompt: turn 1 has a part of type 'image', and turns are text alone here"),
    "images": ({"prompt": "Why?", "images": [{"bytes": "x"}]}, "images: is of no text"),
    "a call": ({"messages": CALL}, "messages: turn 2 is of a tool call"),
    "a tool": ({"messages": [ASK, {"role": "tool", "content": "3"}]}, "messages: turn 2 is of a tool call"),
    "text alone": ({"text": "The sky is blue."}, "no `prompt` or `messages`; it has text: name the column"),
    "blank instruction": ({"instruction": " ", "output": "x"}, "instruction: is blank"),
    "a part that is none": (
        {"prompt": [{"role": "user", "content": ["x"]}]},
        "prompt: turn 1 has a part of type 'str'",
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_no_form_has(tmp_path: Path, name: str) -> None:
    row, line = NONE[name]
    with pytest.raises(DataError) as caught:
        read_prompts(file_of(tmp_path, {"prompt": "Good?"}, row))
    assert re.search(rf"rows\.jsonl, row 2[:,] {re.escape(line)}", str(caught.value))


def test_an_empty_list_of_images_is_none(tmp_path: Path) -> None:
    assert len(read_prompts(file_of(tmp_path, {"prompt": "Why?", "images": [], "video": None, "image": "a name"}))) == 1


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"chosen": [ASK, SAY], "rejected": [ASK_AGAIN, SAY_NO]}, "rejected: answers another conversation than chosen"),
        ({"chosen": [ASK, SAY], "rejected": "No."}, "rejected: answers another conversation than chosen"),
        ({"prompt": "What?", "chosen": [ASK, SAY], "rejected": "No."}, "chosen: answers another conversation"),
        ({"prompt": "Why?", "chosen": [ASK], "rejected": "No."}, "chosen: ends with a turn of the user"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": []}, "rejected: is an empty list"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": ["No.", " "]}, "rejected: answer 2 is blank"),
        ({"chosen": "So it is.", "rejected": "No."}, "no `prompt`, and no word that chosen and rejected both begin"),
        ({"chosen": "Why? So.", "rejected": "Why? "}, "rejected: after the words that both begin with is blank"),
        ({"chosen": f"{HUMAN} So.", "rejected": f"{HUMAN} "}, "rejected: turn 2 is blank"),
        ({"chosen": [SAY], "rejected": [SAY_NO]}, "no `prompt`"),
    ],
)
def test_a_preference_that_is_none(tmp_path: Path, row: Row, line: str) -> None:
    with pytest.raises(DataError, match="row 1") as caught:
        read_preferences(file_of(tmp_path, row))
    assert line in str(caught.value)


def test_a_needed_target_is_a_wanted_one(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "completion": text, "label": label} for text, label in (("So.", True), ("No.", False))]
    path = file_of(tmp_path, *rows)
    with pytest.raises(DataError, match=r"row 2, label: is 0: .*`?where: \{label: 1\}"):
        read_prompts(path, target="needed")
    assert [prompt.target for prompt in read_prompts(path, target="needed", where={"label": 1})] == ["So."]
