"""The folds that the measurement of film reviews tests in."""

from collections import Counter

from benchmarks import reviews


def test_each_review_is_in_one_fold_and_each_fold_has_a_tenth_of_each_class(tmp_path):
    texts = {"neg": [f"bad number {n}" for n in range(53)], "pos": [f"good\tnumber {n}" for n in range(60)]}
    for label, lines in texts.items():
        (tmp_path / f"{label}.txt").write_text("\n\n".join(f" {line} " for line in lines) + "\n", encoding="utf-8")
    found = reviews.read(tmp_path)
    assert sorted(one.text for one in found) == sorted(line.replace("\t", " ") for lines in texts.values() for line in lines)
    assert all(one.text.startswith("good" if one.label == "pos" else "bad") for one in found)
    sizes = Counter((one.label, one.fold) for one in found)
    assert {size for (label, _), size in sizes.items() if label == "pos"} == {6}
    assert {size for (label, _), size in sizes.items() if label == "neg"} == {5, 6}
    assert reviews.read(tmp_path) == found
