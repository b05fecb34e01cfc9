from converters.errors import ConversionError


def test_errors_of_checkpoints_are_errors_of_values():
    assert issubclass(ConversionError, ValueError)
