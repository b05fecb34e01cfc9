import sys

import pytest

from jaxtrain.lazy import lazy


def test_a_name_is_imported_when_it_is_used(tmp_path, monkeypatch):
    (tmp_path / "used_late.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    get, _ = lazy("package", {"answer": "used_late:answer", "module": "used_late"})
    assert "used_late" not in sys.modules
    assert get("answer") == 42
    assert get("module") is sys.modules.pop("used_late")


def test_an_unknown_name_is_an_attribute_error_of_the_package():
    with pytest.raises(AttributeError, match="module 'package' has no attribute 'other'"):
        lazy("package", {})[0]("other")


def test_the_names_are_those_of_the_package_and_of_its_modules():
    _, names = lazy("jaxtrain.lazy", {"later": "json:loads"})
    assert {"later", "lazy", "import_module"} <= set(names())
