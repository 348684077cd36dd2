"""A teacher that means another token by an id would teach nonsense, without any error."""

from pathlib import Path

import pytest

from cheaptrain.data.same_tokenizer import refuse_other_tokenizer, vocabulary_in
from cheaptrain.errors import PreflightError

OURS = {"a": 0, "b": 1, "c": 2, "<eot>": 3}


def test_tokens_that_the_teacher_alone_has_do_no_harm() -> None:
    refuse_other_tokenizer(OURS, OURS, "t")
    refuse_other_tokenizer(OURS, OURS | {"<im_start>": 4, "<im_end>": 5}, "t")


def test_a_token_the_teacher_cannot_read_is_refused() -> None:
    with pytest.raises(PreflightError) as refused:
        refuse_other_tokenizer(OURS | {"<im_start>": 4}, OURS, "t")
    assert "the teacher has no embedding for 1 tokens" in str(refused.value)
    assert "4 is '<im_start>' here and nothing there" in str(refused.value)


def test_ids_that_mean_something_else_are_shown() -> None:
    with pytest.raises(PreflightError) as refused:
        refuse_other_tokenizer(OURS, {"a": 0, "c": 1, "b": 2, "</s>": 3}, "some/teacher")
    said = str(refused.value)
    assert "3 of 4 ids mean something else to the teacher: 1 is 'b' here and 'c' there; 2 is 'c' here and 'b'" in said
    assert 'set tokenizer.path = "some/teacher"' in said


def test_a_teacher_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"holds no tokenizer\.json that can be read"):
        vocabulary_in(tmp_path)
