"""The bodies of responses."""

from jaxtrain.serve.answers import ChatMessage, error_answer


def test_what_is_not_set_is_left_out():
    assert ChatMessage(content="a").model_dump_json(exclude_unset=True) == '{"content":"a"}'
    assert ChatMessage(content=None).model_dump_json(exclude_unset=True) == '{"content":null}'


def test_an_error_has_all_fields_of_openais():
    error = {"message": "no", "type": "server_error", "param": None, "code": None}
    assert error_answer("no", "server_error").model_dump(exclude_unset=True)["error"] == error
