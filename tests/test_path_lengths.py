"""How many of our functions stand between a row and the gradient's dispatch, and between a prompt and its trajectory.

Counted with `sys.setprofile`, on all threads that take part: distinct functions defined in jaxtrain/ and converters/
(methods, properties, generators and lambdas; not comprehensions, nor what `dataclass` and `NamedTuple` generate) that
are entered while a warm run makes one more step or rollout, everything compiled and cached. Of the records (NamedTuple,
dataclass) the kinds that are made are counted. `python tests/test_path_lengths.py` prints all names.

The numbers are upper bounds and may only fall: a new layer between a row and the step has to replace another.
"""

import json
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import samplers
import tiny

import jaxtrain
from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.objectives.sft import SFT
from jaxtrain.rl.placement import build_sampler
from jaxtrain.rl.sync import rollout_model
from jaxtrain.roles.role import Snapshot
from jaxtrain.session.session import Session
from jaxtrain.train.lockstep import Lockstep

ROOT = Path(jaxtrain.__file__).parents[1]
OURS = tuple(str(ROOT / package) + "/" for package in ("jaxtrain", "converters"))


class Entered:
    """A profile function: the functions that are entered, and the records made, while `on`."""

    def __init__(self):
        self.functions: set[str] = set()
        self.records: set[str] = set()
        self.on = lambda frame: False

    def __call__(self, frame, event, argument):
        if event == "call" and self.on(frame):
            self.add(frame)

    def add(self, frame) -> None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            if code.co_name not in ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"):
                place = Path(code.co_filename).relative_to(ROOT)
                self.functions.add(f"{place}:{code.co_firstlineno} {code.co_qualname}")
        elif code.co_filename == "<string>" or code.co_name == "_make":
            # What `dataclass` and `NamedTuple` generate: __init__(self, ...), __new__(_cls, ...) and _make(cls, ...).
            first = next((frame.f_locals.get(name) for name in code.co_varnames[:1]), None)
            kind = first if isinstance(first, type) else type(first)
            made = code.co_name in ("__init__", "<lambda>", "_make")
            if made and kind.__module__.split(".")[0] in ("jaxtrain", "converters"):
                self.records.add(kind.__qualname__)


@contextmanager
def profiled(entered: Entered):
    """On this thread, and on those that are started within."""
    threading.setprofile(entered)
    sys.setprofile(entered)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def tokenizer_folder(folder: Path) -> Path:
    write_byte_tokenizer(folder / "tokenizer")
    return folder / "tokenizer"


ROWS = {
    "conversation": lambda a: {"prompt": f"What is {a} + 1?", "completion": str(a + 1)},
    "text": lambda a: {"text": f"{a} + 1 = {a + 1}"},
    "ids": lambda a: {"input_ids": [1 + a % 50, *range(3, 20)]},
}


def row_to_dispatch(folder: Path, kind: str) -> Entered:
    """Threads that read, encode and pack are counted over some steps, since they work ahead; the main thread from the
    moment at which the second step asks for its batch until its update is dispatched."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROWS[kind](a)) + "\n" for a in range(400)))
    tree = {
        "recipe": "sft",
        "run": {"dir": str(folder / kind)},
        "model": {
            "config": tiny.HF_CONFIG | {"vocab_size": 259, "max_position_embeddings": 256},
            "tokenizer": str(tokenizer_folder(folder)),
            "compute_dtype": "float32",
        },
        "data": {"train": {"path": str(folder / "rows.jsonl")}, "max_length": 128, "virtual_shards": 1, "workers": 1},
        "train": {"steps": 8, "batch_size": 8},
        "log": {"every": 100, "to": []},
    }
    entered, main = Entered(), threading.main_thread().ident
    asking = False

    def on(frame) -> bool:
        nonlocal asking
        if threading.get_ident() != main:
            return session.step >= 1
        if session.step == 1 and frame.f_code is Lockstep.__next__.__code__:
            asking = True
            caller = frame.f_back
            while caller is not None:
                entered.add(caller)
                caller = caller.f_back
        return asking

    with Session.open(parse_config(tree, "test")) as session:
        policy = session.trained_role("policy", SFT())
        batches = session.training_data(policy)
        session.restore(policy, data=batches)
        entered.on = on
        with profiled(entered):
            for batch in session.steps(batches):
                report = policy.update(batch)
                asking = False
                session.report(policy=report)
    return entered


def prompt_to_trajectory(folder: Path) -> Entered:
    """`Sampler.sample` of the colocated sampler, warm: three prompts, four samples each, in eight slots."""
    mesh, sampling = samplers.meshes(samplers.COLOCATED)
    model, params = samplers.trained(mesh)
    spec = replace(samplers.spec(rollout_model(model, sampling)), tokenizer=load_tokenizer(tokenizer_folder(folder)))
    sampler = build_sampler(samplers.COLOCATED, spec, model, Snapshot(params, 0))
    entered = Entered()
    for _ in range(2):
        sampler.set_params(params, 1)
        sampler.sample(samplers.PROMPTS, 4)
    entered.on = lambda frame: True
    with profiled(entered):
        (first, *_), *_ = sampler.sample(samplers.PROMPTS, 4)
    assert len(first.completion_ids) > 0
    return entered


@pytest.mark.parametrize(("kind", "most"), [("conversation", 109), ("text", 71), ("ids", 66)])
def test_from_a_row_to_the_dispatch_of_its_gradient(tmp_path, kind, most):
    found = row_to_dispatch(tmp_path, kind).functions
    assert len(found) <= most, "\n".join(sorted(found))


def test_from_a_prompt_to_its_trajectory(tmp_path):
    found = prompt_to_trajectory(tmp_path)
    assert len(found.functions) <= 55, "\n".join(sorted(found.functions))
    assert len(found.records) <= 12, sorted(found.records)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: row_to_dispatch(Path(folder), kind) for kind in ROWS}
        paths["rollout"] = prompt_to_trajectory(Path(folder))
    for name, entered in paths.items():
        print(f"{name}: {len(entered.functions)} functions, {len(entered.records)} kinds of records")
        print("", *sorted(entered.functions), sorted(entered.records), sep="\n  ")
