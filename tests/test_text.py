"""Text that a user names."""

import pytest

from growkit.text import doubts, read_text


def test_data_may_be_a_file_or_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\x00")
    assert read_text(tmp_path / "b.txt") == b"second"
    assert read_text(tmp_path) == b"first\nsecond"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no text, expected files with the suffix .txt"):
        read_text(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Grüße, 世界\n".encode() * 9, None),
        ("a cut 世".encode()[:-1], None),
        (b"latin \xfc and more of it", "byte 6 is no UTF-8"),
        (b"zeros\0\0\0\0\0", "50% of the bytes are control characters"),
    ],
    ids=("text", "cut off", "latin-1", "binary"),
)
def test_bytes_that_are_no_text_are_doubted(text, words):
    assert doubts(text) == words
