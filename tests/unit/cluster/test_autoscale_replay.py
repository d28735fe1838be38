"""`expertmesh autoscale simulate`: traces, mistakes in them, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.autoscale_replay import read_trace
from cluster.cli import app
from protos.errors import ConfigurationError

runner = CliRunner()
POLICY = "[autoscale]\nmax_groups = 4\nupscale_delay_s = 4\ndownscale_delay_s = 20\n"


def trace_of(tmp_path: Path, busy: list[float]) -> Path:
    """One group that is so busy, every two seconds."""
    lines = [f"{2 * i},{share},3" for i, share in enumerate(busy)]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["t_s,group_busy,num_requests", *lines]) + "\n")
    return path


def simulate(tmp_path: Path, trace: Path, *flags: str) -> str:
    (tmp_path / "mesh.toml").write_text(POLICY)
    config = ("--config", str(tmp_path / "mesh.toml"))
    answer = runner.invoke(app, ["autoscale", "simulate", "--trace", str(trace), *config, *flags])
    assert answer.exit_code == 0, answer.stderr
    return answer.stdout


def test_a_burst_brings_a_group_and_its_end_takes_it_away(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [0.3] * 5 + [1.0] * 10 + [0.2] * 30)
    lines = simulate(tmp_path, trace, "--json", "--start", "6").splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 45
    changes = [
        (d["unix_s"], d["groups"]["count"], d["groups"]["wanted"])
        for d in found
        if d["groups"]["count"] != d["groups"]["wanted"]
    ]
    # busy from 10 s, wished for 4 s; free from 30 s, wished for 20 s
    assert changes == [(14.0, 1, 2), (50.0, 2, 1)]
    assert [d["groups"]["ready"] for d in found[7:12]] == [1, 1, 1, 2, 2]
    assert found[9]["load"] == {"group_busy": 0.5, "num_requests": 3.0}, "2 share what 1 had"


def test_what_explain_prints_can_be_replayed(tmp_path: Path) -> None:
    first = simulate(tmp_path, trace_of(tmp_path, [1.0] * 8), "--json")
    again = tmp_path / "again.jsonl"
    again.write_text(first)
    assert simulate(tmp_path, again, "--json") == first


def test_people_see_the_changes_and_the_last_sums(tmp_path: Path) -> None:
    shown = simulate(tmp_path, trace_of(tmp_path, [1.0] * 8))
    assert "1 changes in 8 decisions" in shown
    assert "1 -> 2" in shown
    assert "busy 50% of the time, target 70%" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--trace must hold a line of load"),
        ("t_s,group_bsy\n0,1\n", "trace.csv:2 must hold only t_s, routers, groups, prompt_tok"),
        ("t_s,group_busy\n0,x\n", 'trace.csv:2 group_busy must be a number of 0 or more, got "x"'),
        ("t_s,group_busy\n0,-1\n", "trace.csv:2 group_busy must be a number of 0 or more"),
        ("t_s,group_busy\n,1\n", "trace.csv:2 t_s must be set"),
        ("t_s\n2\n2\n", "trace.csv:3 t_s must be above 2"),
        ("t_s\n2,3\n", "trace.csv:2 must hold only"),
        ('{"t_s": 1}\n{oops\n', "line 2 must be JSON"),
        ('{"t_s": 1}\n[]\n', "line 2 must be a JSON object"),
        ('{"unix_s": 1, "load": {}, "groups": {}}\n', "trace.csv:1 groups must be a number"),
        ('{"unix_s": 1, "load": {}, "groups": []}\n', "trace.csv:1 groups must be a number"),
    ],
)
def test_a_mistake_in_a_trace_is_named_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_trace(path)
    assert message in str(caught.value)


def test_a_missing_trace_is_a_configuration_error(tmp_path: Path) -> None:
    answer = runner.invoke(app, ["autoscale", "simulate", "--trace", str(tmp_path / "no.csv")])
    assert answer.exit_code == 3
    assert "--trace must be a readable file" in answer.stderr


def test_an_empty_cell_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("t_s,group_busy,routers\n1,,2\n")
    (moment,) = read_trace(path)
    assert (moment.load.group_busy, moment.counts) == (None, {"routers": 2})
