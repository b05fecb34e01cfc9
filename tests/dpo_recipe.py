"""A preference recipe as a user of the library would add it: rows with `prompt`, `chosen` and `rejected`."""

import numpy as np
from dpo_objective import DPO

from jaxtrain.roles.reference import reference_role
from jaxtrain.session.session import Session


def run(config):
    with Session.open(config) as session:
        policy = session.trained_role("policy", DPO())
        batches = session.training_data(policy, pairs(session.encoder(policy)), bundle_size=2)
        session.restore(policy, data=batches)
        reference = reference_role(policy)

        def with_reference():
            for batch in batches:
                yield batch._replace(signals={**batch.signals, "ref_logps": reference.logps(batch)})

        for batch in session.steps(with_reference()):
            session.report(policy=policy.update(batch))
    return session.outcome


def pairs(encode):
    def encode_pair(row):
        sides = (("chosen", 1), ("rejected", -1))
        examples = [(encode({"prompt": row["prompt"], "completion": row[side]}), sign) for side, sign in sides]
        return tuple(
            example._replace(signals={"sign": np.full(len(example.input_ids), sign, np.int32)})
            for example, sign in examples
        )

    return encode_pair
