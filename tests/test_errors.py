import pytest

from convmixer_hub.errors import first_line, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\n\x1b[1;31mstep 3/3\x1b[0m failed.\nNext steps:", "step 3/3 failed"), ("", "ValueError")],
)
def test_an_error_of_another_library_becomes_one_line(text, expected):
    assert first_line(ValueError(text)) == expected


def test_what_terminals_do_not_show_is_written_out():
    assert printable("two\nlines \udcff é") == "two\\nlines \\udcff é"
    persian = "\u06af\u0644\u200c\u0647\u0627"
    assert printable(persian) == persian
