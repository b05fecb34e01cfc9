"""The report of runs as an HTML page."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from jaxtrain.cli import app
from jaxtrain.observe.report_page import ReportPage, write_page

TEXT = "</script><script>alert(1)</script> <!-- __SCRIPT__ __DATA__"


def make_run(folder, *, rate=0.1, lines=40):
    folder.mkdir(parents=True)
    config = {"recipe": "rl", "optimizer": {"learning_rate": rate}, "data": {"train": {"path": "a.jsonl"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": step, "loss": 10.0 / step, "data/bad_rows": 2.0} for step in range(1, lines + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {
        "step": 7,
        "columns": json.dumps({"prompt": TEXT}),
        "text": "an answer",
        "reward": float("nan"),
        "rewards": [("digits", 0.5)],
        "advantages": [2.0, 4.0, 0.0],
        "loss_mask": [True, True, False],
        "finish_reason": "stop",
    }
    (folder / "first_rows.json").write_text(json.dumps([[[TEXT, 0.0], ["an answer", 1.0]]]))
    (folder / "trajectories").mkdir()
    kinds = {"rewards": pa.map_(pa.string(), pa.float64())}
    schema = pa.schema([(name, kinds.get(name) or pa.array([value]).type) for name, value in sample.items()])
    pq.write_table(pa.Table.from_pylist([sample], schema), folder / "trajectories" / "step_00000007.parquet")
    return folder


def data_of(page):
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(block)


def test_the_page_has_the_curves_the_samples_and_the_config_and_needs_nothing_else(tmp_path):
    page = write_page([make_run(tmp_path / "one")])
    assert page == tmp_path / "one" / "report.html"
    (run,) = data_of(page)
    assert run["name"] == "one" and run["series"]["loss"][1][-1] == 10.0 / 40
    assert run["best"]["loss"] == [40, 10.0 / 40]
    assert run["rows"] == [[[TEXT, 0.0], ["an answer", 1.0]]]
    (group,) = run["samples"]
    (row,) = group["rows"]
    assert row["prompt"] == TEXT and row["text"] == "an answer"  # as they are, whatever they hold
    assert row["reward"] is None and row["advantage"] == 3.0 and row["tokens"] == "2 trained of 3, stop"
    assert ["rows", "2 bad rows"] in run["facts"] and "learning_rate: 0.1" in run["config"]
    text = page.read_text()
    assert text.count("<script") == text.count("</script>") == 2
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)", text)


def test_several_runs_are_told_apart_and_long_curves_are_thinned(tmp_path):
    first, second = make_run(tmp_path / "a" / "run", lines=5000), make_run(tmp_path / "b" / "run", rate=0.2)
    page = tmp_path / "both.html"
    done = CliRunner().invoke(app, ["report", str(first), str(second), "--out", str(page)])
    assert done.exit_code == 0 and str(page) in done.output
    found = data_of(page)
    assert [run["name"] for run in found] == ["a/run", "b/run"]
    assert [run["keys"]["optimizer.learning_rate"] for run in found] == ["0.1", "0.2"]
    steps, values = found[0]["series"]["loss"]
    assert len(steps) == len(values) <= 600 and steps[-1] == 5000
    assert values == sorted(values, reverse=True)
    assert isinstance(CliRunner().invoke(app, ["report", str(first), str(second)]).exception, ValueError)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        write_page([tmp_path])


def test_a_run_goes_on_where_its_report_cannot_be_written(tmp_path, caplog):
    page = ReportPage(make_run(tmp_path / "run"))
    page.update()
    written = (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "report.html").unlink()
    page.update()  # not yet again
    assert not (tmp_path / "run" / "report.html").exists()
    (tmp_path / "run" / "metrics.jsonl").write_text("{]\n")
    page.write()
    page.write()
    assert caplog.text.count("cannot be written") == 1 and len(written) > 1000
