import json
from collections import Counter

import numpy as np
import pytest

from hqclip_jax.data.tags import COUNTS_FILE, TagVocabulary, write_counts


@pytest.fixture
def vocabulary(tmp_path) -> TagVocabulary:
    write_counts(tmp_path, Counter({"cup": 8, "red": 4, "blue": 4, "rare": 1}), 8)
    return TagVocabulary.from_datasets([tmp_path], 3)


def test_most_frequent_first_ties_by_alphabet(vocabulary):
    assert vocabulary.tags == ("cup", "blue", "red")
    assert vocabulary.counts == (8, 4, 4)
    assert len(vocabulary) == 3


def test_ids_are_padded_without_repeats_and_without_unknown(vocabulary):
    found = vocabulary.ids(["Red", "nothing", "red", "cup"], 4)
    assert found.tolist() == [2, 0, -1, -1] and found.dtype == np.int32
    assert vocabulary.ids([], 2).tolist() == [-1, -1]
    assert vocabulary.ids(["red", "cup", "blue"], 2).tolist() == [2, 0]


def test_idf(vocabulary):
    np.testing.assert_allclose(vocabulary.idf(), [0, np.log(2), np.log(2)], rtol=1e-6)


def test_json_round_trip(vocabulary):
    assert TagVocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


def test_missing_counts_say_how_to_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{COUNTS_FILE}.*loss\.tag=0"):
        TagVocabulary.from_datasets([tmp_path], 3)
