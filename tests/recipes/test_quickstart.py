import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxtrain.config import load_config
from jaxtrain.recipes import quickstart
from jaxtrain.recipes.made_files import MARK, find_run_conflicts, replacing_files, replacing_run
from jaxtrain.recipes.quickstart import first_step_with, load_quickstart
from jaxtrain.session.lock import FolderLock
from jaxtrain.session.record import remove_quickstart_mark

ROOT = Path(__file__).parents[2]
SFT, RL = Path("configs/quickstart/sft.yaml"), Path("configs/rl/quickstart.yaml")


@pytest.mark.parametrize(
    ("share", "expected"), [(0.4, (50, 0.45)), (0.45, (50, 0.45)), (0.5, (100, 0.7)), (0.9, (150, 0.6))]
)
def test_the_initial_model_is_the_first_accurate_checkpoint_or_the_last(tmp_path, share, expected):
    matches = {25: 0.1, 50: 0.45, 75: 0.4, 100: 0.7, 150: 0.6}
    lines = [{"step": step, "loss": 1.0} for step in range(1, 151)]
    lines += [{"step": step, "eval_exact_match": match} for step, match in matches.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert first_step_with(tmp_path, share) == expected


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def no_training(monkeypatch):
    """The quickstart up to the point where it trains."""

    class Trained(Exception):
        pass

    def train(config, **_):
        (Path(config.run.dir) / "metrics.jsonl").write_text(str(config.run.seed))  # as training would
        raise Trained

    monkeypatch.setattr(quickstart.sft, "run", train)
    monkeypatch.setattr(quickstart.rl, "run", train)
    return Trained


def test_user_files_are_refused_by_name_before_any_change(tmp_path, monkeypatch, no_training):
    monkeypatch.chdir(tmp_path)
    config = {
        "recipe": "sft",
        "run": {"dir": "precious"},
        "model": {"path": "mymodel", "tokenizer": "mymodel", "compute_dtype": "float32", "remat": "none"},
        "data": {
            "train": {"path": "gsm8k/train.jsonl", "columns": {"prompt": "question", "completion": "answer"}},
            "eval": {"path": "gsm8k/eval.jsonl", "columns": {"prompt": "question", "completion": "answer"}},
            "max_length": 1024,
        },
        "train": {"steps": 2, "batch_size": 2},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    for file in ("precious/thesis.txt", "mymodel/tokenizer.json", "gsm8k/train.jsonl", "gsm8k/eval.jsonl"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="replaces only files that it made") as error:
        quickstart.run(load_config("config.yaml"))
    for name in ("precious", "mymodel", "gsm8k/train.jsonl", "gsm8k/eval.jsonl"):
        assert f"  {name}: not made by the quickstart" in str(error.value)
    assert content(tmp_path) == before


def quick(place: Path, *overrides: str):
    paths = [
        f"run.dir={place / 'run'}",
        f"model.tokenizer={place / 'data' / 'tokenizer'}",
        f"data.train.path={place / 'data' / 'train.jsonl'}",
        f"data.eval.path={place / 'data' / 'eval.jsonl'}",
    ]
    return load_config(ROOT / SFT, [*paths, *overrides])


def test_only_unchanged_files_of_the_quickstart_are_replaced(tmp_path, no_training):
    with pytest.raises(no_training):
        quickstart.run(quick(tmp_path))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "0"
    with pytest.raises(no_training):
        quickstart.run(quick(tmp_path, "run.seed=1"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "1"

    (tmp_path / "run" / "notes.txt").write_text("mine")
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write("{}\n")
    (tmp_path / "data" / "tokenizer" / "merges.txt").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ValueError) as error:
        quickstart.run(quick(tmp_path))
    assert f"{tmp_path / 'run' / 'notes.txt'}: not made by the quickstart" in str(error.value)
    assert f"{tmp_path / 'data' / 'train.jsonl'}: changed since the quickstart made it" in str(error.value)
    assert f"{tmp_path / 'data' / 'tokenizer' / 'merges.txt'}: not made by the quickstart" in str(error.value)
    assert "eval.jsonl" not in str(error.value)
    assert content(tmp_path) == before


def test_incomplete_files_of_a_killed_quickstart_are_replaced(tmp_path, no_training):
    with pytest.raises(KeyboardInterrupt), replacing_files(tmp_path / "data", ["train.jsonl", "eval.jsonl"]):
        (tmp_path / "data" / "train.jsonl").write_text("ha")
        raise KeyboardInterrupt
    with pytest.raises(no_training):
        quickstart.run(quick(tmp_path))


def test_files_added_to_a_finished_run_belong_to_the_user(tmp_path):
    run = tmp_path / "run"
    with replacing_run(run):
        (run / "export").mkdir()
        (run / "export" / "config.json").write_text("{}")
        (run / "metrics.jsonl").write_text("1")
    assert find_run_conflicts(run) == []
    (run / "export" / "thesis.txt").write_text("mine")
    (run / "metrics.jsonl").write_text("2")
    assert find_run_conflicts(run) == [
        f"{run / 'export' / 'thesis.txt'}: not made by the quickstart",
        f"{run / 'metrics.jsonl'}: changed since the quickstart made it",
    ]


def test_another_run_in_the_quickstarts_folder_removes_the_mark(tmp_path):
    run = tmp_path / "run"
    with replacing_run(run):
        remove_quickstart_mark(run)
        assert (run / MARK).exists()  # the quickstart trains in its own process
    (run / MARK).write_text('{"process": 0}')  # one that was killed
    remove_quickstart_mark(run)
    (run / "metrics.jsonl").write_text("1")
    assert find_run_conflicts(run) == [f"{run}: not made by the quickstart"]


def test_the_quickstart_refuses_the_folder_of_a_running_run(tmp_path, no_training):
    with pytest.raises(no_training):
        quickstart.run(quick(tmp_path))
    with FolderLock(tmp_path / "run"):
        before = content(tmp_path)
        with pytest.raises(ValueError, match="is in use by process"):
            quickstart.run(quick(tmp_path))
        assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.path=data/rows.jsonl", "must be train.jsonl and eval.jsonl in the same folder"),
        ("run.dir={place}/data", "must not be inside of it"),
    ],
)
def test_paths_that_it_cannot_write_to_are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        quickstart.run(quick(tmp_path, override.format(place=tmp_path)))
    assert not list(tmp_path.iterdir())


def rl_config(place: Path):
    paths = [f"model.path={place / 'data' / 'model'}", f"run.dir={place / 'run'}"]
    paths += [f"data.{part}.path={place / 'data' / part}.jsonl" for part in ("train", "eval")]
    return load_config(ROOT / RL, paths)


def test_the_initial_model_never_replaces_user_files_and_an_existing_one_is_kept(tmp_path, no_training):
    first = load_config(ROOT / SFT)
    worked = tmp_path / "data" / "worked" / "train.jsonl"
    worked.parent.mkdir(parents=True)
    worked.write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"worked/train\.jsonl: not made by the quickstart"):
        quickstart.run_from_first(rl_config(tmp_path), first)
    assert content(tmp_path) == before

    worked.unlink()
    for _ in range(2):
        with pytest.raises(no_training):
            quickstart.run_from_first(rl_config(tmp_path), first)
    assert (tmp_path / "data" / "first" / MARK).exists()

    (tmp_path / "data" / "model").mkdir()
    worked.write_text("mine")
    before = content(tmp_path / "data")
    with pytest.raises(no_training):
        quickstart.run_from_first(rl_config(tmp_path), first)
    assert content(tmp_path / "data") == before


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    expected = load_config(ROOT / SFT)
    monkeypatch.chdir(tmp_path)
    assert load_quickstart(SFT) == expected
    config = load_quickstart(RL)
    assert config.rl is not None
    assert [reward.function for reward in config.rl.rewards] == [
        "exact_answer",
        f"{ROOT / 'configs' / 'rl' / 'worked_steps.py'}:worked_steps",
    ]
    SFT.parent.mkdir(parents=True)  # one of the user's own goes first
    SFT.write_text((ROOT / SFT).read_text().replace("steps: 700", "steps: 7"))
    assert load_quickstart(SFT, ["optimizer.warmup_steps=0"]).train.steps == 7
    with pytest.raises(ValueError, match=r"no config file configs/rl/quickstrat\.yaml"):
        load_quickstart(Path("configs/rl/quickstrat.yaml"))


def test_a_wheel_holds_the_configs_and_finds_them(tmp_path):
    """This command builds the same wheel as `pip wheel`."""
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path),
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    code = (
        "from pathlib import Path; from jaxtrain.recipes.quickstart import load_quickstart\n"
        f"print(load_quickstart(Path('{RL}')).rl.rewards[1].function)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "lib"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{tmp_path}/lib/jaxtrain/configs/rl/worked_steps.py:worked_steps"
