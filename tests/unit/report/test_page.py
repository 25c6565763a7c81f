"""The report of a run: its numbers by hand, hostile text, unfinished and failed runs, and files that are broken."""

import base64
import hashlib
import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.main import main
from plumbline.errors import ConfigError, DataError, UserError
from plumbline.report.kinds import KINDS
from plumbline.report.page import write_report
from plumbline.report.plots import MOST_POINTS, averaged, plots, running_mean
from plumbline.report.tables import comparison, headline, number
from plumbline.runs.digests import SCHEMA, digests_by_source
from plumbline.runs.directory import RUN_LOCK
from tests.unit.report.runs import (
    BREAKOUT,
    CONFIG,
    EVENTS,
    HOSTILE,
    ROWS,
    START,
    Page,
    event,
    interval,
    make_run,
    report,
    whole_run,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """All three methods, one of which failed, with an evaluation and rejections."""
    return whole_run(tmp_path / "run")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of such a run, for the tests that only read it."""
    return report(whole_run(tmp_path_factory.mktemp("whole") / "run"))


# Numbers


def test_before_and_after_by_hand(page: Page) -> None:
    assert page.row("policy") == ["reward ↑", "PPL ↓", "tokens", "blank ↓", "win rate ↑"]
    assert page.row("before") == ["−0.250[−0.375, −0.125]", "1.500", "20.00", "0", ""]
    assert page.row("ple") == ["0.500[0.250, 0.750]", "1.625", "22.50", "0", "87.5 %"]
    assert page.row(f"dlma {HOSTILE}") == ["", "1.750", "21.00", "1", ""]
    # The greatest reward and the least perplexity. Two of three have no blank answers, and one win rate has no rival.
    assert page.best == ["1.500", "0.500"]
    assert any(text.startswith("4 held-out prompts.") for text in page.paragraphs)
    assert "−0.250" in page.source
    assert "<b>0.500<em>+0.750</em></b>" in page.source


def test_the_best_of_a_column() -> None:
    def best(name: str, *values: Any) -> list[bool]:
        table = comparison([{"policy": str(i), name: value} for i, value in enumerate(values)])
        assert table is not None
        return [cells[0].best for _, cells in table.rows]

    assert best("reward", 1.0, 3.0, 2.0) == [False, True, False]
    assert best("gap", interval(0.5, 1), interval(-0.5, 1)) == [False, True]
    assert best("BLEU", 0.2, 0.3, 0.3, 0.1) == [False, True, True, False]
    assert best("BLEU", 0.3, 0.3, 0.3, 0.1) == [False] * 4  # what most share says nothing
    assert best("reward", 1.0, 1.0) == [False, False]
    assert best("reward", None, 2.0) == [False, False]  # nothing to compare it with
    assert best("tokens", 1.0, 2.0) == [False, False]  # neither way is better
    assert best("PPL", math.nan, 2.0, 1.0) == [False, False, True]


def test_cells_share_their_digits() -> None:
    table = comparison([{"policy": "a", "PPL": 9.0, "blank": 3}, {"policy": "b", "PPL": 123.456, "blank": None}])
    assert table is not None
    assert [[cell.text for cell in cells] for _, cells in table.rows] == [["9.0", "3"], ["123.5", ""]]
    assert number(-0.5, 2) == "−0.50"
    assert number(0.5, 1, sign=True) == "+0.5"


def test_an_interval_without_bounds_has_none() -> None:
    table = comparison([{"policy": "a", "reward": {"mean": 0.5, "low": None, "high": None, "n": 1}}])
    assert table is not None
    assert (table.rows[0][1][0].text, table.rows[0][1][0].interval) == ("0.500", "")


def test_a_judge_has_a_table_of_its_own() -> None:
    rows = [{"policy": "a", "reward": 1.0, "judge reward": 4.0}, {"policy": "b", "reward": 2.0, "judge reward": 3.0}]
    ours, judged = comparison(rows), comparison(rows, judge=True)
    assert ours is not None and judged is not None
    assert [c.name for c in ours.columns] == [c.name for c in judged.columns] == ["reward"]
    assert [cells[0].text for _, cells in judged.rows] == ["4.000", "3.000"]
    assert judged.rows[0][1][0].best
    assert comparison([{"policy": "a", "reward": 1.0}], judge=True) is None


def test_differing_numbers_of_prompts_are_a_column() -> None:
    table = comparison([{"policy": "a", "prompts": 4}, {"policy": "b", "prompts": 8}])
    assert table is not None
    assert ([c.name for c in table.columns], table.prompts) == (["prompts"], None)


def test_the_headline_compares_with_the_first_row() -> None:
    rows = [{"policy": "a", "reward": 1.0}, {"policy": "b", "reward": interval(0.75, 0.1)}, {"policy": "c"}]
    assert headline(rows) == [("a", "1.000", ""), ("b", "0.750", "−0.250")]
    assert headline([{"policy": "a"}, {"policy": "b", "reward": 1.0}]) == []


def test_rejections_by_reason_and_pipeline(page: Page) -> None:
    assert page.row("reason") == ["ple", "dlma", "total"]
    assert page.row("identical answers") == ["2", "3", "5"]
    assert page.row("blank answer") == ["1", "0", "1"]
    assert page.row(HOSTILE) == ["0", "1", "1"]


def test_what_ran(page: Page) -> None:
    for text in (
        "<dt>Model</dt><dd>base<small>/models/base</small>",
        "<dt>Seed</dt><dd>7</dd>",
        "<dt>Engine</dt><dd>vllm<small>generators: 2</small>",
        "<dt>Data</dt><dd>train.jsonl<small>from a survey; held out: heldout.jsonl</small>",
        "<dt>Began</dt><dd>2023-11-14 22:13 UTC</dd>",
        "<dt>Duration</dt><dd>0:00:40<",  # the first step ended at 10 s and took 10 s, the last event came at 40 s
        "<dt>Steps</dt><dd>6<",
        "<dt>tau0</dt><dd>0.2</dd>",
        "<dt>learner</dt><dd>lr 1e-05</dd>",
        "<span>3 of 3 steps</span>",
        "<span>1 of 4 steps</span>",
    ):
        assert text in page.source


def test_a_reward_model_shows_its_accuracy(tmp_path: Path) -> None:
    events = [
        {"time": START, "pipeline": "reward", "step": 1, "steps": 1, "loss": 0.5, "accuracy": 0.75},
        {"time": START, "pipeline": "reward", "heldout_accuracy": 0.8125, "heldout": 16, "trained_on": 300},
    ]
    page = report(make_run(tmp_path / "run", {"pipelines": [{"name": "reward", "type": "reward"}]}, events))
    assert "held-out accuracy 0.812 on 16 rows" in page.source
    assert '<span class="state finished">' in page.source  # its config asks for no evaluation


# Curves


def test_only_what_has_figures_is_drawn(page: Page) -> None:
    assert [plot.title for plot in plots(EVENTS, ["ple", "dlma", "sc"])] == [
        "Rewards of sampled answers",
        "Gap and threshold τ",
        "Self-reward margins",
        "Similarity of negatives to the target",
        "Pairs in the right order",
        "What filters and bounds take",
        "Throughput",
        "Pool in use",
        "How the pool was shared",
        "Losses",
    ]
    assert "Idle shares" not in page.headings
    assert page.tags.count("figure") == 10


def test_the_page_opens_with_the_slow_side(tmp_path: Path) -> None:
    idle = {"learner_idle": 0.7, "generator_idle": 0.1, "tokens_per_s": 90.0, "seconds": 10.0}
    source = report(make_run(tmp_path / "run", CONFIG, [event("ple", 1, 10, **idle)])).source
    sentence = source.index("Generators are the slow side: learners waited 70% of the time")
    assert source.index("</h1>") < sentence < source.index('class="notices"')
    assert "<code>fleet.generator.replicas</code>" in source


def test_no_plot_of_nulls() -> None:
    assert plots([event("ple", 1, 0, loss=None, gap=None), event("ple", 2, 1, reward_plain=math.inf)], ["ple"]) == []
    assert plots([], ["ple"]) == []
    assert plots([{"pipeline": "ple", "loss": 1.0}], ["ple"]) == []  # of no step


def test_pipelines_share_a_plot_but_not_a_loss() -> None:
    by_title = {plot.title: plot for plot in plots(EVENTS, ["ple", "dlma", "sc"])}
    assert [[key.label for key in chart.legend] for chart in by_title["Losses"].charts] == [["ple"], ["dlma"], ["sc"]]
    [chart] = by_title["What filters and bounds take"].charts
    assert [key.label for key in chart.legend] == ["sc prompts kept"]
    [chart] = by_title["Rewards of sampled answers"].charts
    assert [(key.label, key.dasharray) for key in chart.legend] == [("ple plain", "none"), ("ple guided", "8 4")]
    [chart] = by_title["Self-reward margins"].charts
    assert [key.opacity > 0 for key in chart.legend] == [True, False]  # the quantiles are a band, the mean is none
    assert "PolyCollection" in chart.svg
    colors = {key.label.split()[0]: key.color for plot in by_title.values() for c in plot.charts for key in c.legend}
    assert len({colors["ple"], colors["dlma"], colors["sc"], colors["pool"]}) == 4


def test_a_point_alone_is_seen() -> None:
    [plot] = plots([event("ple", 1, 0, gap=0.5), event("ple", 2, 1), event("ple", 3, 2, gap=0.4)], ["ple"])
    assert len(re.findall(r'<use href="#\S+" x="[\d.]+" y="[\d.]+" style="fill: #0072b2', plot.charts[0].svg)) == 2
    [plot] = plots([event("ple", 1, 0, gap=0.5), event("ple", 2, 1, gap=0.4)], ["ple"])
    assert 'style="fill: #0072b2' not in plot.charts[0].svg


def test_long_runs_are_averaged_and_say_so() -> None:
    rows, each = averaged(np.array([[1.0, 10.0], [2.0, np.nan]] * MOST_POINTS))
    assert each == 2
    assert rows.shape == (MOST_POINTS, 2)
    assert rows[0].tolist() == [1.5, 10.0]
    events = [{"pipeline": "ple", "step": i, "loss": 1.0} for i in range(1, 1001)]
    assert "A point is the mean of 3 steps." in plots(events, ["ple"])[0].caption
    assert "mean" not in plots(events[:MOST_POINTS], ["ple"])[0].caption


def test_the_running_mean_by_hand() -> None:
    mean = running_mean(np.array([1.0, 2.0, 3.0, np.nan, 5.0, 6.0]))
    expected = [2.0, 2.0, 2.75, np.nan, 14 / 3, 5.5]  # (1+2+3)/3, (1+2+3)/3, (1+2+3+5)/4, -, (3+5+6)/3, (5+6)/2
    np.testing.assert_allclose(mean, expected)


def test_every_figure_is_drawn_once() -> None:
    figures = [figure for kind in KINDS for figure in kind.figures]
    assert len(figures) == len(set(figures))


# One page, on its own, harmless


def test_hostile_text_stays_text(page: Page) -> None:
    assert "img" not in page.tags and page.tags.count("script") == 1  # our own
    assert page.tags.count("b") == 2  # the headline's own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    assert HOSTILE in page.headings
    assert BREAKOUT in page.paragraphs
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert page.has_notice(f"sc failed after step 1: loss is nan {HOSTILE} {BREAKOUT}")


def test_hostile_names_do_not_reach_a_drawing() -> None:
    name = f"$x_{{{HOSTILE}"
    for plot in plots([{**e, "pipeline": name} for e in EVENTS[:3]], [name]):
        assert all("script" not in chart.svg and "$" not in chart.svg for chart in plot.charts)


def test_nothing_is_fetched(page: Page) -> None:
    assert "http://" not in page.source and "https://" not in page.source
    assert not {"src", "srcset", "data", "action"} & {key for key, _ in page.attributes}
    assert "@import" not in page.source
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 50
    links = [value for key, value in page.attributes if key == "href"]
    links += [f"#{target}" for target in re.findall(r"url\(#?([^)]*)\)", page.source)]
    assert links and {link.removeprefix("#") for link in links} <= set(ids)


def test_the_policy_of_a_page_lets_its_one_script_run_and_no_other(page: Page) -> None:
    [script] = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [rules] = [value for key, value in page.attributes if key == "content" and "default-src" in value]
    assert "default-src 'none'" in rules and rules.endswith(f"script-src 'sha256-{digest}'")


def test_the_same_files_give_the_same_page(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".report")]


def test_blank_answers_are_told_from_text(page: Page) -> None:
    assert page.paragraphs.count("blank") == 2  # of white space, and absent


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    evaluation = {"rows": [], "samples": [{"prompt": "Smile.", "ple": "\ud83d"}]}
    assert "?" in report(make_run(tmp_path / "run", evaluation=evaluation)).paragraphs


# Unfinished and failed runs


def test_a_failure_is_told_first(run_dir: Path) -> None:
    page = report(run_dir)
    assert '<span class="state failed">failed</span>' in page.source
    assert page.has_notice(f"Unfinished: sc at step 1 of 4. plumbline resume {run_dir} continues it.")
    assert page.row("sc")[:3] == ["1", "2023-11-14 22:14:00 UTC", "ended"]


def test_a_failure_that_was_resumed_is_history(tmp_path: Path) -> None:
    events = [*EVENTS, *(event("sc", step, 50 + step, loss=0.5) for step in (2, 3, 4))]
    page = report(make_run(tmp_path / "run", events=events, evaluation={"rows": ROWS, "samples": []}))
    assert '<span class="state finished">finished</span>' in page.source
    assert page.row("sc")[2] == "resumed to 4"
    assert not page.has_notice("failed") and not page.has_notice("Unfinished")


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", events=EVENTS[:2]))
    assert '<span class="state unfinished">unfinished</span>' in page.source
    assert page.has_notice("Unfinished: ple at step 2 of 3, dlma at step 0 of 2, sc at step 0 of 4.")
    assert page.has_notice("Not evaluated: there is no evaluation.json yet")
    assert "No policy of this run has been evaluated." in page.paragraphs


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", {"name": "new", "pipelines": [{"type": "ple"}]}, events=None))
    assert "There is no event with a figure to draw yet." in page.paragraphs
    assert page.has_notice("Unfinished: ple at step 0 of ?.")


def test_a_run_that_goes_on_is_not_told_to_be_resumed(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", events=EVENTS[:2])
    (run_dir / RUN_LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}")
    page = report(run_dir)
    assert '<span class="state running">running</span>' in page.source
    assert page.has_notice("Going on: ple at step 2 of 3, dlma at step 0 of 2, sc at step 0 of 4.")
    assert page.has_notice("Not evaluated yet") and not page.has_notice("plumbline resume")


def test_a_half_written_last_line_is_left_out_and_told(run_dir: Path) -> None:
    whole = report(run_dir)
    with (run_dir / "events.jsonl").open("a") as file:
        file.write('{"time": 17000000')
    page = report(run_dir)
    assert page.has_notice("The last line of events.jsonl is half-written")
    assert page.source.count("<path") == whole.source.count("<path")
    assert not whole.has_notice("half-written")


# Wrong input


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"pipeline": "ple", "step": 2', "no JSON"),
        ("[]", "should be a JSON object with the name of its `pipeline`"),
        ('{"pipeline": null}', "should be a JSON object with the name of its `pipeline`"),
        ('{"pipeline": "ple", "step": 2, "gap": "wide"}', "`gap` is 'wide'; it should be a number or null"),
        ('{"pipeline": "pool", "shares": {"ple": "half"}}', "`shares.ple` is 'half'; it should be a number or null"),
        ('{"pipeline": "pool", "shares": [1]}', "`shares` is [1]; it should map pipelines to numbers"),
        ('{"pipeline": "ple", "time": -5}', "`time` is -5; it should be seconds since 1970"),
    ],
)
def test_a_broken_line_names_its_row(run_dir: Path, line: str, told: str) -> None:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    (run_dir / "events.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(DataError) as error:
        write_report(run_dir)
    assert str(error.value).startswith(f"{run_dir / 'events.jsonl'}, row 2: ")
    assert told in str(error.value)
    assert not (run_dir / "report.html").exists()


def test_not_a_number_is_nothing_to_draw(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", events=[event("ple", 1, math.nan, gap=math.nan), event("ple", 2, 1, gap=0.5)])
    assert "NaN" in (run_dir / "events.jsonl").read_text()
    assert report(run_dir).tags.count("figure") == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"rows": [',
        '{"rows": []}',
        '{"rows": [{}], "samples": []}',
        "[]",
        '{"rows": [], "samples": [], "prompts": [1]}',
        '{"rows": [], "samples": [], "rewards": [1]}',
        '{"rows": [], "samples": [], "rewards": {"ple": ["high"]}}',
        '{"rows": [], "samples": [], "prompts": ["a", "b"], "rewards": {"ple": [1.0]}}',
    ],
)
def test_a_broken_evaluation_names_the_file(run_dir: Path, text: str) -> None:
    (run_dir / "evaluation.json").write_text(text)
    with pytest.raises(DataError, match=re.escape(str(run_dir / "evaluation.json"))):
        write_report(run_dir)


def test_a_broken_rejected_file_names_itself(run_dir: Path) -> None:
    file = run_dir / "pairs" / "dlma" / "rejected.parquet" / "step-000001.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=re.escape(str(file))):
        write_report(run_dir)


@pytest.mark.parametrize("text", ["- a list", "a: [", "pipelines: ple", "pipelines: [ple]", "sft: 3", "\xff"])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "config.yaml"))):
        write_report(tmp_path)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"there is no config\.yaml in it"):
        write_report(tmp_path)


def test_the_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"plumbline: {tmp_path / 'nowhere'}: no such directory")


def test_each_part_of_a_reward_has_a_plot_of_its_own() -> None:
    given = [
        event("ple", step, step, **{"reward_plain": 0.1, "reward_plain.polite": 0.3, "reward_guided.polite": 0.5})
        for step in (1, 2)
    ]
    [part] = [plot for plot in plots(given, ["ple"]) if plot.title.startswith("Part of")]
    assert part.title == "Part of the reward: polite"
    assert [key.label for key in part.charts[0].legend] == ["ple plain", "ple guided"]
    hostile = [event("ple", step, step, **{f"reward_plain.{BREAKOUT}": 0.3}) for step in (1, 2)]
    assert not plots(hostile, ["ple"])


def test_what_it_takes_to_make_a_run_again_is_told(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    told = [{"code": f"commit {name}", "lock": "cpu.txt 12ab", "packages": "34cd"} for name in ("first", "second")]
    (run_dir / "origin.json").write_text(json.dumps(told))
    rows = [{"source": "data.train", "path": "p", "row": i, "digest": b"12345678"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), run_dir / "rows.parquet")
    text = report(run_dir).source
    for part in ("commit second", "begun with commit first", "cpu.txt 12ab", "34cd", "Rows of data.train"):
        assert part in text, part
    assert digests_by_source(run_dir)["data.train"][1] in text
