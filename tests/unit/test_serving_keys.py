"""Tests who may ask the endpoint: API keys in files, and the limits of each key."""

import pytest
from heliostat.apps.serve.gateway import RequestLimits
from heliostat.errors import ConfigError
from heliostat.web import keys
from heliostat.web.refusals import Refusal


def test_limits_count_each_key_by_itself_and_say_when_to_come_again():
    now = [0.0]
    limits = RequestLimits(at_once=2, a_minute=3, clock=lambda: now[0])
    limits.enter("a")
    limits.enter("a")
    with pytest.raises(Refusal, match="this key has 2 open requests") as found:
        limits.enter("a")
    assert (found.value.status, found.value.headers()) == (429, {"Retry-After": "1"})
    limits.enter("b")
    now[0] = 10.5
    limits.leave("a")
    limits.enter("a")
    limits.leave("a")
    with pytest.raises(Refusal, match="within a minute") as found:
        limits.enter("a")
    assert found.value.retry_after == 50
    now[0] = 60.0
    limits.enter("a")


def test_keys_are_read_by_name_and_known_by_their_digest_alone(tmp_path):
    place = tmp_path / "kept" / "keys"
    assert keys.made(place) and not keys.made(place)
    assert place.stat().st_mode & 0o777 == 0o600
    key = place.read_text().strip()
    known = keys.read(place)
    assert key not in repr(known) and keys.owner(f"Bearer {key}", known) == "key-1"
    place.write_text(f"# ours\nalice {'a' * 20}\n\n{'b' * 20}\n")
    known = keys.read(place)
    assert [keys.owner(f"bearer {c * 20}", known) for c in "ab"] == ["alice", "key-4"]
    for header in (None, "", "Basic x", f"Bearer {'a' * 19}", f"Bearer {'a' * 21}", "Bearer é" + "a" * 20):
        with pytest.raises(Refusal) as found:
            keys.owner(header, known)
        assert found.value.status == 401 and "aaa" not in found.value.message


def test_a_key_may_have_a_sign_that_begins_comments(tmp_path):
    """Only the whole key is accepted, not its beginning. After white space, or at the start of a line, the sign begins a
    comment."""
    place, key = tmp_path / "keys", f"{'k' * 16}#{'s' * 8}"
    place.write_text(f"{key}\nbob {'b' * 20}#1\t# ours\n #{'c' * 20}\n{'d' * 20} #no\n")
    place.chmod(0o600)
    known = keys.read(place)
    given = [key, "b" * 20 + "#1", "d" * 20]
    assert [keys.owner(f"Bearer {one}", known) for one in given] == ["key-1", "bob", "key-4"] and len(known) == 3
    assert keys.first(place) == key
    for part in ("k" * 16, "b" * 20):
        with pytest.raises(Refusal):
            keys.owner(f"Bearer {part}", known)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "contains no key"),
        ("short", "shorter than 16"),
        (f"a b {'k' * 20}", "isn't a key"),
        (f"a {'k' * 20}\na {'l' * 20}", "twice"),
    ],
)
def test_a_key_file_that_is_wrong_is_named_without_its_keys(tmp_path, text, said):
    place = tmp_path / "keys"
    place.write_text(text)
    place.chmod(0o600)
    with pytest.raises(ConfigError, match=said) as found:
        keys.read(place)
    assert "kkk" not in str(found.value)
    place.chmod(0o644)
    with pytest.raises(ConfigError, match="other users"):
        keys.read(place)
