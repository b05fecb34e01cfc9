"""Where the reference of a preference run is, and which model it is."""

import numpy as np
import pytest
from recipe_runs import losses, train

from jaxtrain.session.export import export_run


def test_the_mesh_the_microbatches_and_the_references_devices_do_not_matter(preference_run):
    place, whole = preference_run
    found = train(place, "devices", "reference.devices=4", "train.microbatches=2")
    np.testing.assert_allclose(losses(found), losses(whole), rtol=2e-5)
    np.testing.assert_allclose(losses(found, "eval_loss"), losses(whole, "eval_loss"), rtol=2e-5)


def test_another_model_is_the_reference_and_another_tokenizer_is_refused(preference_run):
    place, _ = preference_run
    export_run(place / "whole", place / "trained")
    found = train(place, "other", f"reference.path={place / 'trained'}", "train.steps=1")
    assert losses(found)[0] > np.log(2) + 1e-3  # the policy begins below the trained reference
    tokenizer = place / "trained" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a":', '"~a~":', 1))
    with pytest.raises(ValueError, match="has another tokenizer than the policy"):
        train(place, "refused", f"reference.path={place / 'trained'}")
