"""Personal data and secrets: planted values of every kind, near misses, hostile texts. No value here is anybody's."""

import base64
import itertools
import json
import random
import time

import pytest

from finetune.data.privacy import KINDS, Finding, find, redact


def _token(length: int, alphabet: str = "aZ3bY7cX9dW2eV5fU8gT1hS4iR6jQ0k") -> str:
    return (alphabet * 4)[:length]


def _encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


JWT = f"{_encoded({'alg': 'HS256'})}.{_encoded({'sub': '1234567890'})}.{_token(43)}"
BODY = "\n".join([_token(64)] * 3)

# (kind, text before, value, text behind). Tokens are put together here, so that no scanner takes this file for a leak.
PLANTED = [
    ("email", "Write to ", "alice.o'neil+x@mail.example.com", ". Thanks"),
    ("email", "<a href='mailto:", "bob@example.com", "'>"),
    ("email", "an ", "jürgen@münchen.example", " and"),
    ("phone", "Reach us at ", "+49 30 901820", " today"),
    ("phone", "intl. ", "+1 (202) 555-0143", "."),
    ("phone", "Tel.: ", "030 901820", ", Berlin"),
    ("phone", "Call me on ", "(202) 555-0143", " or write"),
    ("phone", "mobile ", "07911 123456", " (UK)"),
    ("phone", "Téléphone : ", "01 42 68 53 00", "\n"),
    ("phone", "móvil ", "612 34 56 78", ", Madrid"),
    ("phone", "WhatsApp: ", "98765 43210", ""),
    ("card", "card ", "4111 1111 1111 1111", " exp 12/30"),
    ("card", "", "5555555555554444", ""),
    ("card", "Amex ", "3782-822463-10005", ""),
    ("card", "12 ", "4111-1111-1111-1111", " 13"),
    ("iban", "to ", "DE89 3704 0044 0532 0130 00", " BIC COBADEFF"),
    ("iban", "IBAN:", "GB82WEST12345698765432", "."),
    ("ssn", "SSN ", "536-90-4399", "."),
    ("ssn", "(", "536-90-4399", ") 5 6"),
    ("ssn", "on 1 2. ", "536-90-4399", ". 12 34"),
    ("nhs", "NHS number ", "943 476 5900", ""),
    ("nir", "assuré ", "1 85 05 78 006 084 91", ","),
    ("nir", "numéro de sécu : ", "185057800608491", ","),
    ("steuer_id", "Steuer-ID: ", "65929970489", ""),
    ("bsn", "BSN ", "111222333", ")"),
    ("dni", "DNI: ", "54362315K", "."),
    ("nie", "con ", "X2482300W", "."),
    ("codice_fiscale", "C.F. ", "RCCMNL83S18D969H", ","),
    ("pesel", "PESEL: ", "44051401359", ""),
    ("cpf", "n. ", "390.533.447-05", ""),
    ("cpf", "CPF ", "39053344705", ""),
    ("aadhaar", "his ", "2341 2341 2346", " was"),
    ("belgian_nn", "n° ", "85.07.30-033.28", ""),
    ("personnummer", "född ", "880320-0016", ""),
    ("fodselsnummer", "nr ", "151086 95088", ""),
    ("hetu", "tunnus ", "131052-308T", "."),
    ("ahv", "Nr. ", "756.9217.0769.85", ""),
    ("sin", "SIN: ", "123 456 782", ""),
    ("rrn", "id ", "971013-9020013", ""),
    ("ric", "id ", "360121199310300018", ""),
    ("curp", "la CURP ", "BOXW310820HNERXN09", ""),
    ("ip", "from ", "81.2.69.142", " at noon"),
    ("ip", "[", "2a00:1450:4001:81b::200e", "]"),
    ("private_key", "x\n", f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n-----END RSA PRIVATE KEY-----", "\ny"),
    ("private_key", "cut: ", f"-----BEGIN PRIVATE KEY-----\n{BODY}\n", ""),
    ("aws_key", "id ", "AKIA" + "J5Q7ZXW2K9RT3VBN", ";"),
    ("aws_secret", "aws_secret_access_key = ", _token(40), "\n"),
    ("aws_secret", "AWS_SECRET_KEY='", "wJalrX/+" + _token(32), "'"),
    ("github_token", "token: ", "ghp_" + _token(36), " x"),
    ("github_token", "", "github_pat_" + _token(22) + "_" + _token(59), ""),
    ("gitlab_token", "use ", "glpat-" + _token(20), "."),
    ("slack_token", "", "xoxb-" + "123456789012-123456789012-" + _token(24), ""),
    ("slack_token", "hook ", "https://hooks.slack.com/services/" + "T01ABCDEF/B02GHIJKL/" + _token(24), ""),
    ("stripe_key", "", "sk_live_" + _token(60), ","),
    ("stripe_key", "", "sk_test_" + _token(24), ","),
    ("huggingface_token", "HF_TOKEN=", "hf_" + _token(34), ""),
    ("openai_key", "key ", "sk-proj-" + _token(48), ""),
    ("openai_key", "key ", "sk-" + _token(20) + "T3BlbkFJ" + _token(20), ""),
    ("google_key", "?key=", "AIza" + _token(35), "&q"),
    ("twilio_key", "", "AC" + _token(32, "a3b7c9d2e5f8"), ""),
    ("npm_token", "", "npm_" + _token(36), ""),
    ("npm_token", "//registry.example/:_authToken=", "a1b2c3d4-" + "e5f6-4a7b-8c9d-0e1f2a3b4c5d", "\n"),
    ("pypi_token", "", "pypi-AgEIcHlwaS5vcmc" + _token(80), ""),
    ("jwt", "Bearer ", JWT, ". Done"),
    ("url_password", "postgres://", "admin:s3cr3t", "@db.example.com/x"),
    ("password", "password = ", "hunter2x", ""),
    ("password", 'db_password: "', "Tr0ub4dor&3", '"'),
    ("password", "The password is ", "k9Lm2xQ", ". Keep it"),
    ("password", "API_KEY='", _token(24), "'"),
    ("password", '{"client_secret": "', _token(24), '"}'),
]


@pytest.mark.parametrize(("kind", "before", "value", "behind"), PLANTED)
def test_a_planted_value_is_found_at_its_place_and_replaced(kind, before, value, behind):
    text = before + value + behind
    assert find(text) == [Finding(kind, len(before), len(before) + len(value))]
    redacted = redact(text, find(text))
    assert redacted == f"{before}[{kind.upper()}]{behind}"
    assert find(redacted) == []


def test_every_kind_has_a_planted_value_and_a_line_that_says_what_is_checked():
    assert {kind for kind, _, _, _ in PLANTED} == set(KINDS)
    assert all(says and says[-1] != "." for says in KINDS.values())


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # wrong check digits
        "to DE89 3704 0044 0532 0130 01",
        "BSN 111222334",
        "PESEL 44051401358",
        "DNI 54362315A",
        "NHS 943 476 5901",
        "CPF 390.533.447-06",
        "tunnus 131052-308A",
        "SSN 666-12-3456",  # a range that is not given out
        "SSN 536904399",
        "Order no. 111222333 shipped, invoice 65929970489, ticket 9434765900",  # right check digits, no word
        "account 123 456 782 units sold",
        "order 4539578763621486a and x5555555555554444",  # within a word
        "order 1234567812345670, 9999 9999 9999 9995",  # right Luhn digits, no issuer
        "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2, EAN 4006381333931",
        "call it version 10.12.13.14 of 2024-01-15 10:30:00, see v8.12.200.31",
        "Git 1.7.12.2, section 4.2.1.3 and release 81.2.69.142",
        "10.0.0.1 192.168.1.1 127.0.0.1 172.16.5.4 192.0.2.7 198.51.100.3 0.0.0.0 255.255.255.255 999.1.1.10",
        "::1 fe80::1 2001:db8::1 std::vector<int> 12:30:45 00:1A:2B:3C:4D:5E dead::beef",
        "localhost:8080 user@localhost @app.route('/x') lodash@4.17.21 git@github.com:a/b.git a @ b.com",
        "call 1234567 or 2019 2020 2021 2022, phone model 3310, tel aviv 1948-05-14",
        "1 + 2025550143 = x+12025550143; 3.14159265358979; 1,234,567,890; $ 100 000 000",
        "sha e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 d41d8cd98f00b204e9800998ecf8427e",
        "uuid 550e8400-e29b-41d4-a716-446655440000, 1718000000000 ms, 20240115103000",
        "task-management-with-skylight hf_hub_download(repo_id) AKIA sk-toggleable__label-arrow-x ghp_short eyJhbGciOi",
        "ghp_" + "x" * 36 + " AKIA" + "X" * 16,
        "-----BEGIN RSA PRIVATE KEY----- is how such a file begins",
        "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PUBLIC KEY-----\n" + BODY + "\n-----END PUBLIC KEY-----",
        "password = getpass2() password: required; password=config.password2 passwd = 'your_password1' pwd=${PW_1}",
        'secret: "<your secret 1>", "password": "password", api_key = os.environ["API_KEY1"], primary key: abc1234',
        "The password is case-sensitive. The secret: never give up. Tokens: 128000",
        "see https://<user>:<password1>@example, https://example.com/a:b@c and http://[::1]:80/",
        "",
    ],
)
def test_near_misses_are_no_findings(text):
    assert find(text) == []


def test_a_bare_number_is_an_id_only_close_behind_its_word():
    assert [f.kind for f in find("Her BSN is 111222333")] == ["bsn"]
    assert find("Her BSN is in the file that the clerk of the court has kept: 111222333") == []
    assert [f.kind for f in find("PESEL 44051401359, Steuer-ID 65929970489")] == ["pesel", "steuer_id"]


def test_numbers_listed_behind_one_word_are_all_found_and_others_are_not():
    text = "Tel.: 030 901820 / 030 901821, 030 901822. The order 030 901823 is late."
    assert redact(text, find(text)) == "Tel.: [PHONE] / [PHONE], [PHONE]. The order 030 901823 is late."


def test_a_word_does_not_reach_over_a_finding_so_that_redaction_brings_no_number_nearer():
    text = "Tel or mail somebody.with.a.long.name@a.long.domain.example.com 030 901820"
    assert redact(text, find(text)) == "Tel or mail [EMAIL] 030 901820"
    assert find("Tel or mail [EMAIL] 030 901820") == []
    assert find("[PASSWORD]: 4405assured") == []


def test_of_two_that_overlap_a_secret_wins_and_else_the_longer():
    text = "https://bob:pass9word@example.com/x"
    assert redact(text, find(text)) == "https://[URL_PASSWORD]@example.com/x"
    text = "token = 'ghp_" + _token(36) + "'"
    assert [f.kind for f in find("secret_" + text)] == ["github_token"]
    assert [f.kind for f in find("DE89370400440532013000")] == ["iban"]


def test_redaction_of_many_at_once_leaves_nothing_and_keeps_the_rest():
    order = random.Random(7)
    for _ in range(150):
        chosen = order.sample(PLANTED, 6)
        between = order.choice([" ", ", ", "\n", " and then, after some words, ", " / "])
        text = between.join(before + value + behind for _, before, value, behind in chosen)
        found = find(text)
        assert all(a.end <= b.start for a, b in itertools.pairwise(found))
        assert find(redact(text, found)) == [], redact(text, found)
        for kind, _, value, _ in chosen:
            assert value not in redact(text, found), (kind, text)


def test_wide_digits_and_zero_width_characters_are_the_misses_that_the_docstring_admits():
    wide = "4111 1111 1111 1111".translate({ord("0") + i: 0xFF10 + i for i in range(10)})
    assert find(f"card {wide}, mail ali\u200bce@exam\u200bple.com") == []
    assert find("nbsp 4111\u00a01111\u00a01111\u00a01111") == [Finding("card", 5, 24)]


def test_nothing_is_printed_logged_or_kept_of_a_value(capfd, caplog):
    caplog.set_level(0)
    for kind, before, value, behind in PLANTED:
        (finding,) = find(before + value + behind)
        assert value not in repr(finding), kind
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


@pytest.mark.parametrize(
    "piece",
    [
        "7",
        "@",
        " ",
        "a",
        "a@",
        "1 ",
        "1.",
        "+1",
        "eyJ",
        "sk-",
        "password=",
        "aws key ",
        "AC",
        "(",
        "[",
        "2001:",
        "://a:",
    ],
)
def test_a_megabyte_of_one_thing_takes_seconds_at_most(piece):
    text = piece * (1_000_000 // len(piece))
    begun = time.process_time()
    assert find(text) == []
    assert time.process_time() - begun < 12  # quadratic work would take hours
