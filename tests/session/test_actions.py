import pytest

from jaxtrain.config.sections import CallbackSection
from jaxtrain.session.actions import load_callback


def test_a_callback_is_loaded_from_a_file_or_a_module(tmp_path):
    (tmp_path / "notes.py").write_text("def note(session): return session + 1")
    assert load_callback(CallbackSection(every=1, function=f"{tmp_path / 'notes.py'}:note"))(1) == 2
    assert load_callback(CallbackSection(every=1, function="math:sqrt"))(4) == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("math:nothing", "math has no nothing"),
        ("math:pi", "math:pi is not a function but float"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(function, message):
    with pytest.raises(ValueError, match=message):
        load_callback(CallbackSection(every=1, function=function))
