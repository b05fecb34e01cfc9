"""Runs the examples of the documentation, and checks that the reference is up to date."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from converters.export_hf import export_hf
from converters.import_hf import read_config
from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.nn.model import Model

ROOT = Path(__file__).parent.parent
START = ROOT / "docs" / "start.md"
NOTEBOOK = ROOT / "docs" / "notebooks" / "tpu.ipynb"
MODEL = tiny.HF_CONFIG | {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 259,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", START.read_text(), re.DOTALL)


def length(code: str) -> int:
    """The number of lines that are not blank."""
    return len([line for line in code.splitlines() if line.strip()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a small random model."""
    import jax

    where = tmp_path_factory.mktemp("start")
    write_byte_tokenizer(where / "tokenizer")
    config, hf = read_config(MODEL)
    params = Model(config).init(jax.random.key(0))
    export_hf(params, config, hf, where / "model", tokenizer_from=where / "tokenizer")
    return where


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    file = folder / "example.py"
    file.write_text(code)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, file.name], cwd=folder, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_fifteen_lines_fine_tune_sample_and_save(folder):
    tune, use = examples()[:2]
    assert length(tune) <= 15
    # A random model learns nothing at the learning rate of a trained one.
    tune = tune.replace('"train": {"steps": 20}', '"train": {"steps": 20}, "optimizer": {"learning_rate": 0.01}')
    done = run(tune, folder)
    lines = (folder / "runs/sums/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    assert sorted(path.name for path in (folder / "sums").glob("*.safetensors")) == ["model.safetensors"]
    assert done.stderr == ""  # no other library logs
    # Without the time, the answer, and what a slow machine announces.
    said = [line[9:] for line in done.stdout.splitlines() if line[2:3] == ":" and not line.endswith("the start)")]
    names = [line.split()[0] for line in said if not line.startswith(" ")]
    assert names[:2] == ["run", "model"] and names[-2:] == ["report", "next"], done.stdout
    steps = [number for number, name in enumerate(names) if name == "step"]
    assert steps == list(range(steps[0], steps[-1] + 1)) and names[steps[-1] + 1] == "finished", done.stdout
    assert len(run(use, folder).stdout.splitlines()) >= 2
    again = run(tune.replace('"sums")', '"sums-again")'), folder)
    assert "finished" in again.stdout


def test_the_notebook_trains_and_shows_the_lines_of_progress_and_its_results_alone(folder):
    """Run by a kernel of its own: nothing of other libraries, and no progress that writes over itself."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    install, settings, train, losses, answer = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert install.source.startswith("%pip install")
    values = dict(re.findall(r"^([A-Z]+) = (.*?)(?:  #.*)?$", settings.source, re.MULTILINE))
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(6) for b in range(6)]
    source = repr({"rows": rows})[:-1] + ', "columns": COLUMNS}'
    small = {"MODEL": '"model"', "TRAIN": source, "TEST": source, "LENGTH": "128", "STEPS": "20", "RATE": "0.01"}
    assert values.keys() == small.keys() | {"COLUMNS"}
    settings.source = "\n".join(f"{name} = {value}" for name, value in (values | small).items())
    answer.source = answer.source.replace("max_tokens=256", "max_tokens=8")
    notebook.cells = [settings, train, losses, answer]
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    assert [out for cell in notebook.cells for out in cell.outputs if out.get("name") == "stderr"] == []
    text = "".join(out.text if out.output_type == "stream" else out.data["text/plain"] for out in train.outputs)
    assert "\r" not in text and "\x1b" not in text
    shown = [line.split()[1:3] for line in text.splitlines() if line[9:].startswith("step ") and "  loss" in line]
    assert shown == [["step", "1/20"], ["step", "10/20"], ["step", "20/20"]], text
    assert settings.outputs == [] and "'eval_loss'" in losses.outputs[0].data["text/plain"]
    assert [out.name for out in answer.outputs] == ["stdout"]
    assert list((folder / "qwen3-gsm8k").glob("*.safetensors"))


def test_the_custom_objective_is_cross_entropy_without_its_exponent(tmp_path):
    import jax.numpy as jnp
    import numpy as np

    from jaxtrain.objectives import SFT, Batch, Norm, Scores

    (code,) = re.findall(r"```python\n(from dataclasses.*?)```", (ROOT / "docs" / "modules.md").read_text(), re.DOTALL)
    (tmp_path / "focal.py").write_text(code)
    random = np.random.default_rng(0)
    weights = jnp.asarray(random.integers(0, 2, (2, 8)), jnp.float32)
    ids = jnp.ones((2, 8), jnp.int32)
    batch, norm = Batch(ids, ids, ids, weights), Norm(weights.sum(), *jnp.full(3, 2.0))
    logp = jnp.log(jnp.asarray(random.uniform(0.1, 0.9, (2, 8)), jnp.float32)) * weights
    scores = Scores(logp=logp, entropy=-logp, correct=weights)
    tree = {"recipe": "sft", "model": {"path": "model"}, "data": {"train": {"path": "x"}}, "train": {"steps": 1}}

    def loss(gamma):
        objective = {"name": f"{tmp_path / 'focal.py'}:FocalLoss", "gamma": gamma}
        return parse_config(tree | {"objective": objective}).objective(scores, batch, norm)

    value, metrics = loss(0.0)
    np.testing.assert_allclose(value, SFT()(scores, batch, norm)[0], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].value, value, rtol=1e-6)
    p = np.exp(logp)
    np.testing.assert_allclose(loss(2.0)[0], np.sum(-((1 - p) ** 2) * logp * weights) / weights.sum(), rtol=1e-6)


def test_twenty_five_lines_run_grpo_on_a_custom_environment(folder):
    code = examples()[2]
    assert length(code) <= 25
    done = run(code.replace('"steps": 20', '"steps": 2'), folder)
    assert float(done.stdout.splitlines()[-1]) >= 0
    assert (folder / "backwards" / "config.json").is_file()
    assert list((folder / "runs/backwards/trajectories").glob("*.parquet"))


def test_the_reference_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.reference(), "run python docs/make_reference.py"
    assert script.CONFIG_PAGE.read_text() == script.config_reference(), "run python docs/make_reference.py"
    assert script.MIGRATION_PAGE.read_text() == script.migration_reference(), "run python docs/make_reference.py"
    shown = [name for names in script.SECTIONS.values() for name in names]
    import jaxtrain

    assert sorted(shown) == sorted(jaxtrain.__all__)


@pytest.mark.parametrize("package", ["jaxtrain", "jaxtrain.objectives", "jaxtrain.rl"])
def test_a_page_of_names_is_the_same_for_a_type_checker(package):
    module = importlib.import_module(package)
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            typed[alias.asname or alias.name] = f"{node.module}:{alias.name}"
    assert sorted(typed) == sorted(module.__all__) == sorted(module._WHERE)
    assert set(typed) <= set(dir(module))
    for name, where in typed.items():
        assert module._WHERE[name] in (where, where.replace(":", ".")), name
        getattr(module, name)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        module.nothing_like_it  # noqa: B018


@pytest.mark.parametrize("torch", ["there", "missing"])
def test_importing_jaxtrain_imports_nothing_and_using_it_prints_nothing(torch):
    heavy = ("jax", "flax", "optax", "orbax", "transformers", "numpy", "pydantic")
    hide = "sys.modules['torch'] = None" if torch == "missing" else ""
    code = f"""
import sys
{hide}
import jaxtrain as jt
assert not [name for name in {heavy} if name in sys.modules]
for name in jt.__all__:
    getattr(jt, name)
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
