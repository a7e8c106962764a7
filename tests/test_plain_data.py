"""JSON and TOML of others are bounded, and what is shown of them is printable."""

import pytest

from ncvsd_inverse.plain_data import parse_json, printable, read_json, read_toml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("NaN", "the number must be finite, got nan"),
        ('{"a": [1, {"b": -Infinity}]}', r"a\.1\.b must be finite, got -inf"),
        ("[1e999]", "0 must be finite, got inf"),
        ('{"a": 9223372036854775808}', "a must be an integer of at most 64 bits, got one of 65"),
        ("[" * 33 + "]" * 33, "nested at most 32 deep"),
        ("[" * 200_000, "nested at most 32 deep"),
        ('["\\ud83d"]', "half characters"),
        ('{"\\udc00": 1}', "half characters"),
    ],
)
def test_json_is_bounded(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_within_bounds_is_what_it_says():
    text = '{"a": [1, -9223372036854775808, 1.5, true, null], "b": "\\ud83d\\ude00"}'
    assert parse_json(text) == {"a": [1, -(2**63), 1.5, True, None], "b": "\U0001f600"}
    assert parse_json("[" * 32 + "]" * 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "Invalid value"),
        ("a = nan", "a must be finite"),
        ("a = 0x" + "f" * 10_000, "a must be an integer of at most 64 bits"),
        ("a = " + "[" * 10_000, "nested at most 32 deep"),
        ("a = " + "{a=" * 10_000, "nested at most 32 deep"),
        (".".join("a" * 30_000) + " = 1", "at most 100 dots, got more in line 1"),
        ("#" * (65 << 10), "at most 65536 bytes"),
    ],
)
def test_toml_is_bounded(tmp_path, text, message):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_toml(path)


def test_what_is_no_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_json(tmp_path / "bytes")


def test_what_is_shown_has_no_control_characters():
    hostile = "a\x1b[2J\x07 \x9b1m\u202eb\ud800 é\n\t c\u2028d"
    assert printable(hostile) == r"a\x1b[2J\x07 \x9b1m\u202eb\ud800 é c d"
    assert printable("a\n\tb", lines=True) == "a\n\\tb"
    assert printable("as it is: é 漢") == "as it is: é 漢"
    assert len(printable("x\0" * 10**6)) < 5000
