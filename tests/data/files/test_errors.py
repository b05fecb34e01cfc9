from jaxtrain.data.files.errors import DataError, suggest


def test_a_similar_name_is_suggested_and_else_all_are_listed():
    assert suggest("trian", ["train", "test"]) == "; did you mean 'train'?"
    assert suggest("xyz", ["train", "test"]) == "; there are 'train', 'test'"


def test_errors_of_data_are_value_errors():
    assert issubclass(DataError, ValueError)
