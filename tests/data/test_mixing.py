import json
from collections import Counter

import pytest

from jaxtrain.config import SourceSection
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.sources import Source


@pytest.fixture
def source(tmp_path):
    def make(rows, **section):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps({"text": str(row)}) + "\n" for row in range(rows)))
        return Source(SourceSection(path=str(path), **section))

    return make


def draws(mixture, count=None, start=None):
    counts, drawn = start or mixture.start, []
    while (count is None or len(drawn) < count) and (draw := mixture.draw(counts)) is not None:
        drawn.append(draw)
        counts = draw.counts
    return drawn


def shards(sources, num_shards, **options):
    options = {"seed": 0, "shuffle": True} | options
    return [Mixture(sources, shard=shard, num_shards=num_shards, **options) for shard in range(num_shards)]


@pytest.mark.parametrize("num_shards", [1, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8, 29])
def test_every_row_comes_exactly_once_an_epoch(source, rows, num_shards):
    drawn = [draw.row for shard in shards([source(rows, epochs=3)], num_shards) for draw in draws(shard)]
    assert Counter(drawn) == dict.fromkeys(range(rows), 3)


def test_epochs_are_shuffled_anew_and_by_the_seed(source):
    def epochs(**options):
        (mixture,) = shards([source(50)], 1, **options)
        rows = [draw.row for draw in draws(mixture, 150)]
        return rows[:50], rows[50:100], rows[100:]

    first, second, third = epochs()
    assert sorted(first) == sorted(second) == sorted(third) == list(range(50))
    assert len({tuple(first), tuple(second), tuple(third), tuple(range(50))}) == 4
    assert epochs() == (first, second, third)
    assert epochs(seed=1)[0] != first
    assert epochs(shuffle=False)[1] == list(range(50))


@pytest.mark.parametrize("rows", [1000, 20_000])  # by a table, by a cipher
def test_shuffling_moves_rows_far(source, rows):
    (mixture,) = shards([source(rows)], 1)
    order = [draw.row for draw in draws(mixture, 2 * rows)]
    assert sorted(order[:rows]) == sorted(order[rows:]) == list(range(rows)) and order[:rows] != order[rows:]
    moved = sum(abs(row - place) for place, row in enumerate(order[:rows])) / rows
    assert 0.3 < moved / rows < 0.37  # a uniform permutation moves a row by a third of the length


def test_counts_follow_the_weights_at_every_moment(source):
    sources = [source(100, weight=3.0), source(7, weight=1.0), source(30, weight=0.5)]
    for mixture in shards(sources, 3):
        for step, draw in enumerate(draws(mixture, 400), 1):
            shares = [step * weight / 4.5 for weight in (3.0, 1.0, 0.5)]
            assert all(abs(count - share) < 2 for count, share in zip(draw.counts, shares, strict=True))


def test_shards_draw_from_different_sources_at_the_same_time(source):
    sources = [source(100), source(100)]
    together = zip(*([draw.source for draw in draws(mixture, 50)] for mixture in shards(sources, 8)), strict=True)
    assert all(0 < sum(step) < 8 for step in together)


def test_a_source_that_runs_dry_is_left_out_and_the_others_go_on(source):
    (mixture,) = shards([source(5, epochs=2, weight=9.0), source(50, epochs=1)], 1)
    drawn = draws(mixture)
    assert Counter(draw.source for draw in drawn) == {0: 10, 1: 50}
    assert {draw.source for draw in drawn[20:]} == {1}
    (endless,) = shards([source(5, epochs=1), source(3)], 1)
    assert Counter(draw.source for draw in draws(endless, 100)) == {0: 5, 1: 95}


@pytest.mark.parametrize("num_shards", [1, 4, 8])
@pytest.mark.parametrize(
    ("epochs", "drawn"), [(1, {0: 10, 1: 10, 2: 10}), (2, {0: 20, 1: 20, 2: 20}), (0.25, {0: 3, 1: 3, 2: 3})]
)
def test_an_epoch_of_a_mixture_keeps_the_shares_until_the_last_source_was_passed(source, num_shards, epochs, drawn):
    mixtures = shards([source(3), source(10), source(7)], num_shards)
    assert not mixtures[0].finite and mixtures[0].epoch_rows == 30
    for mixture in mixtures:
        mixture.end_after(epochs)
    assert mixtures[0].finite and mixtures[0].rows == sum(drawn.values())
    all_drawn = [draw for mixture in mixtures for draw in draws(mixture)]
    assert Counter(draw.source for draw in all_drawn) == drawn
    if epochs == 1:
        assert Counter(draw.row for draw in all_drawn if draw.source == 1) == dict.fromkeys(range(10), 1)


def test_an_epoch_of_one_source_passes_over_it_once(source):
    (mixture,) = shards([source(7, weight=0.3)], 1)
    for epochs in (1, 2, 3):
        mixture.end_after(epochs)
        assert len(draws(mixture)) == 7 * epochs


def test_counts_are_all_there_is_to_remember(source):
    sources = [source(9), source(4, weight=2.0)]
    (mixture,) = shards(sources, 1)
    (again,) = shards(sources, 1)
    whole = draws(mixture, 60)
    assert draws(again, 40, start=whole[19].counts) == whole[20:]
