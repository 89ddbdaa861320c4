"""The recall tasks' prompts and cuts on examples worked out by hand from the published rules."""

from __future__ import annotations

import pytest

from megatron.errors import ConfigError
from megatron.evaluation.tasks.build import SOURCES, answers_of, contains, contains_and_f1, documents, examples
from megatron.evaluation.tasks.prompts import PROMPTS
from megatron.evaluation.tasks.shorten import Tokens, anchor_place, cut_text

CUE = "Summary of information above..."
LETTERS = Tokens(lambda text: [ord(letter) for letter in text], lambda ids: "".join(map(chr, ids)))
CLOZE = {"question": "He was born in", "orig_question": "Where was he born?:", "answers": ["Rome"]}


@pytest.mark.parametrize(
    ("task", "form", "record", "wanted"),
    [
        ("swde", "default", {"text": f"\nAnna, 9.. {CUE} age:", "key": "age"}, "Anna, 9. Age:"),
        ("swde", "default", {"text": f"Anna age:AGE:{CUE} age:", "key": "age"}, "Anna. Age:"),
        ("swde", "twice", {"text": f"\nAnna, 9. \n{CUE} age:", "key": "age"}, "Information about Age. Anna, 9.\nAnna, 9. Age:"),
        ("swde", "twice", {"text": "..Anna ", "key": "age:"}, "Information about Age. Anna.\nAnna. Age::"),
        ("fda", "default", {"text": "\nKit. \nName:", "key": "name"}, "Kit. . Name:"),
        ("fda", "default", {"text": "\nKit.\nname:", "key": "name"}, "Kit. Name:"),
        ("fda", "twice", {"text": "Kit\nname:", "key": "name"}, "Information about Name. Kit.\nKit. Name:"),
        ("squad", "default", {"text": " Rome is in \n"}, "Rome is in"),
        (
            "squad",
            "twice",
            {"text": " Rome is in ", "question": "Where?", "context": "Rome is in Italy. Question: Where? Question:"},
            "Where? Rome is in Italy. \nRome is in",
        ),
        ("nq", "default", {"context": " A man... He was born in", **CLOZE}, "A man. He was born in"),
        ("nq", "default", {"context": "A man. he was born in", **CLOZE}, "A man. he was born in. He was born in"),
        ("nq", "twice", {"context": "A man. he was born in", **CLOZE}, "Where was he born? A man.\nA man. He was born in"),
        ("drop", "default", {"context": "A man.he was born inHe was born in", **CLOZE}, "A man. He was born in"),
        ("drop", "twice", {"context": "A man", **CLOZE}, "Where was he born? A man.\nA man. He was born in"),
        ("triviaqa", "default", {"context": "[DOC] [TLE] A [PAR]man.", **CLOZE}, "A man. He was born in"),
        ("triviaqa", "default", {"context": "A man. He was born in[PAR]", **CLOZE}, "A man. He was born in"),
        ("triviaqa", "default", {"context": "A man. He was born in [PAR]", **CLOZE}, "A man. He was born in. He was born in"),
        ("triviaqa", "twice", {"context": "[DOC] A man.", **CLOZE}, "Where was he born?: A man.\nA man. He was born in"),
        ("swde", "verbatim", {"text": " x: \n"}, " x: \n"),
        ("fda", "stripped", {"text": " x: \n"}, "x:"),
    ],
)
def test_prompts(task: str, form: str, record: dict[str, object], wanted: str) -> None:
    assert PROMPTS[task, form](record) == wanted


def test_every_data_set_has_its_prompts() -> None:
    assert {name.split("_")[0] for name in SOURCES} == {task for task, _ in PROMPTS}
    assert PROMPTS["nq", "twice"]({"context": "", **CLOZE, "question": ""}) == "Where was he born? .\n. "  # and it ends


DOCUMENT = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("anchors", "wanted", "found"),
    [
        (["no"], "ijklmnopqr", True),  # half of ten in front of n (13), the rest from there on: 8 .. 18
        (["NO", "xy"], "ijklmnopqr", True),  # the earliest, whatever its case
        (["bc"], "abcdefghij", True),  # less than half in front of it: the rest goes behind
        (["yz"], "tuvwxyz", True),  # the document ends first: what is left over in front is not used
        ([], "abcdefghij", True),  # no anchor asked for: the beginning
        (["??"], "uvwxyz", False),  # not found: all but the last letter counts as in front
    ],
)
def test_cut(anchors: list[str], wanted: str, found: bool) -> None:
    piece = cut_text(f" {DOCUMENT}\n", anchors, LETTERS, 10)
    assert piece is not None and (piece.text, piece.found, piece.tokens) == (wanted, found, 26)


def test_cut_exceptions() -> None:
    short = cut_text("abcdefgh", ["gh"], LETTERS, 10)
    assert short is not None and short.text == "bcdefgh"  # it would fit, and is cut all the same
    assert cut_text(DOCUMENT, ["no", "z"], LETTERS, 10) is None and cut_text(DOCUMENT, [""], LETTERS, 10) is None
    assert anchor_place(DOCUMENT, ["??"], ["!!", "xy", "cd"]) == 23 and anchor_place(DOCUMENT, ["b"], ["a"]) == 1
    other = cut_text(DOCUMENT, ["??"], LETTERS, 10, alternatives=["cd"])
    assert other is not None and other.text == "abcdefghij" and other.found
    told = cut_text(DOCUMENT, ["??"], LETTERS, 10, tok_pos=12)
    assert told is not None and told.text == "hijklmnopq" and not told.found
    ignored = cut_text("abcdefgh", ["??"], LETTERS, 10, tok_pos=0)  # only texts beyond the budget use it
    assert ignored is not None and ignored.text == "cdefgh"


def test_examples_count_what_is_left_out() -> None:
    records = [
        {"text": f"{DOCUMENT} {CUE} name:", "key": "no", "value": "pq"},
        {"text": f"{DOCUMENT} {CUE} name:", "key": "??", "value": "!!"},
        {"text": f"{DOCUMENT} {CUE} name:", "key": "name", "value": "x"},
        {"text": f"abcdef {CUE} name:", "key": "ab", "value": "ef"},
    ]
    made, counts = examples(records, "swde", "default", LETTERS, 10)
    assert [doc["prompt"] for doc in made] == ["ijklmnopqr. No:", "uvwxyz. ??:", "abcdef. Ab:"]
    assert vars(counts) == {"records": 4, "dropped": 1, "anchor_missing": 1, "shortened": 2}
    whole, counts = examples(records, "swde", "twice", None, 0)
    assert len(whole) == 4 and counts.dropped == 0
    assert whole[0]["prompt"] == f"Information about No. {DOCUMENT}.\n{DOCUMENT}. No:"


def test_nq_cuts_around_its_first_answer_and_needs_one() -> None:
    records = [{"context": DOCUMENT, **CLOZE, "answers": given} for given in (["pq", "cd"], ["cd", "x"], [], ["x"])]
    made, counts = examples(records, "nq_512", "default", LETTERS, 10)
    assert [doc["prompt"].split(". ")[0] for doc in made] == ["klmnopqrst", "abcdefghij"] and counts.dropped == 2
    assert answers_of(records[0]) == ["pq", "cd"] and answers_of({"value": " v"}) == [" v"]


def test_squad_twice_repeats_the_whole_context() -> None:
    record = {"text": DOCUMENT, "value": "no", "question": "Which?", "context": f"{DOCUMENT}!"}
    made, _ = examples([record], "squad", "twice", LETTERS, 10)
    assert made[0]["prompt"] == f"Which? {DOCUMENT}!\nijklmnopqr"


def test_scores() -> None:
    assert contains({"answers": ["a.b", "ROME"]}, ["in rome, they"]) == {"contains": 1.0}
    assert contains({"answers": ["a.b"]}, ["axb"]) == {"contains": 0.0}  # a dot is a dot
    assert contains({"answers": [" Rome"]}, ["Rome"]) == {"contains": 0.0}  # white space of the gold string counts
    found = contains_and_f1({"answers": ["The big cat", "dog"]}, ["a big, black cat!"])
    assert found == {"contains": 0.0, "exact": 0.0, "f1": pytest.approx(0.8)}  # 2 of 3 and 2 of 2 words
    assert contains_and_f1({"answers": ["the Dog."]}, ["dog"]) == {"contains": 0.0, "exact": 1.0, "f1": 1.0}
    assert contains_and_f1({"answers": ["cat"]}, [" "])["f1"] == 0.0


def test_a_budget_below_the_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves nothing"):
        documents("swde", "default", context_length=50)
