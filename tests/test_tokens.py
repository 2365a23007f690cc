import json
import subprocess
import sys
from math import inf, nan
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from vllm_specedge.cli import app
from vllm_specedge.errors import UserError
from vllm_specedge.gateway.credentials import TokenFile, expiry_s


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "new" / "tokens.json")


def roles(tokens: TokenFile, token: str) -> frozenset[str]:
    record = tokens.find(token, 0.0)
    assert record is not None
    return record.roles


def test_a_token_allows_its_role_and_private(tokens: TokenFile) -> None:
    pool, private = tokens.issue("one", "pool"), tokens.issue("two", "private")
    assert roles(tokens, pool) == {"pool", "private"}
    assert roles(tokens, private) == {"private"}
    assert pool != private


@pytest.mark.parametrize("token", ["", "se-", "se-x", "é"])
def test_an_unknown_token_allows_nothing(tokens: TokenFile, token: str) -> None:
    issued = tokens.issue("one", "pool")
    for wrong in (token, issued + "x", issued[:-1]):
        assert tokens.find(wrong, 0.0) is None


def test_a_token_ends_at_its_time(tokens: TokenFile) -> None:
    token = tokens.issue("one", "pool", expires_s=100.0)
    assert tokens.find(token, 99.9)
    assert not tokens.find(token, 100.0)


def test_a_revoked_token_allows_nothing_and_others_stay(tokens: TokenFile) -> None:
    one, two = tokens.issue("one", "pool"), tokens.issue("two", "pool")
    tokens.revoke("one")
    assert not tokens.find(one, 0.0)
    assert tokens.find(two, 0.0)
    tokens.issue("one", "private")


def test_the_file_is_for_its_owner_alone_and_holds_no_token(tokens: TokenFile) -> None:
    token = tokens.issue("one", "pool")
    assert tokens.path.stat().st_mode & 0o777 == 0o600
    assert token not in tokens.path.read_text()
    assert token.removeprefix("se-") not in tokens.path.read_text()
    lock = tokens.path.with_name("tokens.json.lock")
    assert set(tokens.path.parent.iterdir()) == {tokens.path, lock}
    assert (lock.stat().st_mode & 0o777, lock.stat().st_size) == (0o600, 0)


def test_a_name_is_given_once(tokens: TokenFile) -> None:
    tokens.issue("one", "pool")
    with pytest.raises(UserError, match="named 'one' already"):
        tokens.issue("one", "private")
    assert len(tokens.records()) == 1


def test_an_unknown_role_or_name_is_the_user_s_to_mend(tokens: TokenFile) -> None:
    with pytest.raises(UserError, match="no role 'admin'"):
        tokens.issue("one", "admin")
    tokens.issue("one", "pool")
    with pytest.raises(UserError, match="no token named 'two'"):
        tokens.revoke("two")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\tb", "\x1b[31mred", "n" * 300, " one", "one ", "a\u202eb"])
def test_a_name_is_a_short_line_that_can_be_read_and_typed(tokens: TokenFile, name: str) -> None:
    with pytest.raises(UserError, match="1 to 64 letters"):
        tokens.issue(name, "pool")
    assert not tokens.path.exists()


@pytest.mark.parametrize("name", ["anna", "Anna's laptop", "n" * 64, "Jürgen", "[red]", "[/]", "a/b@c"])
def test_names_that_people_give_are_listed_as_they_are(tokens: TokenFile, name: str) -> None:
    tokens.issue(name, "pool")
    assert name in ran("list", "--tokens-file", str(tokens.path)).output.replace("\n", "")


@pytest.mark.parametrize("days", [nan, inf, -inf, 1e12, 36_501.0, -1.0])
def test_a_number_of_days_that_is_none_is_not_taken(days: float) -> None:
    with pytest.raises(UserError, match="--days takes 0 to 36500"):
        expiry_s(days, 1e9)


def test_days_are_counted_from_now() -> None:
    assert expiry_s(0, 1e9) == 0.0
    assert expiry_s(0.5, 1e9) == 1e9 + 43_200
    assert expiry_s(36_500, 1e9) > 4e9


def ran(*words: str) -> Result:
    result = CliRunner().invoke(app, ["token", *words], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, UserError | SystemExit), result.exception
    return result


@pytest.mark.parametrize("days", ["nan", "inf", "1e12", "-3"])
def test_what_was_issued_can_be_listed(tokens: TokenFile, days: str) -> None:
    path = str(tokens.path)
    assert isinstance(ran("issue", "ever", "--days", days, "--tokens-file", path).exception, UserError)
    for name, valid in (("once", "0"), ("long", "36500"), ("short", "0.5")):
        assert ran("issue", name, "--days", valid, "--tokens-file", path).exit_code == 0
    listed = ran("list", "--tokens-file", path)
    assert listed.exit_code == 0
    assert {"once", "long", "short"} <= set(listed.output.split())


RECORD = {"name": "anna", "role": "pool", "sha256": "00", "expires_s": 0.0, "max_edges": 0}


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        (RECORD | {"expires_s": "tomorrow"}, "entry 2, 'anna', expires_s"),
        (RECORD | {"expires_s": None}, "entry 2, 'anna', expires_s"),
        (RECORD | {"sha256": "é"}, "entry 2, 'anna', sha256"),
        (RECORD | {"sha256": 7}, "entry 2, 'anna', sha256"),
        (RECORD | {"role": "admin"}, "entry 2, 'anna', role"),
        (RECORD | {"max_edges": -1}, "entry 2, 'anna', max_edges"),
        (RECORD | {"name": ["anna"]}, "entry 2, name"),
        (RECORD | {"maxedges": 1}, "entry 2, 'anna', maxedges"),
        ({"name": "anna"}, "entry 2, 'anna', role"),
        ("anna", "entry 2:"),
    ],
)
def test_a_file_that_is_damaged_by_hand_says_where(tokens: TokenFile, entry: object, where: str) -> None:
    tokens.path.parent.mkdir()
    tokens.path.write_text(json.dumps([RECORD | {"name": "bob"}, entry]))
    with pytest.raises(UserError) as raised:
        tokens.find("se-x", 0.0)
    assert where in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_an_earlier_release_took_is_still_read_and_can_be_listed_and_revoked(tokens: TokenFile) -> None:
    tokens.path.parent.mkdir()
    odd = {"never": inf, "for long": 1e17, "not": nan, "past": -1e17, "two\nlines": 0.0}
    tokens.path.write_text(json.dumps([RECORD | {"name": name, "expires_s": end} for name, end in odd.items()]))
    assert [record.name for record in tokens.records() if record.is_valid(1e9)] == ["never", "for long", "two\nlines"]
    listed = ran("list", "--tokens-file", str(tokens.path))
    assert listed.exit_code == 0
    assert "two?lines" in listed.output
    for name in odd:
        assert ran("revoke", name, "--tokens-file", str(tokens.path)).exit_code == 0
    assert tokens.records() == []


def test_a_comma_that_is_missing_is_found(tokens: TokenFile) -> None:
    tokens.path.parent.mkdir()
    tokens.path.write_text(json.dumps([RECORD, RECORD], indent=1).replace('"pool",', '"pool"', 1))
    with pytest.raises(UserError, match="line 5 column 3"):
        tokens.records()


@pytest.mark.parametrize("text", ["", "{", "7", '{"name": 1}', "[1]", '[{"name": "x"}]', '[{"other": 1}]', "null"])
def test_a_broken_file_is_one_sentence(tokens: TokenFile, text: str) -> None:
    tokens.path.parent.mkdir()
    tokens.path.write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        tokens.find("se-x", 0.0)


def test_a_file_that_is_not_there_is_one_sentence(tokens: TokenFile) -> None:
    with pytest.raises(UserError, match="vllm-specedge token issue"):
        tokens.records()


def test_a_record_is_plain_json(tokens: TokenFile) -> None:
    tokens.issue("one", "pool", 5.0)
    [entry] = json.loads(tokens.path.read_text())
    assert {**entry, "sha256": ""} == {"name": "one", "role": "pool", "sha256": "", "expires_s": 5.0, "max_edges": 0}


def test_a_file_of_an_earlier_release_is_read(tokens: TokenFile) -> None:
    tokens.path.parent.mkdir()
    tokens.path.write_text('[{"name": "one", "role": "pool", "sha256": "00", "expires_s": 0.0}]')
    assert tokens.records()[0].max_edges == 0


NUM_ISSUERS = 8
ISSUER = """
import sys
from pathlib import Path
from vllm_specedge.gateway.credentials import TokenFile, expiry_s
tokens, who = TokenFile(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
tokens.revoke(f"old {who}")
for number in range(5):
    tokens.issue(f"{who} {number}", "pool")
"""


def test_those_who_issue_and_revoke_at_once_lose_nothing_and_bring_nothing_back(tokens: TokenFile) -> None:
    for who in range(NUM_ISSUERS):
        tokens.issue(f"old {who}", "pool")
    commands = [[sys.executable, "-c", ISSUER, str(tokens.path), str(who)] for who in range(NUM_ISSUERS)]
    issuers = [subprocess.Popen(each, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for each in commands]
    for issuer in issuers:
        assert issuer.stdout is not None
        assert issuer.stdout.readline() == "ready\n"
    for issuer in issuers:  # all are ready: start them together
        assert issuer.stdin is not None
        issuer.stdin.write("go\n")
        issuer.stdin.flush()
    assert [(issuer.communicate(), issuer.returncode)[1] for issuer in issuers] == [0] * NUM_ISSUERS
    expected = {f"{who} {number}" for who in range(NUM_ISSUERS) for number in range(5)}
    assert {record.name for record in tokens.records()} == expected


def test_a_link_to_the_file_stays_one(tokens: TokenFile, tmp_path: Path) -> None:
    tokens.issue("one", "pool")
    link = tmp_path / "link.json"
    link.symlink_to(tokens.path)
    TokenFile(link).issue("two", "pool")
    assert link.is_symlink()
    assert [record.name for record in tokens.records()] == ["one", "two"]


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        TokenFile(tmp_path / "file" / "tokens.json").issue("one", "pool")
