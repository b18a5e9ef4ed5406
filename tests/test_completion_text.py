"""Stop strings and streamed pieces of a completion."""

from hypothesis import given
from hypothesis import strategies as st

from pyllm.engine.text import CompletionText


class Letters:
    """A detokenizer whose tokens are code points."""

    def push(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def finish(self) -> str:
        return ""


def feed(text: str, stop: list[str], include: bool = False) -> tuple[str, list[str], str | None]:
    """Final text, streamed pieces and the stop string found."""
    out, pieces = CompletionText(Letters(), stop, include), []
    for c in text:
        found = out.push([ord(c)], True)
        pieces.append(out.take(found is not None))
        if found is not None:
            return out.text, pieces, found
    out.finish(True)
    pieces.append(out.take(True))
    return out.text, pieces, None


def test_text_is_cut_before_the_stop_string_or_after_it() -> None:
    assert feed("one. two", ["."])[0] == "one"
    assert feed("one. two", ["."], include=True)[0] == "one."


def test_beginning_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    text, pieces, _ = feed("ab##c", ["###"])
    assert pieces == ["a", "b", "", "", "##c", ""] and text == "ab##c"


def test_only_what_can_begin_a_stop_string_is_held_back() -> None:
    assert feed("hello", ["a very long stop string"])[1] == [*"hello", ""]


def test_earliest_stop_wins() -> None:
    assert feed("xabc", ["bc", "ab"])[2] == "ab"


@given(st.text("ab#", max_size=30), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3), st.booleans())
def test_pieces_join_to_the_text_and_no_stop_is_missed(text: str, stop: list[str], include: bool) -> None:
    final, pieces, found = feed(text, stop, include)
    assert "".join(pieces) == final
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert (found is not None) == bool(ends)
    if found is None:
        assert final == text
    else:
        assert final == text[: min(ends)] if include else text.startswith(final) and final + found == text[: min(ends)]
