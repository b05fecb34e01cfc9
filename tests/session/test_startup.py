"""What a run says before its first step."""

import jax
import recipe_runs

from jaxtrain.config import load_config
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.session.roles import RunRoles
from jaxtrain.session.startup import RunLength, start_facts


def test_the_numbers_are_those_of_the_declared_model(tmp_path):
    config = load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml", ["model.lora={rank: 2}", "mesh.data=2"])
    role = RunRoles(config, make_mesh(config.mesh), jax.devices()).trained_role("policy", config.objective)
    facts = dict(start_facts(config, [role], None, RunLength(3, 6, 96)))
    trained = sum(leaf.size for leaf in jax.tree.leaves(role.abstract_state().params))
    total = trained + sum(leaf.size for leaf in jax.tree.leaves(role.declared.frozen))
    assert f"{total:,} parameters, {trained:,} ({trained / total:.2%}) are trained, LoRA of rank 2" in facts["model"]
    assert facts["run"].startswith(f"sft in {config.run.dir}, resumed after step 3")
    assert facts["steps"] == "6 of 8 rows x 96 tokens = 768 tokens"
    assert facts["devices"] == f"{len(jax.devices())} x cpu, mesh: data 2, fsdp {len(jax.devices()) // 2}"
    assert facts["data"] == str(tmp_path / "train.jsonl")
