import json

import pytest

from jaxtrain.data.arithmetic import problem_row, write_arithmetic


def problems(path):
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def test_held_out_problems_are_never_trained_on_and_answers_are_right(tmp_path):
    files = write_arithmetic(tmp_path, 3000, 200, seed=0)
    train, held_out = problems(files.train), problems(files.eval)
    assert (len(train), len(held_out)) == (3000, 200)
    questions = [user["content"] for user, _ in train + held_out]
    assert len(set(questions)) == 3200
    for user, assistant in train + held_out:
        a, sign, b = user["content"].removeprefix("What is ").removesuffix("?").split()
        assert int(assistant["content"].split()[-1]) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0


def test_the_seed_decides(tmp_path):
    texts = [write_arithmetic(tmp_path / str(n), 50, 5, seed=n // 2).train.read_text() for n in range(4)]
    assert texts[0] == texts[1] != texts[2] == texts[3]


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        ((47, "+", 38), "7+8+0=15, 4+3+1=8. The answer is 85"),
        ((99, "+", 1), "9+1+0=10, 9+0+1=10. The answer is 100"),
        ((83, "-", 26), "13-6-0=7, 8-2-1=5. The answer is 57"),
    ],
)
def test_every_digit_is_worked(problem, answer):
    assert problem_row(*problem)["messages"][1]["content"] == answer


def test_too_many_problems_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only 155 problems have numbers of 1 digits"):
        write_arithmetic(tmp_path, 70, 20, seed=0, digits=1)
