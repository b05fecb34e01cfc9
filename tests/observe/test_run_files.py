from jaxtrain.observe import run_files


def test_every_file_of_a_run_but_the_lock_is_listed():
    hidden = {run_files.LOCK, run_files.ORIGIN, run_files.QUICKSTART_MARK}
    names = {value for name, value in vars(run_files).items() if name.isupper() and isinstance(value, str)}
    assert names - hidden <= set(run_files.RUN_FILES) and not hidden & set(run_files.RUN_FILES)
